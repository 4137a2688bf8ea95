"""CUDA kernels compiled at run time by NVRTC, which PyTorch's CUDA wheels bring along, and launched by the driver.

Nothing has to be installed for them: no toolkit, no host compiler, no headers. A kernel is compiled once per set of
constants and GPU; the result is kept in the user's cache (`native.compiled`). Launches go to PyTorch's current stream,
so that graphs capture them, and may overlap the kernel before (programmatic dependent launch).

    kernel = compiled("norm.cu", "add_norm", {"WIDTH": 1536}, "sm_90a")
    kernel.launch((rows,), (256,), [pointer(x), ...])
"""

from __future__ import annotations

import ctypes
import hashlib
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

from trtllm_redrafter.backends.torch.native.compiled import NativeUnavailable, check_cache, keep, read_intact

SOURCES = Path(__file__).parent


class CudaUnavailable(Exception):
    """These kernels cannot be used here; the text says why."""


def unavailable() -> str | None:
    """Why kernels cannot be compiled or launched here, or None."""
    try:
        from cuda.bindings import driver, nvrtc

        for version in (nvrtc.nvrtcVersion, driver.cuDriverGetVersion):
            _checked(version())
    except (ImportError, RuntimeError, OSError, CudaUnavailable) as error:
        return f"cuda-bindings, NVRTC or the driver cannot be used ({error})"
    return None


def _checked(result: tuple[Any, ...]) -> Any:
    """The values of a call of cuda.bindings, whose first is a status."""
    status, *values = result
    if int(status) != 0:
        raise CudaUnavailable(f"{type(status).__name__}: {status.name}")
    return values[0] if len(values) == 1 else values


def wgmma_source(rows: int) -> str:
    """The tensor cores' product of 64 weight rows by `rows` rows of x, 16 columns, as a header.

    Operands lie in shared memory in rows of 128 bytes, swizzled; a descriptor names a tile's address in units of 16
    bytes, the distance of its groups of eight rows (1,024 bytes) and the swizzle.
    """
    count = rows // 2
    registers = ", ".join(f"%{i}" for i in range(count))
    outputs = ", ".join(f'"+f"(d[{i}])' for i in range(count))
    return f"""#pragma once
__device__ __forceinline__ u64 descriptor(u32 address) {{
    return (u64)((address & 0x3ffffu) >> 4) | (1ull << 16) | (64ull << 32) | (1ull << 62);
}}
__device__ __forceinline__ void wgmma_fence() {{ asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }}
__device__ __forceinline__ void wgmma_commit() {{ asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }}
template <int pending>
__device__ __forceinline__ void wgmma_wait() {{
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(pending) : "memory");
}}
__device__ __forceinline__ void wgmma(float (&d)[{count}], u64 a, u64 b) {{
    asm volatile("wgmma.mma_async.sync.aligned.m64n{rows}k16.f32." MMA_TYPE "." MMA_TYPE
                 " {{{registers}}}, %{count}, %{count + 1}, 1, 1, 1, 0, 0;"
                 : {outputs} : "l"(a), "l"(b));
}}
"""


def cubin(file: str, constants: Mapping[str, int | None], architecture: str, headers: Mapping[str, str]) -> bytes:
    """Machine code of one source file, from the user's cache where it was compiled before. Needs NVRTC, not a GPU."""
    try:
        from cuda.bindings import nvrtc
    except ImportError as error:
        raise CudaUnavailable(f"the package cuda-bindings is not installed ({error})") from error
    source = (SOURCES / file).read_text()
    texts = {"common.cuh": (SOURCES / "common.cuh").read_text(), **headers}
    options = [f"--gpu-architecture={architecture}", "--std=c++17", "-lineinfo"]
    options += [f"-D{name}" if value is None else f"-D{name}={value}" for name, value in constants.items()]
    key = hashlib.sha256(repr((source, texts, options, _checked(nvrtc.nvrtcVersion()))).encode()).hexdigest()[:24]
    try:
        place = check_cache("cuda") / f"{Path(file).stem}-{key}.cubin"
    except NativeUnavailable:  # compiled anew in every process
        return _compile(file, source, texts, options)
    code = read_intact(place)
    if code is None:
        code = _compile(file, source, texts, options)
        with suppress(OSError):
            keep(place, code)
    return code


def _compile(file: str, source: str, texts: Mapping[str, str], options: Sequence[str]) -> bytes:
    from cuda.bindings import nvrtc

    program = _checked(
        nvrtc.nvrtcCreateProgram(
            source.encode(),
            file.encode(),
            len(texts),
            [text.encode() for text in texts.values()],
            [name.encode() for name in texts],
        )
    )
    (status,) = nvrtc.nvrtcCompileProgram(program, len(options), [o.encode() for o in options])
    if int(status) != 0:
        log = b" " * _checked(nvrtc.nvrtcGetProgramLogSize(program))
        _checked(nvrtc.nvrtcGetProgramLog(program, log))
        raise CudaUnavailable(f"{file} does not compile with {' '.join(options)}:\n{log.decode().strip()}")
    code: bytes = b" " * _checked(nvrtc.nvrtcGetCUBINSize(program))
    _checked(nvrtc.nvrtcGetCUBIN(program, code))
    return code


class Kernel:
    """A loaded kernel. Arguments are ctypes values; pointers come from `pointer`.

    The blocks of a `cooperative` one all run at once, as barriers over the grid need; it overlaps nothing.
    """

    def __init__(self, code: bytes, name: str, shared_bytes: int, *, cooperative: bool = False) -> None:
        from cuda.bindings import driver

        self._driver, self._code, self._shared, self._cooperative = driver, code, shared_bytes, cooperative
        self._module = _checked(driver.cuModuleLoadData(code))
        self._function = _checked(driver.cuModuleGetFunction(self._module, name.encode()))
        attributes = driver.CUfunction_attribute
        # One split of L1 and shared memory for all: changing it needs an idle multiprocessor, and kernels overlap.
        _checked(
            driver.cuFuncSetAttribute(
                self._function, attributes.CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT, 100
            )
        )
        if shared_bytes > 40 << 10:  # 48 KiB, the kernel's own static memory among them, need no asking
            attribute = attributes.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
            _checked(driver.cuFuncSetAttribute(self._function, attribute, shared_bytes))

    def launch(self, grid: Sequence[int], threads: int, arguments: Sequence[Any], *, overlap: bool = True) -> None:
        """Run on PyTorch's current stream; with `overlap` it may start before the kernel in front has ended."""
        import torch

        driver = self._driver
        config = driver.CUlaunchConfig()
        config.gridDimX, config.gridDimY, config.gridDimZ = (*grid, 1, 1)[:3]
        config.blockDimX, config.blockDimY, config.blockDimZ = threads, 1, 1
        config.sharedMemBytes = self._shared
        config.hStream = driver.CUstream(torch.cuda.current_stream().cuda_stream)
        kinds, attribute = driver.CUlaunchAttributeID, driver.CUlaunchAttribute()
        if self._cooperative:
            attribute.id = kinds.CU_LAUNCH_ATTRIBUTE_COOPERATIVE
            attribute.value.cooperative = 1
            config.attrs, config.numAttrs = [attribute], 1
        elif overlap:
            attribute.id = kinds.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
            attribute.value.programmaticStreamSerializationAllowed = 1
            config.attrs, config.numAttrs = [attribute], 1
        addresses = (ctypes.c_void_p * len(arguments))(*(_address(argument) for argument in arguments))
        _checked(driver.cuLaunchKernelEx(config, self._function, ctypes.addressof(addresses), 0))


def _address(argument: Any) -> int:
    return int(argument.getPtr()) if hasattr(argument, "getPtr") else ctypes.addressof(argument)


def pointer(tensor: Any) -> ctypes.c_void_p:
    """A tensor's memory as an argument; None is a null pointer."""
    return ctypes.c_void_p(0 if tensor is None else tensor.data_ptr())


@cache
def _compiled(file: str, name: str, constants: tuple[tuple[str, int | None], ...], rows: int, shared: int) -> Kernel:
    import torch

    major, minor = torch.cuda.get_device_capability()
    headers = {"wgmma.cuh": wgmma_source(rows)} if rows else {}
    suffix = "a" if (major, minor) >= (9, 0) else ""
    return Kernel(cubin(file, dict(constants), f"sm_{major}{minor}{suffix}", headers), name, shared)


def compiled(
    file: str, name: str, constants: Mapping[str, int | None], *, rows: int = 0, shared_bytes: int = 0
) -> Kernel:
    """The kernel `name` of a source file with these constants, compiled for the current GPU when first asked for."""
    return _compiled(file, name, tuple(sorted(constants.items())), rows, shared_bytes)


def tensor_map(tensor: Any, sizes: Sequence[int], strides: Sequence[int], box: Sequence[int]) -> Any:
    """How TMA cuts boxes from a 16-bit tensor: sizes innermost first, strides in bytes of all but the innermost.

    Boxes land in rows of 128 bytes, swizzled as the tensor cores expect; what lies outside is read as zero.
    """
    import torch
    from cuda.bindings import driver

    kinds = driver.CUtensorMapDataType
    kind = (
        kinds.CU_TENSOR_MAP_DATA_TYPE_BFLOAT16
        if tensor.dtype == torch.bfloat16
        else kinds.CU_TENSOR_MAP_DATA_TYPE_FLOAT16
    )
    return _checked(
        driver.cuTensorMapEncodeTiled(
            kind,
            len(sizes),
            tensor.data_ptr(),
            [driver.cuuint64_t(n) for n in sizes],
            [driver.cuuint64_t(n) for n in strides],
            [driver.cuuint32_t(n) for n in box],
            [driver.cuuint32_t(1)] * len(sizes),
            driver.CUtensorMapInterleave.CU_TENSOR_MAP_INTERLEAVE_NONE,
            driver.CUtensorMapSwizzle.CU_TENSOR_MAP_SWIZZLE_128B,
            driver.CUtensorMapL2promotion.CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
            driver.CUtensorMapFloatOOBfill.CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
        )
    )
