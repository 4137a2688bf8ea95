"""Decoding options: what a recipe, a line of a prompt file and a Python call can ask for.

The fields of `SamplingParams` are the one list of them. A field's type says how a line's JSON value is checked.

    replace(defaults, **sampling_values({"prompt": "…", "temperature": 0.7, "stop": "\\n"}))
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, get_type_hints

from trtllm_redrafter.errors import InputError, Problem, brief

MAX_TEMPERATURE = 1e38
"""Beyond what flattens any distribution, and near the limit of float32."""


@dataclass(frozen=True)
class SamplingParams:
    """How tokens are chosen. `temperature` 0 is greedy; `top_k` 0 and `top_p` 1 switch the filters off.

    The order is temperature, then top-k, then top-p on what is left, as in transformers and vLLM. `seed`
    fixes one uniform number per output position, so that the same seed gives the same text with and without
    drafting. `stop` strings end the text before their first occurrence, wherever token borders fall, and may have
    special tokens in them; `stop_token_ids` end it like end tokens, `ignore_eos` or not. `skip_special_tokens` False
    leaves special tokens in the text.
    """

    max_tokens: int
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False
    stop_token_ids: tuple[int, ...] = ()
    skip_special_tokens: bool = True

    @property
    def greedy(self) -> bool:
        return self.temperature == 0.0

    def problems(self) -> list[Problem]:
        """All values of a wrong type or out of range, for one message."""
        found = []

        def check(name: str, types: tuple[type, ...], remedy: str, allowed: Callable[[Any], bool]) -> None:
            value = getattr(self, name)
            good = isinstance(value, types) and not isinstance(value, bool)
            if not good or not allowed(value):
                found.append(Problem(f"{name} is {brief(value)}", remedy=remedy))

        whole, real = (int,), (int, float)
        check("max_tokens", whole, "ask for at least one token", lambda v: v >= 1)
        check("temperature", real, "use 0 for greedy, or a positive number", lambda v: 0.0 <= v <= MAX_TEMPERATURE)
        check("top_k", whole, "use 0 to switch it off, or a number below 2**31", lambda v: 0 <= v < 2**31)
        check("top_p", real, "use a number above 0 and up to 1", lambda v: 0.0 < v <= 1.0)
        if self.seed is not None:
            check("seed", whole, "use 0 <= seed < 2**63", lambda v: 0 <= v < 2**63)
        if any(not isinstance(s, str) or not s for s in self.stop):
            found.append(Problem("a stop string is empty", remedy="leave it out"))
        if any(type(token) is not int or token < 0 for token in self.stop_token_ids):
            ids = brief(self.stop_token_ids)
            found.append(Problem(f"stop_token_ids are {ids}", remedy="give token ids, whole numbers from 0"))
        return found


def sampling_values(values: Mapping[str, Any]) -> dict[str, Any]:
    """The options that a line gives, with their types checked (`InputError`). The engine checks their ranges."""
    hints, found = get_type_hints(SamplingParams), {}
    for name, hint in hints.items():
        if name not in values:
            continue
        value = [values[name]] if name == "stop" and isinstance(values[name], str) else values[name]
        is_list, is_right, remedy = _TYPES[hint]
        if value is None and is_list:
            continue  # the default
        if not is_right(value):
            raise InputError(f"`{name}` is {brief(value)}", remedy=remedy.format(name))
        found[name] = tuple(value) if is_list else value
    return found


def _list_of(kind: type) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list) and all(type(item) is kind for item in value)


_TYPES: dict[Any, tuple[bool, Callable[[Any], bool], str]] = {
    bool: (False, lambda value: type(value) is bool, "write true or false"),
    int: (False, lambda value: type(value) is int, "give a whole number"),
    int | None: (False, lambda value: value is None or type(value) is int, "give a whole number"),
    float: (False, lambda value: type(value) in (int, float), "give a number"),
    tuple[str, ...]: (True, _list_of(str), 'give a string or a list of strings, as {{"{}": ["…"]}}'),
    tuple[int, ...]: (True, _list_of(int), 'give a list of token ids, as {{"{}": [2]}}'),
}
"""Type of a field: is it a list, is a JSON value of that type, and what to write instead."""
