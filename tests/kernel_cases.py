"""Our Triton kernels beside float32 by PyTorch: cases for a GPU, and for Triton's interpreter without one.

TRITON_INTERPRET=1 python -m tests.kernel_cases      # one line of JSON; float16, since the interpreter lacks bfloat16
"""

from __future__ import annotations

import json

import torch

from trtllm_redrafter.backends.torch.pointwise import EAGER
from trtllm_redrafter.redrafter.token_tree import Tree

SHAPES: tuple[tuple[int, int, int, int, list[int], bool], ...] = (
    (1, 4, 2, 16, [0], False), (2, 4, 2, 16, [70, 130], True), (2, 3, 1, 24, [600, 1100], False),
    (2, 8, 8, 64, [63, 64], True), (2, 14, 2, 128, [255, 512], True), (2, 32, 32, 80, [254, 770], False),
)  # fmt: skip
"""Batch, heads, KV heads, head size, committed positions, norms of heads."""


def attention_case(
    batch: int, heads: int, kv_heads: int, size: int, bases: list[int], *, normed: bool, dtype: torch.dtype, device: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Our attention against float32, over trees of five nodes; the last one of the second tree is padding."""
    from trtllm_redrafter.backends.torch.tree_attention import Heads, TreeRows, attend

    torch.manual_seed(4)
    capacity, width = max(bases) + 40, 5
    parents, depths = [-1, 0, 0, 1, 2], [0, 1, 1, 2, 2]
    lines = Tree([0] * width, parents, depths).paths()
    paths = torch.tensor([[line + line[-1:] * (3 - len(line)) for line in lines]] * batch)
    paths[1:, -1] = -1
    slots, keys = [2, 0][:batch], torch.randn(3, kv_heads, capacity, size).to(dtype)
    values, angles = torch.randn_like(keys), torch.randn(capacity, size // 2)
    cosine, sine = (torch.cat([f(angles)] * 2, dim=-1).to(dtype) for f in (torch.cos, torch.sin))
    qkv = torch.randn(batch * width, (heads + 2 * kv_heads) * size).to(dtype)
    norms = (torch.rand(size).to(dtype), torch.rand(size).to(dtype)) if normed else None

    expected = torch.zeros(batch * width, heads * size)
    for row in range(batch * width):
        b, node = divmod(row, width)
        if int(paths[b, node, 0]) < 0:
            continue

        def part(source: int, first: int, count: int, weight: torch.Tensor | None, b: int = b) -> torch.Tensor:
            found = qkv[source].float().view(-1, size)[first : first + count]
            if weight is not None:
                found = weight.float() * found * torch.rsqrt(found.pow(2).mean(-1, keepdim=True) + 1e-5)
            if first < heads + kv_heads:
                place = bases[b] + depths[source % width]
                low, high = found.chunk(2, dim=-1)
                found = found * cosine[place].float() + torch.cat([-high, low], dim=-1) * sine[place].float()
            return found.to(dtype).float()

        query = part(row, 0, heads, norms and norms[0])
        line = [b * width + ancestor for ancestor in lines[node]]
        own_keys = [part(n, heads, kv_heads, norms and norms[1]).unsqueeze(1) for n in line]
        own_values = [part(n, heads + kv_heads, kv_heads, None).unsqueeze(1) for n in line]
        k = torch.cat([keys[slots[b], :, : bases[b]].float(), *own_keys], dim=1)
        v = torch.cat([values[slots[b], :, : bases[b]].float(), *own_values], dim=1)
        k, v = (x.repeat_interleave(heads // kv_heads, dim=0) for x in (k, v))
        weights = (torch.einsum("nd,nsd->ns", query, k) * size**-0.5).softmax(dim=-1)
        expected[row] = torch.einsum("ns,nsd->nd", weights, v).flatten()

    rows = TreeRows(*(torch.tensor(x).to(device) for x in (slots, bases[:batch], [depths] * batch)), paths.to(device))
    found = attend(
        qkv.to(device), norms and (norms[0].to(device), norms[1].to(device)), (cosine.to(device), sine.to(device)),
        (keys.to(device), values.to(device)), rows, Heads(heads, kv_heads, size, 1e-5), capacity,
    )  # fmt: skip
    return found.cpu().float(), expected


def pointwise_case(device: str) -> float:
    """Largest difference of the fused norm and gate from PyTorch's, over shapes with and without a residual."""
    from trtllm_redrafter.backends.torch.fused import FUSED

    torch.manual_seed(5)
    x, delta = (torch.randn(2, 3, 48).half().to(device) for _ in range(2))
    weight, worst = torch.rand(48).half().to(device), 0.0
    for other in (None, delta):
        for ours, theirs in zip(
            FUSED.add_norm(x, other, weight, 1e-5), EAGER.add_norm(x, other, weight, 1e-5), strict=True
        ):
            worst = max(worst, float((ours - theirs).abs().max()))
    return max(worst, float((FUSED.silu_and_mul(x, delta) - EAGER.silu_and_mul(x, delta)).abs().max()))


def main() -> None:
    found = []
    for batch, heads, kv_heads, size, bases, normed in SHAPES[:5]:
        ours, expected = attention_case(
            batch, heads, kv_heads, size, bases, normed=normed, dtype=torch.float16, device="cpu"
        )
        found.append(float((ours - expected).abs().max()))
    print(json.dumps({"attention": found, "pointwise": pointwise_case("cpu")}))


if __name__ == "__main__":
    main()
