"""The structures of kernels/interface.h for ctypes, and calls that turn a refusal into an exception.

Every function of the library returns null or a message. Tensors are passed with their number of elements, which the
kernels compare with what the sizes ask for.
"""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor

_POINTER = ctypes.c_void_p
_INT = ctypes.c_int32


class TensorArgument(ctypes.Structure):
    """`RedrafterTensor`: address and number of elements; both zero where there is none."""

    _fields_ = [("data", _POINTER), ("count", ctypes.c_int64)]

    @classmethod
    def of(cls, values: Tensor | None) -> TensorArgument:
        """The caller keeps `values` alive for as long as the kernels may read them."""
        if values is None:
            return cls(None, 0)
        if not values.is_contiguous() or values.device.type != "cpu":
            raise ValueError(
                f"the kernels read contiguous tensors of the CPU, not {values.stride()} on {values.device}"
            )
        return cls(values.data_ptr(), values.numel())


def _structure(name: str, document: str, **fields: str) -> type[ctypes.Structure]:
    """A structure from names grouped by type."""
    kinds: dict[str, Any] = {"ints": _INT, "floats": ctypes.c_float, "pointers": _POINTER, "tensors": TensorArgument}
    members = [(field, kinds[kind]) for kind, names in fields.items() for field in names.split()]
    return type(name, (ctypes.Structure,), {"__doc__": document, "_fields_": members})


ModelConfig = _structure(
    "ModelConfig",
    "`RedrafterConfig`: sizes of a model, its cache and its steps.",
    ints="hidden heads kv_heads head_size intermediate layers vocab max_slots max_seq max_rows threads",
    floats="epsilon",
)
LayerArguments = _structure(
    "LayerArguments",
    "`RedrafterLayer`: one layer's weights.",
    tensors="qkv dense gate up down input_norm post_norm q_norm k_norm qkv_bias dense_bias",
)
EndArguments = _structure(
    "EndArguments",
    "`RedrafterEnds`: what comes before and after the layers.",
    tensors="embedding final_norm head cosine sine",
)
StepArguments = _structure(
    "StepArguments",
    "`RedrafterStep`: rows in, states and logits out.",
    pointers="rows paths logit_rows hidden logits best",
    ints="count path_count path_width logit_count",
)
CommitArguments = _structure(
    "CommitArguments", "`RedrafterCommit`: nodes to keep.", pointers="path", ints="slot base count"
)
DrafterArguments = _structure(
    "DrafterArguments",
    "`RedrafterDrafter`: a drafter's sizes and weights without its blocks.",
    ints="hidden width layers max_rows head_rows",
    tensors="rnn_u rnn_bias rnn_w input_proj input_bias factor head token_of_column",
)
BlockArguments = _structure("BlockArguments", "`RedrafterBlock`: one residual block.", tensors="weight bias")
SearchArguments = _structure(
    "SearchArguments",
    "`RedrafterSearch`: contexts in, beams out.",
    pointers="context first tokens paths",
    ints="batch beams length",
)

_MESSAGE = ctypes.c_char_p
SIGNATURES: dict[str, tuple[Any, list[Any]]] = {
    "redrafter_isa": (ctypes.c_char_p, []),
    "redrafter_pack": (_MESSAGE, [_POINTER, _INT, _INT, _POINTER]),
    "redrafter_create": (_MESSAGE, [_POINTER, _POINTER]),
    "redrafter_destroy": (None, [_POINTER]),
    "redrafter_threads": (_INT, [_POINTER]),
    "redrafter_set_layer": (_MESSAGE, [_POINTER, _INT, _POINTER]),
    "redrafter_set_ends": (_MESSAGE, [_POINTER, _POINTER]),
    "redrafter_forward": (_MESSAGE, [_POINTER, _POINTER]),
    "redrafter_commit": (_MESSAGE, [_POINTER, _POINTER]),
    "redrafter_clear": (_MESSAGE, [_POINTER, _INT, _INT, _INT]),
    "redrafter_drafter_create": (_MESSAGE, [_POINTER, _POINTER, _POINTER]),
    "redrafter_drafter_set_layer": (_MESSAGE, [_POINTER, _INT, _POINTER]),
    "redrafter_drafter_destroy": (None, [_POINTER, _POINTER]),
    "redrafter_draft": (_MESSAGE, [_POINTER, _POINTER, _POINTER]),
}


def declare(library: ctypes.CDLL) -> None:
    """Tell ctypes the types of all functions; `AttributeError` where the library lacks one."""
    for name, (result, arguments) in SIGNATURES.items():
        function = getattr(library, name)
        function.restype = result
        function.argtypes = arguments


def call(function: Any, *arguments: Any) -> None:
    """Call a function of the library.

    Structures are passed by reference. Raises `MemoryError` where memory is missing, `ValueError` with the kernels' own
    words for arguments that do not fit each other.
    """
    passed = [ctypes.byref(a) if isinstance(a, (ctypes.Structure, _POINTER)) else a for a in arguments]
    message = function(*passed)
    if message is not None:
        text = message.decode()
        raise MemoryError(text) if text.startswith("not enough memory") else ValueError(f"{function.__name__}: {text}")


def as_float32(values: Tensor | None) -> Tensor | None:
    """A copy in float32; None stays None."""
    return None if values is None else values.detach().to(torch.float32, copy=True).contiguous()
