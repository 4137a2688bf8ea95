"""The tokenizer of a model: its files, its identity, the only place where transformers loads one, and does it fit?

Directories written by transformers 4 and 5 can be read with either version. Code in a directory is never run, there is
no prompt for it either, and whatever the libraries raise becomes one message with a remedy.

    tokenizer = tokenizer_for(Path("engine/tokenizer"), vocab_size=49152, remedy="build with --tokenizer DIR")
    token = first_beyond(ids, vocab_size=49152)      # None if all are in range

A tokenizer may have a few added tokens beyond the model's embedding (such as a padding token) that the model's texts
never contain; a prompt with one of them is refused. If the vocabulary itself is larger than the embedding, or the chat
template or a prefix uses such tokens, the tokenizer belongs to another model.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from trtllm_redrafter.errors import InputError, Problem, RedrafterError, raise_together
from trtllm_redrafter.fsio import read_json, sha256_file

GENERATION_CONFIG = "generation_config.json"
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    GENERATION_CONFIG,
)
"""Files that `build` and `run` need besides the weights: tokenizer, chat template, end tokens."""

IDENTITY_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")
"""The first of these that exists identifies the tokenizer."""

MODEL_CONFIG = "config.json"
SETTINGS = "tokenizer_config.json"
FAST_FILE = "tokenizer.json"
_SPECIAL_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
"""Special tokens that a chat template can refer to."""

_MESSAGE_CHARS = 300
"""Characters of a library's message to show."""

_LISTED = 8
"""Tokens beyond the embedding that a note names."""


def tokenizer_files(path: Path) -> list[Path]:
    """The tokenizer's files in `path`, in the table's order; [] if there are none.

    The model's config.json goes with them: `trtllm-serve` reads the model type from the tokenizer's directory, and
    transformers the tokenizer's class where the tokenizer does not name it. (A TensorRT-LLM checkpoint has a file of
    that name too.)
    """
    found = [path / name for name in TOKENIZER_FILES if (path / name).is_file()]
    return [*found, path / MODEL_CONFIG] if found and has_model_config(path) else found


def has_model_config(path: Path) -> bool:
    """Is the config.json in `path` a transformers config, which names the model type?"""
    file = path / MODEL_CONFIG
    try:
        return file.is_file() and isinstance(read_json(file).get("model_type"), str)
    except InputError:
        return False  # code that needs the file reports what is wrong with it


def has_tokenizer(path: Path) -> bool:
    """Is there a tokenizer in `path`? (generation_config.json alone does not count.)"""
    return any((path / name).is_file() for name in IDENTITY_FILES)


def tokenizer_sha256(path: Path) -> str | None:
    """SHA-256 of the file that defines the vocabulary; None for a directory without a tokenizer."""
    for name in IDENTITY_FILES:
        if (path / name).is_file():
            return sha256_file(path / name)
    return None


def load_tokenizer(folder: Path, *, remedy: str) -> Any:
    """The transformers tokenizer in `folder`; `InputError` with `remedy` if it cannot be loaded."""
    if not has_tokenizer(folder):
        why = f"it has none of {', '.join(IDENTITY_FILES)}"
        raise InputError("there is no tokenizer here", where=folder, why=why, remedy=remedy)
    with library_errors("the tokenizer cannot be loaded", where=folder, remedy=remedy):
        try:
            return _load(folder, remedy)
        except Exception:
            _check_fast_file(folder)  # raises its own error; transformers would try other files, and report those
            raise


@contextmanager
def library_errors(what: str, *, where: str | Path, remedy: str) -> Iterator[None]:
    """Turn whatever a library raises into an `InputError`, except our own errors and interrupts."""
    try:
        yield
    except (RedrafterError, MemoryError):
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":  # of the Rust tokenizers
            raise
        why = " ".join(f"{type(error).__name__}: {error}".split())[:_MESSAGE_CHARS]
        better = f"install the package it names, or {remedy}" if isinstance(error, ImportError) else remedy
        raise InputError(what, where=where, why=why, remedy=better) from error


def _check_fast_file(folder: Path) -> None:
    """Raise the `tokenizers` library's own error for tokenizer.json, if there is one."""
    from tokenizers import Tokenizer

    if (folder / FAST_FILE).is_file():
        Tokenizer.from_file(str(folder / FAST_FILE))


def _load(folder: Path, remedy: str) -> Any:
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    settings = read_json(folder / SETTINGS) if (folder / SETTINGS).is_file() else {}
    options: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False, **_translated(settings)}
    if _is_known(settings.get("tokenizer_class")):
        return AutoTokenizer.from_pretrained(str(folder), **options)
    if settings.get("auto_map"):
        raise InputError(
            "the tokenizer needs custom Python code, which is never run",
            where=folder / SETTINGS,
            why=f"tokenizer_class is {settings.get('tokenizer_class')!r} with an auto_map",
            remedy=f"save it as a plain tokenizer.json (transformers' PreTrainedTokenizerFast), or {remedy}",
        )
    if not (folder / FAST_FILE).is_file():
        return AutoTokenizer.from_pretrained(str(folder), **options)  # by config.json's model_type, if it is there
    with _without_warnings():  # of a class name that this transformers does not know
        return PreTrainedTokenizerFast.from_pretrained(str(folder), **options)


def _is_known(name: object) -> bool:
    """Does the installed transformers have a tokenizer class of this name? (5 writes some that 4 lacks.)"""
    from transformers.models.auto.tokenization_auto import tokenizer_class_from_name

    if not isinstance(name, str) or not name:
        return False
    return any(tokenizer_class_from_name(each) is not None for each in (name, f"{name}Fast"))


def _translated(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Overrides of the file's settings, so that both versions of transformers read those of transformers 5.

    In 5, `extra_special_tokens` is the list that 4 calls `additional_special_tokens`; in 4 it is an object with another
    meaning. Tokens written as objects are passed as text: tokenizer.json says how they match.
    """
    import transformers

    extra = settings.get("extra_special_tokens")
    if not isinstance(extra, list):
        return {}
    if int(transformers.__version__.split(".")[0]) >= 5:
        return {"extra_special_tokens": [_content(token) for token in extra]}
    older = settings.get("additional_special_tokens")
    tokens = [_content(token) for token in [*extra, *(older if isinstance(older, list) else [])]]
    return {"extra_special_tokens": {}, "additional_special_tokens": list(dict.fromkeys(tokens))}


def _content(token: Any) -> str:
    return str(token["content"]) if isinstance(token, dict) and "content" in token else str(token)


@contextmanager
def _without_warnings() -> Iterator[None]:
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


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
    named = ", ".join(f"{text!r} ({token})" for text, token in list(beyond.items())[:_LISTED])
    more = f" and {len(beyond) - _LISTED} more" if len(beyond) > _LISTED else ""
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
