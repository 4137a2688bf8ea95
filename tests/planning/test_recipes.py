"""Every preset and recipe in configs/ is planned: it fits the GPU it names and passes legal flags only."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from tests.backends.test_trtllm_flags import legal
from tests.cli.tiny import Program
from tests.tiny_models import write_base, write_drafter
from trtllm_redrafter.checkpoint.config import CheckpointConfig
from trtllm_redrafter.fsio import write_json
from trtllm_redrafter.run.hardware_plan import RecipePlan, dear_search, plan_recipe, recipe_model
from trtllm_redrafter.run.options import with_directories
from trtllm_redrafter.settings import Resolved, file_layers, preset_layer, resolve

CONFIGS = Path(__file__).parent.parent.parent / "configs"
PRESETS = ("h100-latency", "h100-throughput", "h100-fp8")
RECIPES = {
    "vicuna-7b": 1, "llama-3.1-8b": 1, "llama-3.1-8b-throughput": 1, "llama-3.3-70b-tp4": 4, "llama-3.3-70b-tp8": 8,
    "mistral-7b": 1, "qwen2.5-7b-fp8": 1, "qwen2.5-14b-fp8": 1, "qwen3-8b": 1,
}  # fmt: skip


@pytest.fixture
def program(capsys: pytest.CaptureFixture[str]) -> Program:
    return Program(capsys)


@pytest.fixture(autouse=True)
def _in_an_empty_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # no models there: the descriptions stand in


def planned(name: str) -> RecipePlan:
    return plan_recipe(resolve(file_layers(CONFIGS / f"{name}.yaml")), name=name)


def test_all_recipes_for_gpus_are_tested_here() -> None:
    names = {p.stem for p in CONFIGS.glob("*.yaml") if "tensorrt" in p.read_text() or "preset: h100" in p.read_text()}
    assert names == {*RECIPES, *PRESETS}


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_layers(name: str) -> None:
    recipe = resolve([preset_layer(name, asked_by="test")]).recipe
    assert recipe.backend == "tensorrt-llm" and recipe.tensorrt_llm.gpu == "h100-80gb" and recipe.base is None


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_fits_its_gpu(name: str) -> None:
    plan = planned(name)
    assert plan.build.memory.ranks == RECIPES[name] and not plan.build.memory.warnings()
    assert plan.build.memory.full_requests >= plan.build.options.max_batch_size
    arguments = plan.build.flags.arguments(
        checkpoint=Path("c"), output=Path("o"), timing_cache_in=None, timing_cache_out=Path("t")
    )
    found = legal(arguments)
    assert int(found["--max_batch_size"]) <= 32 and found["--speculative_decoding_mode"] == "explicit_draft_tokens"
    shape = plan.model.config.draft_shape
    assert shape is not None
    limit = shape.draft_len + 1
    assert all(1.0 < row.break_even < limit for row in plan.latency.rows), "drafting could never pay"


@pytest.mark.parametrize("name", [*PRESETS, *RECIPES])
def test_recipes_explain_themselves(name: str) -> None:
    lines = (CONFIGS / f"{name}.yaml").read_text().splitlines()
    assert lines[0].startswith("# ") and max(map(len, lines)) <= 122


def test_every_description_has_a_source() -> None:
    rows = [line for line in (CONFIGS / "models" / "README.md").read_text().splitlines() if line.startswith("| `")]
    assert {row.split("`")[1] for row in rows} == {path.stem for path in (CONFIGS / "models").glob("*.json")}


def test_fp8_recipes_quantize_all_but_the_drafter() -> None:
    config = planned("qwen2.5-7b-fp8").model.config
    assert config.quant_algo == "FP8" and "drafter*" in config.quantization["exclude_modules"]
    assert any("Qwen-14B" in (w.why or "") for w in planned("qwen2.5-14b-fp8").build.warnings)


def test_plan_command(program: Program) -> None:
    flags = ["plan", CONFIGS / "llama-3.1-8b.yaml"]
    assert program(*flags, "--set", "plan.acceptance_length=2.9", "--json") == 0
    for word in (
        "is not there yet",
        "--max_num_tokens",
        "the builder changes",
        "KV cache",
        "break-even",
        "[preset h100",
    ):
        assert word in program.out, word
    document = program.document
    assert document["build"]["memory"]["gpu"] == "h100-80gb" and document["latency"]["rows"][0]["speedup"] > 1
    assert document["values"]["tensorrt_llm.opt_batch_size"] == {"value": 1, "origin": "preset h100-latency"}
    assert program(*flags, "--set", "tensorrt_llm.gpu=h300") == 2 and "h200" in program.err
    assert program(*flags, "--set", "convert.draft_len=5", "--set", "tensorrt_llm.flags={max_beam_width: 2}") == 4
    assert program(*flags, "--set", "base=models/unknown") == 3 and "configs/models/unknown.json" in program.err
    assert program(*flags, "--set", "plan.acceptance_length=6.5") == 2 and "at most 5 drafted" in program.err
    assert program("plan", CONFIGS / "llama-3.3-70b-tp4.yaml", "--set", "convert.tp_size=1") == 4
    assert "does not fit" in program.err and not list(Path().iterdir())


def test_plan_reads_what_is_there(program: Program, tmp_path: Path) -> None:
    (tmp_path / "drafter").mkdir()
    config = {"hidden_size": 4096, "exit_dim": 512, "num_draft_layers": 1, "rnn": True, "draft_len": 3}
    write_json(tmp_path / "drafter" / "config.json", config | {"vocab_size": 32000})
    flags = ["plan", CONFIGS / "llama-3.1-8b.yaml", "--set", "drafter=drafter"]
    assert program(*flags, "--json") == 4 and "trained for 3" in program.err and "vocabulary is 32000" in program.err
    write_json(tmp_path / "drafter" / "config.json", config | {"vocab_size": 128256})
    assert program(*flags, "--json") == 4 and "trained for 3" in program.err
    assert program(*flags, "--set", "convert.draft_len=3", "--json") == 0
    drafter = next(
        entry for entry in program.document["build"]["memory"]["lines"] if entry["name"] == "drafter weights"
    )
    projection, head = 512 * 8192 + 512, 128256 * 512
    rnn, block = 2 * 4096 * 4096 + 4096, 512 * 512 + 512
    assert drafter["bytes"] == 2 * (projection + head + rnn + block)


def test_plan_is_quick_and_needs_no_torch() -> None:
    code = (
        "import sys, time; start = time.perf_counter(); from trtllm_redrafter.cli import run_app; "
        f"code = run_app(['plan', {str(CONFIGS / 'vicuna-7b.yaml')!r}]); "
        "bad = {'torch', 'transformers', 'tensorrt_llm'} & set(sys.modules); assert not bad, bad; sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def described(exit_dim: int, layers: int) -> tuple[Resolved, CheckpointConfig]:
    """Llama 3.1 8B with a drafter of this width."""
    resolved = with_directories(resolve(file_layers(CONFIGS / "llama-3.1-8b.yaml")), name="x")
    config = recipe_model(resolved).config
    assert config.drafter is not None
    return resolved, replace(config, drafter=replace(config.drafter, exit_dim=exit_dim, num_layers=layers))


def test_a_search_that_takes_more_than_a_quarter_of_a_step_is_told_with_what_would_help() -> None:
    said = dear_search(*described(8192, 2))
    assert said is not None and said.startswith("warning") and "exit_dim of 2048 instead of 8192" in said


def test_a_drafter_that_costs_little_is_not_mentioned() -> None:
    assert dear_search(*described(512, 1)) is None


def test_convert_warns_of_a_dear_search(program: Program, tmp_path: Path) -> None:
    base = write_base(tmp_path / "base")
    drafter = write_drafter(tmp_path / "drafter")
    flags = ["convert", "--base", base, "--drafter", drafter, "--output", tmp_path / "out", "--dry-run", "--json"]
    assert program(*flags) == 0
    assert any("search takes" in note for note in program.document["plan"]["notes"])
    assert program(*[f for f in flags if f not in ("--drafter", drafter)]) == 0
    assert not any("search takes" in note for note in program.document["plan"]["notes"])
