"""The prompts of a benchmark: a built-in set over six task families, a JSONL file, or Spec-Bench's questions.

Acceptance depends on the text, and a translation is drafted differently from a story. So every prompt has a category,
and results are shown per category.

    {"prompt": "Translate: ...", "category": "translation"}
    {"messages": [{"role": "user", "content": "..."}, ...], "id": "support-3"}
    {"question_id": 81, "category": "writing", "turns": ["...", "..."]}          Spec-Bench's question file
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path
from types import MappingProxyType
from typing import Any

from trtllm_redrafter.backends.base import Request, Runner, SamplingParams
from trtllm_redrafter.errors import InputError, MismatchError, Problem, RequestError, brief, raise_together
from trtllm_redrafter.prompts.files import parse_all
from trtllm_redrafter.prompts.jsonl import SHOWN, NumberedLine, lines_of, read_lines
from trtllm_redrafter.prompts.messages import Prompt, check_asks, own_id, parse_prompt
from trtllm_redrafter.settings.schema import BenchSection, TuneSection

BUILT_IN = "built-in"
UNNAMED = "other"
_TURN = "-turn-"
_LAST_TURN = re.compile(rf"{_TURN}\d+$")


@dataclass(frozen=True)
class BenchPrompt:
    """One conversation to answer, turn by turn."""

    prompt_id: str
    category: str
    prompt: Prompt


@dataclass(frozen=True)
class Item:
    """One measured request: its tokens, ready to submit."""

    item_id: str
    category: str
    token_ids: tuple[int, ...]


def built_in_prompts() -> list[BenchPrompt]:
    """Eighty prompts written for this project."""
    with files("trtllm_redrafter.benchmark").joinpath("prompts.jsonl").open("rb") as file:
        return _parse(lines_of(file, BUILT_IN), BUILT_IN)


def read_prompts(path: Path) -> list[BenchPrompt]:
    """Prompts of a JSON Lines file; `InputError` names every bad line."""
    return _parse(read_lines(path), path)


def _parse(lines: Iterable[NumberedLine], source: Path | str) -> list[BenchPrompt]:
    seen: set[str] = set()

    def parse(number: int, values: Mapping[str, Any]) -> BenchPrompt:
        prompt_id = own_id(values) or f"line-{number}"
        prompt = BenchPrompt(prompt_id, str(values.get("category", UNNAMED)), check_asks(parse_prompt(values)))
        if prompt_id in seen:
            raise InputError(f"the id {brief(prompt_id)} stands twice", remedy="give each its own")
        seen.add(prompt_id)
        return prompt

    return parse_all(lines, source, parse)


def make_items(
    runner: Runner,
    prompts: Sequence[BenchPrompt],
    *,
    max_tokens: int,
    template_kwargs: Mapping[str, Any] = MappingProxyType({}),
) -> list[Item]:
    """Tokenize; earlier turns are answered greedily without drafting, so that both sides get identical requests.

    `MismatchError` names all prompts that the engine or its chat template cannot take, before anything is measured.
    """
    items, problems = [], []
    for prompt in prompts:
        try:
            items += _items_of(runner, prompt, max_tokens, template_kwargs)
        except _TooLong as error:
            problems.append(Problem(f"{prompt.prompt_id}: {error}", remedy="shorten it, or build for longer texts"))
        except RequestError as error:
            p = error.problem
            problems.append(Problem(f"{prompt.prompt_id}: {p.what}", None, p.why, p.remedy))
    raise_together(MismatchError, problems[:SHOWN], "prompts do not fit the engine", where=runner.info.path)
    return items


class _TooLong(Exception):
    """A prompt and its answer exceed the engine's limits."""


def _items_of(runner: Runner, bench: BenchPrompt, max_tokens: int, template_kwargs: Mapping[str, Any]) -> list[Item]:
    prompt, items = bench.prompt.with_template_kwargs(template_kwargs), []
    later = list(prompt.later)
    for number in itertools.count(1):
        ids = runner.encode(prompt.for_model(has_template=runner.has_chat_template))
        most = min(runner.info.max_input_len, runner.info.max_seq_len - max_tokens)
        if len(ids) > most:
            raise _TooLong(f"{len(ids)} tokens, the engine takes {most} with an answer of {max_tokens}")
        name = bench.prompt_id if not bench.prompt.later else f"{bench.prompt_id}{_TURN}{number}"
        items.append(Item(name, bench.category, ids))
        if not later:
            return items
        [answer] = runner.generate([Request(ids, SamplingParams(max_tokens), draft=False)])
        turns = ({"role": "assistant", "content": answer.text}, {"role": "user", "content": later.pop(0)})
        prompt = replace(prompt, content=(*prompt.as_messages(), *turns))
    raise AssertionError("unreachable")


def question_of(item_id: str) -> str:
    """Id of the prompt that an item is a turn of."""
    return _LAST_TURN.sub("", item_id)


def prompts_of(settings: BenchSection | TuneSection) -> list[BenchPrompt]:
    """The prompts that a recipe's section asks for."""
    prompts = built_in_prompts() if settings.prompts is None else read_prompts(settings.prompts)
    return choose(prompts, settings.limit)


def choose(prompts: Sequence[BenchPrompt], count: int | None) -> list[BenchPrompt]:
    """`count` prompts evenly spaced over the list, so that every category is represented; None: all."""
    if count is None or count >= len(prompts):
        return list(prompts)
    return [prompts[i * len(prompts) // count] for i in range(count)]
