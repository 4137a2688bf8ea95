"""The two compilers of TensorRT networks: which GPUs each knows, how it is imported, what it can compile.

`tensorrt_rtx` compiles anywhere, a machine without a GPU included, and finishes its kernels on the card that runs the
engine. `tensorrt` measures kernels while it compiles: it needs the GPU itself. Both have the same Python interface.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from trtllm_redrafter.errors import BackendError, MismatchError
from trtllm_redrafter.planning.gpus import Gpu

RTX, TENSORRT = "tensorrt-rtx", "tensorrt"

AUTO = "auto"


@dataclass(frozen=True)
class CompilerOptions:
    """What only this backend takes. `gpu`: a row of `planning.gpus`; `compiler`: one of `COMPILERS`, or "auto"."""

    gpu: str
    compiler: str
    weights: str = "inputs"
    """`inputs`: they stay in the checkpoint; `inside`: each plan holds them."""


@dataclass(frozen=True)
class Compiler:
    """One compiler. `capabilities`: compute capabilities it compiles for; None: that of the GPU in this machine."""

    name: str
    load: Callable[[], Any]
    """Imports its module; `ImportError` where it is missing."""
    capabilities: tuple[tuple[int, int], ...] | None
    tested: str | None
    """The version that this package's engines have been compiled with; None: never."""


def _load_rtx() -> Any:
    try:
        import tensorrt_rtx  # the metapackage, where it could be built
    except ImportError:
        import tensorrt_rtx_bindings as tensorrt_rtx
        import tensorrt_rtx_libs  # noqa: F401  # loads the library that the bindings want
    return tensorrt_rtx


def _load_tensorrt() -> Any:
    import tensorrt

    return tensorrt


COMPILERS: Mapping[str, Compiler] = {
    RTX: Compiler(
        RTX,
        _load_rtx,
        ((7, 5), (8, 0), (8, 6), (8, 9), (12, 0), (12, 1)),
        tested="1.7.1.116",
    ),
    TENSORRT: Compiler(TENSORRT, _load_tensorrt, None, tested=None),
}

_DTYPE_CAPABILITY: Mapping[str, tuple[int, int]] = {"bfloat16": (8, 0), "float8": (8, 9)}
"""The first compute capability that has arithmetic for a dtype; others have it everywhere."""

_COMPILE_BYTES, _LAYER_BYTES = 250 * 10**6, 10 * 10**6

_FUSED_HEADS = range(16, 257, 8)
"""Head sizes with a compiled attention kernel; all of them were compiled."""


def choose_compiler(gpu: Gpu, dtype: str, asked: str = AUTO) -> Compiler:
    """The compiler for a GPU; `MismatchError` where it does not know the card, or the card not the dtype."""
    needed = _DTYPE_CAPABILITY.get(dtype)
    if needed is not None and gpu.compute_capability < needed:
        raise MismatchError(
            f"{gpu.title} cannot compute in {dtype}",
            why=f"its compute capability is {capability_text(gpu.compute_capability)}, not {capability_text(needed)}",
            remedy="convert with --dtype float16" if dtype == "bfloat16" else "convert the base that is not quantized",
        )
    known = COMPILERS[RTX].capabilities or ()
    name = asked if asked != AUTO else (RTX if gpu.compute_capability in known else TENSORRT)
    compiler = COMPILERS[name]
    if compiler.capabilities is not None and gpu.compute_capability not in compiler.capabilities:
        raise MismatchError(
            f"{name} does not compile for {gpu.title}",
            why=f"the card has compute capability {capability_text(gpu.compute_capability)}; known are "
            f"{', '.join(map(capability_text, compiler.capabilities))}",
            remedy=f"use --compiler {TENSORRT} on a host with that GPU, or choose another --gpu",
        )
    return compiler


def import_compiler(compiler: Compiler) -> Any:
    """The compiler's module; `BackendError` when it is not installed, or too old to update a KV cache in place."""
    remedy = f"pip install 'trtllm-redrafter[{compiler.name}]'"
    try:
        module = compiler.load()
    except ImportError as error:
        raise BackendError(f"{compiler.name} is not installed", why=str(error), remedy=remedy) from error
    if not hasattr(module.INetworkDefinition, "add_kv_cache_update"):
        why = "it cannot update a KV cache in place; TensorRT 10.15 and TensorRT-RTX 1.7 can"
        raise BackendError(f"{compiler.name} {module.__version__} is too old", why=why, remedy=remedy)
    return module


def check_host(compiler: Compiler, gpu: Gpu) -> None:
    """`BackendError` where a compiler that measures on the GPU does not find the GPU it is to compile for."""
    if compiler.capabilities is not None:
        return
    import torch

    found = torch.cuda.get_device_capability() if torch.cuda.is_available() else None
    if found != gpu.compute_capability:
        here = "no GPU" if found is None else f"one of compute capability {capability_text(found)}"
        raise BackendError(
            f"{compiler.name} cannot compile for {gpu.title} on this machine",
            why=f"it measures its kernels on the GPU itself; here is {here}",
            remedy=f"build on a host with {gpu.title}; `build --dry-run` works here",
        )


def compile_bytes(layers: int) -> int:
    """Main memory that compiling one network of a model takes, rounded up from measurements.

    The weights do not count, since they are inputs: 32 layers of an 8B model take what 30 layers of a 135M model do.
    """
    return _COMPILE_BYTES + _LAYER_BYTES * layers


def fuses_attention(dtype: str, head_size: int) -> bool:
    """Is there a compiled kernel for attention of this kind? Without one it is computed from products and a softmax."""
    return dtype != "float32" and head_size in _FUSED_HEADS


def capability_text(capability: tuple[int, int]) -> str:
    return f"{capability[0]}.{capability[1]}"
