"""Options of decoding as lines of prompt files give them; an option that does not exist, to see what it would need."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, get_type_hints

import pytest

from trtllm_redrafter.errors import InputError
from trtllm_redrafter.prompts.messages import KEYS
from trtllm_redrafter.prompts.sampling import _TYPES, SamplingParams, sampling_values
from trtllm_redrafter.settings.schema import RunSection


@dataclass(frozen=True)
class WithNewOption(SamplingParams):
    new_option: float = 0.0


def test_every_option_can_be_given() -> None:
    names = {field.name for field in fields(SamplingParams)}
    assert names - {"ignore_eos"} <= RunSection.model_fields.keys()  # the one for measurements only
    assert names <= set(KEYS) and set(get_type_hints(SamplingParams).values()) <= _TYPES.keys()


def test_values() -> None:
    line = {"prompt": "a", "seed": None, "top_p": 1, "stop": "x", "stop_token_ids": [2], "ignore_eos": True}
    assert sampling_values(line) == {
        "seed": None, "top_p": 1, "stop": ("x",), "stop_token_ids": (2,), "ignore_eos": True
    }  # fmt: skip
    assert sampling_values({"stop": None, "stop_token_ids": None}) == {}
    assert sampling_values({"stop": ["a", "b"]}) == {"stop": ("a", "b")}


@pytest.mark.parametrize(
    ("name", "value", "remedy"),
    [
        ("max_tokens", 1.5, "a whole number"),
        ("max_tokens", None, "a whole number"),
        ("top_k", True, "a whole number"),
        ("temperature", "1", "a number"),
        ("seed", 0.5, "a whole number"),
        ("stop", ["x", 1], '{"stop": ["…"]}'),
        ("stop_token_ids", [True], '{"stop_token_ids": [2]}'),
        ("ignore_eos", None, "true or false"),
    ],
)
def test_refusals(name: str, value: Any, remedy: str) -> None:
    with pytest.raises(InputError, match=f"`{name}` is ") as caught:
        sampling_values({name: value})
    assert remedy in str(caught.value)
