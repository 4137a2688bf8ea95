"""Are all weights finite? A single NaN or infinity in a checkpoint makes every output meaningless, without an error.

The check is on bits, not values: a 16- or 32-bit float is finite unless all bits of its exponent are set, and comparing
integers is as fast as reading memory.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from trtllm_redrafter.checkpoint.names import DRAFTER
from trtllm_redrafter.checkpoint.reader import Checkpoint
from trtllm_redrafter.errors import Problem

_EXPONENTS: dict[torch.dtype, tuple[torch.dtype, int]] = {
    torch.bfloat16: (torch.int16, 0x7F80),
    torch.float16: (torch.int16, 0x7C00),
    torch.float32: (torch.int32, 0x7F800000),
}
_CHUNK = 2**20


def non_finite_count(tensor: Tensor) -> int:
    """Number of NaN or infinite values in a contiguous tensor; 0 for dtypes without such values."""
    if tensor.dtype not in _EXPONENTS or tensor.numel() == 0:
        return 0
    integer, exponent = _EXPONENTS[tensor.dtype]
    found = 0
    for part in torch.split(tensor.reshape(-1).view(integer), _CHUNK):
        found += int(part.bitwise_and(exponent).eq_(exponent).sum())
    return found


def finite_problems(checkpoint: Checkpoint) -> Iterator[Problem]:
    """A problem for every stored tensor with values that are not finite. Reads all weights, in chunks."""
    for file in checkpoint.ranks:
        for name, tensor in file.items():
            count = non_finite_count(tensor.load())
            if count:
                role = "drafter" if name.startswith(DRAFTER) else "base model"
                what = f"tensor {name!r} has {count} value(s) that are not finite (NaN or infinite)"
                yield Problem(what, str(file.path), f"the {role} it was made from has them, or the file is damaged",
                              f"use an intact {role} and convert again")  # fmt: skip
