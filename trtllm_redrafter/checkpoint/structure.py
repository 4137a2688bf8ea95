"""Do a checkpoint's tensors fit its config.json? The same checks for `build`, loading and `verify`.

TensorRT-LLM's loader only logs a wrong dtype, ignores extra tensors and does not notice a missing drafter LM head; a
build then fails hours later, or never. Only headers are read, and with several ranks a few pages of each tensor.
"""

from __future__ import annotations

from collections.abc import Iterator

from trtllm_redrafter.checkpoint.layout import DTYPE_NAMES, divisibility_problems, rank_slice
from trtllm_redrafter.checkpoint.names import LM_HEAD
from trtllm_redrafter.checkpoint.quantization import DRAFTER_EXCLUDE, is_excluded
from trtllm_redrafter.checkpoint.ranks import rank_problems
from trtllm_redrafter.checkpoint.reader import Checkpoint
from trtllm_redrafter.checkpoint.stored_tensor import StoredTensor
from trtllm_redrafter.errors import InputError, Problem, limited, raise_together

REMEDY = "convert again, or restore the file from an intact copy"


def require_sound(checkpoint: Checkpoint) -> None:
    """`InputError` for all that `verify` finds without reading the weights; called first by `build` and `load`."""
    problems = limited(structure_problems(checkpoint))
    what = "the checkpoint's files do not fit its config.json"
    raise_together(InputError, problems, what, where=checkpoint.path, remedy=REMEDY)


def structure_problems(checkpoint: Checkpoint) -> list[Problem]:
    """Everything in the files that contradicts config.json, and signs that rank files were mixed up.

    Reads headers, and with several ranks a few pages of each tensor.
    """
    config = checkpoint.config
    problems = divisibility_problems(config, str(checkpoint.path))
    if problems:
        return problems
    for rank in range(len(checkpoint.ranks)):
        problems += _rank_problems(checkpoint, rank)
        problems += _surplus_problems(checkpoint, rank)
    problems += () if problems else rank_problems(checkpoint)
    excludes = config.quantization.get("exclude_modules")
    if config.drafter is not None and config.quant_algo is not None and not is_excluded("drafter.input_proj", excludes):
        why = "TensorRT-LLM would build the drafter's 16-bit layers as quantized ones"
        remedy = f"add {DRAFTER_EXCLUDE!r} to quantization.exclude_modules in config.json"
        problems.append(Problem("the drafter is not excluded from quantization", str(checkpoint.path), why, remedy))
    return problems


def _rank_problems(checkpoint: Checkpoint, rank: int) -> Iterator[Problem]:
    file = checkpoint.ranks[rank]
    where = str(file.path)
    for name, spec in checkpoint.specs.items():
        info = file.get(name)
        if info is None:
            if not spec.optional:
                why = "TensorRT-LLM's loader does not notice" if name.endswith("." + LM_HEAD) else None
                yield Problem(f"tensor {name!r} is missing", where, why, REMEDY)
        elif spec.checked:
            expected = rank_slice(spec, checkpoint.config, rank).shape(spec.shape)
            yield from _tensor_problems(info, spec.dtype, expected, where)
        elif info.dtype not in (*DTYPE_NAMES.values(), "I8", "U8", "F8_E4M3"):
            yield Problem(f"tensor {name!r} has the dtype {info.dtype}", where, None, REMEDY)


def _surplus_problems(checkpoint: Checkpoint, rank: int) -> Iterator[Problem]:
    file = checkpoint.ranks[rank]
    where = str(file.path)
    if all(spec.checked for spec in checkpoint.specs.values()):
        for name in sorted(set(file) - set(checkpoint.specs)):
            why = "TensorRT-LLM would ignore it"
            yield Problem(f"tensor {name!r} does not belong into this checkpoint", where, why, REMEDY)


def _tensor_problems(info: StoredTensor, dtype: str, shape: tuple[int, ...], where: str) -> Iterator[Problem]:
    fp8_as_int8 = dtype == "F8_E4M3" and info.dtype == "I8"
    if info.dtype != dtype and not fp8_as_int8:
        why = f"it is {info.dtype}, config.json implies {dtype}; TensorRT-LLM only logs this and fails later"
        yield Problem(f"tensor {info.name!r} has the wrong dtype", where, why, REMEDY)
    if info.shape != shape:
        why = f"it is {list(info.shape)}, config.json implies {list(shape)}"
        yield Problem(f"tensor {info.name!r} has the wrong shape", where, why, REMEDY)
