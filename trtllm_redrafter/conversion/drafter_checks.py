"""Does a drafter's file hold what its config.json promises? Problems are listed, not raised.

    list(tensor_problems(config, tensors, factor=None, tied=False, path=path))     # [] for a complete drafter

Nothing may be missing and nothing may be left over: a part that is dropped in silence changes what is drafted, and
shows only as a low acceptance.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from trtllm_redrafter.checkpoint.names import LM_HEAD
from trtllm_redrafter.conversion.sources import Source
from trtllm_redrafter.errors import Problem
from trtllm_redrafter.redrafter.config import DrafterConfig

FACTOR = "lm_head_factor.weight"


def tensor_problems(
    config: DrafterConfig, tensors: Mapping[str, Source], factor: Source | None, tied: bool, path: Path
) -> Iterator[Problem]:
    expected = config.parameter_shapes()
    if tied:
        del expected[LM_HEAD]
        yield from _tied_problems(config, tensors, factor, path)
    elif factor is not None:
        remedy = "set tie_lm_head to true in its config.json"
        yield Problem(f"{FACTOR!r} is there, but tie_lm_head is not true", str(path), None, remedy)
    for name, shape in expected.items():
        source = tensors.get(name)
        if source is None:
            why = "TensorRT-LLM would load such a drafter without an error" if name == LM_HEAD else None
            yield Problem(f"the drafter has no {name!r}", str(path), why, "use the complete drafter")
        elif source.shape != shape:
            why = f"its config.json implies {list(shape)}, the file has {list(source.shape)}"
            yield Problem(f"the drafter's {name!r} has the wrong shape", str(path), why, "use the right config.json")
        elif source.dtype not in ("F16", "BF16", "F32"):
            why = f"it is {source.dtype}; F16, BF16 or F32 is needed"
            yield Problem(f"the drafter's {name!r} is not a floating tensor", str(path), why, "save it as bfloat16")
    allowed = {*expected, LM_HEAD} if tied else set(expected)
    for name in sorted(set(tensors) - allowed):
        why = "with rnn false or exit_dim twice the hidden size, some parts do not exist"
        yield Problem(f"the drafter has {name!r}, its config.json has no place for it", str(path), why, "correct it")


def _tied_problems(
    config: DrafterConfig, tensors: Mapping[str, Source], factor: Source | None, path: Path
) -> Iterator[Problem]:
    if LM_HEAD in tensors:
        yield Problem("tie_lm_head is true, but the file has an LM head", str(path), None, "remove one of the two")
    width = (config.hidden_size, config.exit_dim)
    if factor is None and config.hidden_size != config.exit_dim:
        yield Problem(
            f"tie_lm_head is true, but exit_dim {config.exit_dim} is not the hidden size {config.hidden_size}",
            str(path),
            f"the base's LM head has {config.hidden_size} columns, and there is no {FACTOR!r}",
            "use the complete drafter",
        )
    elif factor is not None and (factor.shape != width or factor.dtype not in ("F16", "BF16", "F32")):
        why = f"floating {list(width)} is needed, the file has {factor.dtype} {list(factor.shape)}"
        yield Problem(f"{FACTOR!r} does not fit", str(path), why, "use the right config.json")
