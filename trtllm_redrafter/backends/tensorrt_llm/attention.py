"""TensorRT-LLM's choices about attention: which kernel verifies draft tokens, and how prompts are read.

Both are silent: an engine without a suitable kernel builds and fails at its first request, and the builder switches
flags that do not suit the weights. The rules are those of 1.2's source: the XQA runner, its two implementations, and
the builder.

    tree_kernel(group=7, head_size=128, tokens_per_block=32, fp8_cache=False, capability=(9, 0))   # (PRECOMPILED, [])
    context_attention("W4A8_AWQ", "FP8", paged=True, fp8=True)                                     # (True, True)
"""

from __future__ import annotations

RUNTIME, PRECOMPILED = "compiled at run time", "precompiled"
TOKENS_PER_BLOCK = 32
"""trtllm-build's default."""

_TILE = 64
"""Groups that divide it are assigned to the kernels compiled at run time, whether or not those support them."""

_LARGEST_RUNTIME_GROUP = 32
_RUNTIME_HEADS: tuple[int, ...] = (32, 48, 64, 80, 96, 112, 128, 144, 160, 192, 224, 256)
"""Multiples of 16 from 16 to 256, of which the attention layer itself accepts these only."""

_RUNTIME_BLOCKS: tuple[int, ...] = (16, 32, 64, 128)
_HOPPER_FP8_BLOCKS: tuple[int, ...] = (8, *_RUNTIME_BLOCKS)
_PRECOMPILED_BLOCKS: tuple[int, ...] = (32, 64, 128)
_PRECOMPILED_HEADS: tuple[int, ...] = (64, 128)
"""256 passes TensorRT-LLM's first check too, but no kernel of that size for several draft tokens is shipped."""

_FP8_CAPABILITY = (8, 9)

FP8_CONTEXT_ALGOS = ("FP8", "W4A8_AWQ", "NVFP4")
"""Weights under which prompts may be attended to in FP8."""


def tree_kernel(
    *, group: int, head_size: int, tokens_per_block: int, fp8_cache: bool, capability: tuple[int, int]
) -> tuple[str, list[str]]:
    """The kind of kernel that verifies a tree of draft tokens, and why it cannot run here; [] when it can.

    `group` is the number of query heads per KV head on one rank. For 16-bit activations on compute capability 8.0 to
    9.0; Blackwell has kernels of its own.
    """
    hopper_fp8 = fp8_cache and capability == (9, 0)
    if _TILE % group == 0 or (hopper_fp8 and group <= _TILE):
        blocks = _HOPPER_FP8_BLOCKS if hopper_fp8 else _RUNTIME_BLOCKS
        kind, heads, largest = RUNTIME, _RUNTIME_HEADS, _LARGEST_RUNTIME_GROUP
    else:
        blocks, kind, heads, largest = _PRECOMPILED_BLOCKS, PRECOMPILED, _PRECOMPILED_HEADS, group
    found = []
    if group > largest:
        found.append(f"it takes groups of at most {largest} query heads per KV head, these are {group}")
    if head_size not in heads:
        found.append(f"it takes heads of {', '.join(map(str, heads))}, these are {head_size}")
    if tokens_per_block not in blocks:
        found.append(f"it takes KV blocks of {', '.join(map(str, blocks))} tokens, these are {tokens_per_block}")
    if kind == PRECOMPILED and fp8_cache and capability < _FP8_CAPABILITY:
        found.append("it reads an FP8 KV cache from compute capability 8.9 on")
    return kind, found


def context_attention(algo: str | None, cache: str | None, *, paged: bool, fp8: bool) -> tuple[bool, bool]:
    """use_paged_context_fmha and use_fp8_context_fmha as the builder leaves them, from what was asked for.

    `algo` is the weights' quantization, `cache` the KV cache's. (Before compute capability 8.9 both go off for FP8
    caches; weights that would make a difference there are refused before.)
    """
    if algo not in FP8_CONTEXT_ALGOS:
        paged, fp8 = paged and cache != "FP8", False
    elif paged:
        fp8 = cache == "FP8"  # it may be switched on as well as off
    return paged and cache != "INT8", fp8
