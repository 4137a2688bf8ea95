"""Table of the GPUs that plans can be made for, from NVIDIA's data sheets.

Bandwidth and arithmetic are peak rates; the share that kernels reach is an assumption of the latency plan. Arithmetic
rates are for dense matrices: data sheets give twice as much, with sparsity. `memory_bytes` is the data sheet's size
(10**9 bytes per GB); drivers report a few per cent more or less.

    gpu("h100-80gb").bandwidth      # 3.35e12 bytes/s
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass

from trtllm_redrafter.errors import UsageError

GB, TB, TERA = 10**9, 10**12, 10**12


@dataclass(frozen=True)
class Gpu:
    """One kind of GPU. `link_bandwidth` is what one GPU can send to its peers, in bytes/s (one direction)."""

    name: str
    title: str
    memory_bytes: int
    bandwidth: float
    bf16_flops: float
    fp8_flops: float | None
    link_bandwidth: float
    compute_capability: tuple[int, int]
    driver_names: tuple[str, ...]
    """Prefixes of the name that `nvidia-smi` prints."""

    def flops(self, *, fp8: bool) -> float:
        """Peak rate of matrix products. Without FP8 units, FP8 weights are multiplied in 16 bits."""
        return self.fp8_flops if fp8 and self.fp8_flops is not None else self.bf16_flops


GPUS: Mapping[str, Gpu] = {
    g.name: g
    for g in (
        # NVIDIA H100 Tensor Core GPU data sheet, SXM column: 80 GB, 3.35 TB/s, 1,979 TFLOPS BF16 and 3,958 FP8 with
        # sparsity, NVLink 900 GB/s both ways together.
        Gpu("h100-80gb", "H100 SXM 80 GB", 80 * GB, 3.35 * TB, 989.5 * TERA, 1979 * TERA, 450 * GB, (9, 0),
            ("NVIDIA H100 80GB HBM3",)),
        # The same data sheet, NVL column: 94 GB, 3.9 TB/s, 1,671 TFLOPS BF16, 3,341 FP8 with sparsity, NVLink 600.
        Gpu("h100-94gb", "H100 NVL 94 GB", 94 * GB, 3.9 * TB, 835.5 * TERA, 1670.5 * TERA, 300 * GB, (9, 0),
            ("NVIDIA H100 NVL",)),
        # NVIDIA H200 Tensor Core GPU data sheet, SXM column: 141 GB, 4.8 TB/s, arithmetic and NVLink as H100 SXM.
        Gpu("h200", "H200 SXM 141 GB", 141 * GB, 4.8 * TB, 989.5 * TERA, 1979 * TERA, 450 * GB, (9, 0),
            ("NVIDIA H200",)),
        # NVIDIA A100 Tensor Core GPU data sheet, 80 GB SXM column: 2,039 GB/s, 312 TFLOPS BF16 dense, NVLink 600 GB/s.
        Gpu("a100-80gb", "A100 SXM 80 GB", 80 * GB, 2.039 * TB, 312 * TERA, None, 300 * GB, (8, 0),
            ("NVIDIA A100-SXM4-80GB", "NVIDIA A100 80GB")),
        # NVIDIA L40S data sheet: 48 GB, 864 GB/s, 362.05 TFLOPS BF16 and 733 FP8 dense; PCIe Gen4 x16, no NVLink.
        Gpu("l40s", "L40S 48 GB", 48 * GB, 0.864 * TB, 362.05 * TERA, 733 * TERA, 32 * GB, (8, 9),
            ("NVIDIA L40S",)),
        # NVIDIA L4 data sheet: 24 GB, 300 GB/s, 242 TFLOPS BF16 and 485 FP8 with sparsity; PCIe Gen4 x16.
        Gpu("l4", "L4 24 GB", 24 * GB, 0.3 * TB, 121 * TERA, 242.5 * TERA, 32 * GB, (8, 9), ("NVIDIA L4",)),
        # NVIDIA Ada architecture white paper, appendix: 24 GB, 1,008 GB/s, dense with FP32 accumulation 165.2 TFLOPS
        # BF16 and 330.3 FP8; PCIe Gen4 x16.
        Gpu("rtx-4090", "GeForce RTX 4090 24 GB", 24 * GB, 1.008 * TB, 165.2 * TERA, 330.3 * TERA, 32 * GB, (8, 9),
            ("NVIDIA GeForce RTX 4090",)),
        # NVIDIA RTX Blackwell architecture white paper, appendix: 32 GB, 1,792 GB/s, dense with FP32 accumulation 209.5
        # TFLOPS BF16 and 419 FP8; PCIe Gen5 x16.
        Gpu("rtx-5090", "GeForce RTX 5090 32 GB", 32 * GB, 1.792 * TB, 209.5 * TERA, 419 * TERA, 64 * GB, (12, 0),
            ("NVIDIA GeForce RTX 5090",)),
        # NVIDIA Ampere GA102 white paper, appendix: 24 GB, 936 GB/s, dense with FP32 accumulation 71 TFLOPS BF16.
        Gpu("rtx-3090", "GeForce RTX 3090 24 GB", 24 * GB, 0.936 * TB, 71 * TERA, None, 32 * GB, (8, 6),
            ("NVIDIA GeForce RTX 3090",)),
        # NVIDIA DGX B200 data sheet, an eighth: 180 GB, 8 TB/s, 72 PFLOPS FP8 and 36 BF16 with sparsity, NVLink
        # 1.8 TB/s both ways together.
        Gpu("b200", "B200 180 GB", 180 * GB, 8.0 * TB, 2250 * TERA, 4500 * TERA, 900 * GB, (10, 0), ("NVIDIA B200",)),
    )
}  # fmt: skip


def gpu(name: str) -> Gpu:
    """The table's row; `UsageError` with the nearest name if there is none."""
    if name in GPUS:
        return GPUS[name]
    near = difflib.get_close_matches(name.lower(), list(GPUS), 1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise UsageError(f"there is no GPU {name!r} in the table", remedy=f"{hint}known are {', '.join(GPUS)}")


def gpu_by_driver_name(text: str) -> Gpu | None:
    """The row for a name that `nvidia-smi` prints; None for GPUs not in the table."""
    found = [g for g in GPUS.values() if any(text.startswith(name) for name in g.driver_names)]
    return found[0] if found else None
