"""Memory follows the block, not the model."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from tests.tiny_models import write_base

MEASURE = """
    import sys
    from pathlib import Path
    from trtllm_redrafter.conversion.writer import convert
    from trtllm_redrafter.conversion.options import ConvertOptions
    from trtllm_redrafter.conversion.plan import plan_conversion
    from trtllm_redrafter.progress import no_progress
    base, out, dtype, tp = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], int(sys.argv[4])
    def memory(field):
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith(field))
    Path("/proc/self/clear_refs").write_text("5")  # the peak restarts here, after the imports
    before = memory("VmRSS")
    options = ConvertOptions(base=base, drafter=None, output=out, dtype=dtype, tp_size=tp, num_beams=None,
                             draft_len=None, greedy=True, parallel_embedding=False, workers=2, overwrite=False)
    convert(plan_conversion(options), no_progress)
    print(memory("VmHWM") - before)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's memory accounting")
@pytest.mark.parametrize(("dtype", "tp_size"), [("auto", 1), ("float32", 2)])
def test_peak_memory_is_far_below_the_model(dtype: str, tp_size: int, tmp_path: Path) -> None:
    """A 150 MB model, with one tensor of 67 MB, adds less than 120 MB, most of it code."""
    base = write_base(
        tmp_path / "base", torch_dtype="bfloat16", vocab_size=32768, hidden_size=1024, intermediate_size=2048,
        num_attention_heads=8, num_key_value_heads=8, num_hidden_layers=1,
    )  # fmt: skip
    size = (base / "model.safetensors").stat().st_size
    assert size > 150e6
    command = [sys.executable, "-c", textwrap.dedent(MEASURE), str(base), str(tmp_path / "out"), dtype, str(tp_size)]
    done = subprocess.run(
        command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2], timeout=300
    )
    assert 0 < int(done.stdout) < 120_000, done.stdout
