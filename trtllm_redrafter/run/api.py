"""The Python API: what the commands do, as three functions and an engine.

    from trtllm_redrafter import build, convert, load_engine

    convert(base="vicuna-7b", drafter="redrafter-vicuna-7b", output="checkpoint")
    build(checkpoint="checkpoint", output="engine")
    with load_engine("engine") as engine:
        print(engine.generate("What is a tree?", max_tokens=64)[0].text)

Options are the keys of the recipe's sections, with the same defaults (also for None) and the same checks. Errors are
`RedrafterError`s.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypedDict

from trtllm_redrafter.backends import load_backend
from trtllm_redrafter.backends.base import EngineInfo, Request, Result, Runner, SamplingParams, Update
from trtllm_redrafter.conversion.plan import plan_conversion
from trtllm_redrafter.conversion.writer import convert as run_conversion
from trtllm_redrafter.errors import RequestError
from trtllm_redrafter.paths import as_input_error
from trtllm_redrafter.progress import Progress, no_progress
from trtllm_redrafter.prompts.messages import check_template_kwargs
from trtllm_redrafter.run.options import build_options, convert_options, sampling_params
from trtllm_redrafter.run.session import defaults_for, open_runner
from trtllm_redrafter.settings import Resolved, flag_layers, resolve

if TYPE_CHECKING:
    from typing_extensions import Unpack

AnyPath = str | Path
AnyPrompt = str | Sequence[Mapping[str, Any]]


def is_one_prompt(prompts: AnyPrompt | Sequence[AnyPrompt]) -> bool:
    """A text or a conversation, not a list of them."""
    return isinstance(prompts, str) or (len(prompts) > 0 and isinstance(prompts[0], Mapping))


class ConvertKeys(TypedDict, total=False):
    """Keys of the recipe's `convert` section, for type checkers. A test compares them with the schema."""

    dtype: str | None
    tp_size: int | None
    num_beams: int | None
    draft_len: int | None
    greedy: bool | None
    parallel_embedding: bool | None
    lm_head: str | None
    workers: int | None


class BuildKeys(TypedDict, total=False):
    """Keys of the recipe's `build` section."""

    tokenizer: AnyPath | None
    max_batch_size: int | None
    max_input_len: int | None
    max_seq_len: int | None


def convert(
    base: AnyPath,
    output: AnyPath,
    *,
    drafter: AnyPath | None = None,
    overwrite: bool = False,
    progress: Progress = no_progress,
    **options: Unpack[ConvertKeys],
) -> Path:
    """Write a TensorRT-LLM checkpoint of `base` and `drafter`; returns its directory."""
    resolved = _resolved({"base": base, "checkpoint": output, "drafter": drafter}, convert=options)
    with as_input_error():
        return run_conversion(plan_conversion(convert_options(resolved, overwrite=overwrite)), progress)


def build(
    checkpoint: AnyPath,
    output: AnyPath,
    *,
    backend: str | None = None,
    tensorrt_llm: Mapping[str, Any] | None = None,
    tensorrt: Mapping[str, Any] | None = None,
    overwrite: bool = False,
    progress: Progress = no_progress,
    **options: Unpack[BuildKeys],
) -> Path:
    """Build an engine from a checkpoint; returns its directory.

    `tensorrt_llm` and `tensorrt` take the keys of those recipe sections, as {"gpu": "h200"} and {"compiler": "auto"};
    they mean nothing to the torch backend.
    """
    resolved = _resolved(
        {"checkpoint": checkpoint, "engine": output, "backend": backend},
        build=options,
        tensorrt_llm=tensorrt_llm or {},
        tensorrt=tensorrt or {},
    )
    with as_input_error():
        resolved_options = build_options(resolved, overwrite=overwrite)
        chosen = load_backend(resolved_options.backend)
        return chosen.build(chosen.plan(resolved_options), progress)


def load_engine(
    engine: AnyPath,
    *,
    device: str | None = None,
    num_beams: int | None = None,
    draft_len: int | None = None,
    verify_hashes: bool = False,
    executor: str | None = None,
) -> Engine:
    """Load an engine directory with the backend it was built for.

    `executor` "onnxruntime" runs an engine of the tensorrt backend on any machine.
    """
    run = {"device": device, "num_beams": num_beams, "draft_len": draft_len}
    resolved = _resolved({"engine": engine}, run=run, tensorrt={"executor": executor})
    with as_input_error():
        return Engine(open_runner(resolved, verify_hashes=verify_hashes), resolved)


class Engine:
    """A loaded engine for texts; `runner` is what steps, batches and servers work with."""

    def __init__(self, runner: Runner, resolved: Resolved) -> None:
        self.runner = runner
        self._resolved = resolved

    @property
    def info(self) -> EngineInfo:
        return self.runner.info

    def generate(
        self,
        prompts: AnyPrompt | Sequence[AnyPrompt],
        *,
        draft: bool = True,
        chat: bool | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        **sampling: Any,
    ) -> list[Result]:
        """Answer prompts as one batch; results in their order, also of a single prompt.

        A prompt is a text or a list of messages, `prompts` one of them or a list.
        `sampling` takes the fields of `SamplingParams`, as max_tokens or temperature; the others are the recipe's
        defaults. `chat_template_kwargs` are arguments of the chat template, as {"enable_thinking": False}.
        If any prompt is refused, none is run.
        """
        listed = [prompts] if is_one_prompt(prompts) else prompts
        return self.runner.generate([self._request(p, draft, chat, chat_template_kwargs, sampling) for p in listed])  # type: ignore[arg-type]

    def stream(
        self,
        prompt: AnyPrompt,
        *,
        draft: bool = True,
        chat: bool | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        **sampling: Any,
    ) -> Iterator[Update]:
        """Updates of one prompt as they come."""
        return self.runner.stream(self._request(prompt, draft, chat, chat_template_kwargs, sampling))

    async def astream(
        self,
        prompt: AnyPrompt,
        *,
        draft: bool = True,
        chat: bool | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        **sampling: Any,
    ) -> AsyncIterator[Update]:
        """`stream` for `async for`: steps run in a thread, so the event loop goes on. One stream at a time.

        `await aclose()` on the iterator, or the end of its task, cancels the request.
        """
        updates = self.stream(prompt, draft=draft, chat=chat, chat_template_kwargs=chat_template_kwargs, **sampling)
        try:
            while (update := await asyncio.to_thread(next, updates, None)) is not None:
                yield update
        finally:
            updates.close()  # type: ignore[attr-defined]

    def _request(
        self,
        prompt: AnyPrompt,
        draft: bool,
        chat: bool | None,
        template_kwargs: Mapping[str, Any] | None,
        sampling: Mapping[str, Any],
    ) -> Request:
        if isinstance(sampling.get("stop"), str):
            sampling = {**sampling, "stop": (sampling["stop"],)}
        lists = ("stop", "stop_token_ids")
        try:
            changes = {k: tuple(v or ()) if k in lists else v for k, v in sampling.items()}
            params = sampling_params(self._resolved, changes)
        except TypeError as e:
            remedy = f"use {', '.join(field.name for field in fields(SamplingParams))}"
            raise RequestError("unknown sampling parameter", why=str(e), remedy=remedy) from e
        messages, defaults = not isinstance(prompt, str), defaults_for(self._resolved, self.runner)
        through_template = (defaults.prompt.chat if chat is None else chat) or messages
        kwargs = {**defaults.prompt.template_kwargs, **check_template_kwargs(dict(template_kwargs or {}))}
        ids = self.runner.encode_prompt(prompt, chat=bool(through_template), template_kwargs=kwargs)
        return Request(ids, params, draft=draft)

    def close(self) -> None:
        self.runner.close()

    def __enter__(self) -> Engine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _resolved(top: Mapping[str, Any], **sections: Mapping[str, Any]) -> Resolved:
    """Arguments as a recipe layer, named as the caller named them."""
    given = dict(top) | {f"{s}.{key}": value for s, values in sections.items() for key, value in values.items()}
    return resolve(flag_layers({key: (key.rpartition(".")[2], value) for key, value in given.items()}))
