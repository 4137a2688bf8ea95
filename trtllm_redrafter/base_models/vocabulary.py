"""Do a tokenizer and its token ids fit a model, whose embedding has `vocab_size` rows?

A tokenizer may have a few added tokens beyond the embedding (such as a padding token) that the model's texts never
contain; a prompt with one of them is refused. If the vocabulary itself is larger than the embedding, or the chat
template or a prefix uses such tokens, the tokenizer belongs to another model.

    tokenizer = tokenizer_for(Path("engine/tokenizer"), vocab_size=49152, remedy="build with --tokenizer DIR")
    token = first_beyond(ids, vocab_size=49152)      # None if all are in range
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from trtllm_redrafter.base_models.tokenizer import library_errors, load_tokenizer
from trtllm_redrafter.errors import InputError, Problem, raise_together

_SHOWN = 8
_SPECIAL_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
"""Special tokens that a chat template can refer to."""


def tokenizer_for(folder: Path, *, vocab_size: int, remedy: str) -> Any:
    """The tokenizer in `folder`, checked against a model; `InputError` if it is not for that model."""
    tokenizer = load_tokenizer(folder, remedy=remedy)
    with library_errors("the tokenizer cannot be read", where=folder, remedy=remedy):
        problems = list(_problems(tokenizer, vocab_size, folder, remedy))
    raise_together(InputError, problems, "the tokenizer is not for this model", where=folder)
    return tokenizer


def unusable_note(tokenizer: Any, vocab_size: int) -> str | None:
    """A note on added tokens beyond the embedding; None if there are none."""
    beyond = _beyond(tokenizer, vocab_size)
    if not beyond:
        return None
    named = ", ".join(f"{text!r} ({token})" for text, token in list(beyond.items())[:_SHOWN])
    more = f" and {len(beyond) - _SHOWN} more" if len(beyond) > _SHOWN else ""
    return f"the tokenizer has tokens beyond the model's {vocab_size}, prompts with them are refused: {named}{more}"


def first_beyond(token_ids: Sequence[int], *, vocab_size: int) -> tuple[int, int] | None:
    """Position and id of the first token without a row in the embedding; None if all have one."""
    for place, token in enumerate(token_ids):
        if not 0 <= token < vocab_size:
            return place, token
    return None


def beyond_message(found: tuple[int, int], *, vocab_size: int, tokenizer: Any = None) -> str:
    """Message for a result of `first_beyond`; with a tokenizer, it includes the token's text."""
    place, token = found
    text = f" ({tokenizer.convert_ids_to_tokens(token)!r})" if tokenizer is not None else ""
    return f"token {place + 1} has the id {token}{text}, outside the model's vocabulary of {vocab_size}"


def _problems(tokenizer: Any, vocab_size: int, folder: Path, remedy: str) -> Iterator[Problem]:
    count = _own_size(tokenizer)
    if count > vocab_size:
        what = f"the tokenizer has {count} tokens, the model {vocab_size}"
        yield Problem(what, str(folder), "its tokens would have no row in the embedding", remedy)
        return
    beyond = _beyond(tokenizer, vocab_size)
    prefix = [token for token in tokenizer.encode("") if token >= vocab_size]
    if prefix:
        what = f"the tokenizer adds the token {prefix[0]} to every text, beyond the model's {vocab_size}"
        yield Problem(what, str(folder), None, remedy)
    used = _in_templates(tokenizer, beyond)
    if used:
        what = f"the chat template writes {', '.join(map(repr, used))}, beyond the model's {vocab_size} tokens"
        better = f"take it out of the template, or {remedy}"
        yield Problem(what, str(folder), "every chat would contain a token without a row in the embedding", better)


def _own_size(tokenizer: Any) -> int:
    """One more than the highest id of the vocabulary, without added tokens."""
    fast = getattr(tokenizer, "backend_tokenizer", None)
    if fast is None:
        return int(tokenizer.vocab_size)
    return 1 + max(fast.get_vocab(with_added_tokens=False).values(), default=-1)


def _beyond(tokenizer: Any, vocab_size: int) -> dict[str, int]:
    added: Mapping[str, int] = tokenizer.get_added_vocab()
    return {text: token for text, token in sorted(added.items(), key=lambda item: item[1]) if token >= vocab_size}


def _in_templates(tokenizer: Any, beyond: Mapping[str, int]) -> list[str]:
    """Those of the tokens that occur in the chat templates, as text or by name. Nothing is rendered."""
    if not beyond:
        return []
    templates = tokenizer.chat_template
    sources = templates.values() if isinstance(templates, dict) else [templates]
    texts, names = [], set()
    for source in sources:
        if isinstance(source, str):
            found_texts, found_names = _parts(source)
            texts += found_texts
            names |= found_names
    used = {text for text in beyond if any(text in each for each in texts)}
    for name in _SPECIAL_NAMES:
        if name in names and getattr(tokenizer, name, None) in beyond:
            used.add(str(getattr(tokenizer, name)))
    return sorted(used)


def _parts(template: str) -> tuple[list[str], set[str]]:
    """The texts and names in a Jinja template; the whole source if it is not a valid template."""
    from jinja2 import Environment, TemplateError

    try:
        tokens = list(Environment(autoescape=False).lex(template))
    except TemplateError:
        return [template], set()
    texts = [value for _, kind, value in tokens if kind in ("data", "string")]
    return texts, {value for _, kind, value in tokens if kind == "name"}
