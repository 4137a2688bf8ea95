"""The CUDA kernels' parts that need no GPU: how work is cut and laid out, and that the sources compile."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from trtllm_redrafter.backends.torch.cuda import compiler
from trtllm_redrafter.backends.torch.cuda.base_pass import tail_blocks
from trtllm_redrafter.backends.torch.cuda.executor import _round_up, portions
from trtllm_redrafter.backends.torch.cuda.linear import Kind, Linear, _cut, padded
from trtllm_redrafter.backends.torch.layout import Layout
from trtllm_redrafter.redrafter.token_tree import Tree


def read_as_the_kernel_does(product: Linear, packed: torch.Tensor) -> torch.Tensor:
    """Walk the boxes as `linear.cu` addresses them, every 16-byte piece put back: [16 groups, 64 k_tiles]."""
    groups, k_tiles = packed.shape[:2]
    boxes, whole = packed.reshape(-1, 16, 8, 8), packed.new_full((groups * 16, k_tiles * 64), torch.nan)
    pieces = torch.arange(8) ^ (torch.arange(16).view(-1, 1) & 7)
    for part in range(product.parts):
        begin = part * groups // product.parts
        count = (part + 1) * groups // product.parts - begin
        for number in range(product.passes):
            group = begin + number * count // product.passes
            size = begin + (number + 1) * count // product.passes - group
            for k in range(k_tiles):
                for own in range(size):
                    box = boxes[group * k_tiles + k * size + own]
                    rows = slice((group + own) * 16, (group + own + 1) * 16)
                    found = torch.gather(box, 1, pieces.unsqueeze(-1).expand(16, 8, 8))
                    whole[rows, k * 64 : (k + 1) * 64] = found.reshape(16, 64)
    return whole


@pytest.mark.parametrize(
    ("width", "columns", "kind", "blocks"),
    [(200, 300, "partial", 5), (144, 128, "gated", 4), (1000, 64, "logits", 3), (48, 640, "partial", 7)],
)
def test_weights_lie_in_the_order_of_reading(width: int, columns: int, kind: Kind, blocks: int) -> None:
    weight = torch.randn(width, columns).to(torch.bfloat16)
    product = Linear(weight, kind, blocks)
    whole = read_as_the_kernel_does(product, product.packed)
    expected = torch.zeros_like(whole)
    if kind == "gated":
        half = width // 2
        for row in range(half):  # eight gate rows, then the eight up rows of the same places
            place = row // 8 * 16 + row % 8
            expected[place, :columns], expected[place + 8, :columns] = weight[row], weight[half + row]
    else:
        expected[:width, :columns] = weight
    assert torch.equal(whole, expected)
    assert product.blocks <= blocks


@pytest.mark.parametrize(
    ("groups", "k_tiles"), [(128, 24), (96, 140), (96, 24), (1120, 24), (256, 224), (9, 9), (1, 1)]
)
def test_blocks_read_nearly_the_same(groups: int, k_tiles: int) -> None:
    parts, splits = _cut(groups, k_tiles, 132, 16)
    assert parts * splits <= 132 and parts <= groups and splits <= min(16, k_tiles)
    most = -(-groups // parts) * -(-k_tiles // splits)
    if groups * k_tiles >= 132 * 16:  # enough to deal out
        assert most <= 1.35 * groups * k_tiles / 132


def test_a_pass_is_packed_row_by_row() -> None:
    trees = [Tree.root(7), Tree.merge([[1, 2, 3], [1, 2, 4], [1, 5, 6]])]
    layout = Layout(rows=8, batch=4, nodes=8, path=4)
    packed = torch.tensor(layout.pack([3, 1], [10, 20], trees))
    assert len(packed) == layout.size
    sequence, depths, paths, slots, bases, first, tokens = layout.split(packed).values()
    assert [len(p) for p in (sequence, depths, paths, slots, bases, first, tokens)] == [8, 8, 32, 4, 4, 5, 8]
    assert sequence.tolist() == [0, 1, 1, 1, 1, 1, 1, -1]
    assert depths.tolist() == [0, 0, 1, 2, 2, 1, 2, 0]
    assert tokens.tolist() == [7, 1, 2, 3, 4, 5, 6, 0]
    assert paths.view(8, 4)[3].tolist() == [0, 1, 2, 2] and paths.view(8, 4)[6].tolist() == [0, 4, 5, 5]
    assert slots[:2].tolist() == [3, 1] and bases[:2].tolist() == [10, 20] and first.tolist() == [0, 1, 7, 7, 7]


def test_prompts_are_packed_without_paths() -> None:
    layout = Layout(rows=8, batch=1, nodes=8, path=8, chain=True)
    packed = layout.pack([2], [256], [Tree([4, 5, 6], [-1, 0, 1], [0, 1, 2])])
    assert packed == [0, 0, 0, -1, -1, -1, -1, -1, 0, 1, 2, 0, 0, 0, 0, 0, 2, 256, 0, 3, 4, 5, 6, 0, 0, 0, 0, 0]
    assert len(packed) == layout.size


@pytest.mark.parametrize(("path", "expected"), [(1, 1), (2, 2), (33, 2), (34, 3), (256, 9)])
def test_positions_of_a_pass_lie_in_few_blocks(path: int, expected: int) -> None:
    """A path of n nodes begins anywhere in a block of 32."""
    assert tail_blocks(path) == expected == max((start + path - 1) // 32 for start in range(32)) + 1


def test_passes_have_at_most_256_rows() -> None:
    assert portions([200, 56, 1, 255, 2]) == [(0, 2), (2, 4), (4, 5)]
    assert portions([300]) == [(0, 1)] and portions([5, 300, 5]) == [(0, 1), (1, 2), (2, 3)]
    assert [_round_up(n) for n in (1, 2, 3, 26, 256)] == [1, 2, 8, 32, 256]
    assert padded(26) == 32 and padded(150) == 160
    with pytest.raises(ValueError, match="at most 256"):
        padded(257)


HEADS = {"D": 128, "HEADS": 12, "KV_HEADS": 2}
VARIANTS: Sequence[tuple[str, dict[str, int | None], int]] = (
    ("linear.cu", {"ROWS": 8, "GROUPS": 9, "TEAMS": 1, "STAGES": 5, "PARTIAL": None}, 8),
    ("linear.cu", {"ROWS": 32, "GROUPS": 7, "TEAMS": 1, "STAGES": 5, "GATED": None, "DTYPE_HALF": None}, 32),
    ("linear.cu", {"ROWS": 256, "GROUPS": 8, "TEAMS": 2, "STAGES": 3, "LOGITS": None}, 128),
    ("step.cu", {"BEAMS": 5, "LENGTH": 5, "PATH": 8}, 0),
    ("step.cu", {"BEAMS": 1, "LENGTH": 0, "PATH": 8}, 0),
    ("norm.cu", {"WIDTH": 1536, "THREADS": 768}, 0),
    ("attention.cu", {**HEADS, "PATH": 8}, 0),
    ("attention.cu", {**HEADS, "PATH": 256, "CHAIN": None, "HAS_NORM": None, "DTYPE_HALF": None}, 0),
    ("reduce.cu", {}, 0),
)


@pytest.mark.parametrize(("file", "constants", "rows"), VARIANTS)
def test_sources_compile_for_hopper(file: str, constants: dict[str, int | None], rows: int) -> None:
    """NVRTC needs no GPU."""
    pytest.importorskip("cuda.bindings.nvrtc", reason="needs cuda-bindings and NVRTC")
    headers = {"wgmma.cuh": compiler.wgmma_source(rows)} if rows else {}
    assert compiler.cubin(file, constants, "sm_90a", headers)[:4] == b"\x7fELF"
    with pytest.raises(compiler.CudaUnavailable, match="does not compile"):
        compiler.cubin(file, {**constants, "u16": 3}, "sm_90a", headers)


def test_machine_code_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiled once per source and options; a damaged file is compiled again, a cache that is refused does without."""
    pytest.importorskip("cuda.bindings.nvrtc", reason="needs cuda-bindings and NVRTC")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    real, made = compiler._compile, []
    monkeypatch.setattr(compiler, "_compile", lambda *args: made.append(args[0]) or real(*args))
    code = compiler.cubin("reduce.cu", {}, "sm_90a", {})
    (kept,) = (tmp_path / "trtllm-redrafter" / "cuda").glob("reduce-*.cubin")
    assert compiler.cubin("reduce.cu", {}, "sm_90a", {}) == code == kept.read_bytes() and len(made) == 1
    kept.write_bytes(code[:-1] + b"!")
    assert compiler.cubin("reduce.cu", {}, "sm_90a", {}) == code == kept.read_bytes() and len(made) == 2
    assert compiler.cubin("reduce.cu", {"DTYPE_HALF": None}, "sm_90a", {}) and len(made) == 3
    kept.parent.chmod(0o777)
    assert compiler.cubin("reduce.cu", {}, "sm_90a", {}) == code and len(made) == 4


def test_every_source_is_packaged() -> None:
    text = Path("pyproject.toml").read_text()
    assert {f'"backends/torch/cuda/*{file.suffix}"' in text for file in compiler.SOURCES.glob("*.cu*")} == {True}
