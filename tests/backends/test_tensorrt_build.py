"""Building for the tensorrt backend: what is compiled, what is refused, and with which message."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from unittest.mock import patch

import pytest

pytest.importorskip("onnx", reason="the tensorrt backend needs onnx: pip install -e '.[dev]'")
pytest.importorskip("onnxruntime", reason="its networks are executed by onnxruntime: pip install -e '.[dev]'")

import onnx

from tests.backends.tensorrt_engines import (
    HostLauncher,
    build,
    build_without_compiler,
    load,
    load_on_stand_in,
    options,
)
from tests.conversion.fp8 import quantize_fp8
from tests.engines import write_checkpoint
from tests.tiny_models import FAMILIES
from trtllm_redrafter.backends import load_backend
from trtllm_redrafter.backends.base import Request, SamplingParams
from trtllm_redrafter.backends.engine_config import read_engine_config
from trtllm_redrafter.backends.tensorrt.backend import TensorRTBackend
from trtllm_redrafter.backends.tensorrt.build import check_outcome, run_job
from trtllm_redrafter.backends.tensorrt.compile_worker import CompileJob, CompileOutcome
from trtllm_redrafter.backends.tensorrt.compilers import COMPILERS, choose_compiler, import_compiler
from trtllm_redrafter.backends.tensorrt.execution import read_plan
from trtllm_redrafter.backends.tensorrt.graph import FLOAT, Graph
from trtllm_redrafter.backends.tensorrt.networks import engine_sizes, make_network, networks_of
from trtllm_redrafter.checkpoint.reader import Checkpoint
from trtllm_redrafter.errors import BackendError, InputError, MismatchError, OutputError, RedrafterError, UsageError
from trtllm_redrafter.planning.gpus import gpu
from trtllm_redrafter.progress import no_progress
from trtllm_redrafter.redrafter.config import DraftShape
from trtllm_redrafter.verify.files import verify_files
from trtllm_redrafter.verify.inspect import inspect
from trtllm_redrafter.verify.weights import verify


def compiler_is_here() -> bool:
    try:
        import_compiler(COMPILERS["tensorrt-rtx"])
    except BackendError:
        return False
    return True


needs_compiler = pytest.mark.skipif(
    not compiler_is_here(), reason="TensorRT-RTX compiles engines without a GPU: pip install -e '.[dev]'"
)


def message(error: type[RedrafterError], call: Callable[[], object]) -> str:
    with pytest.raises(error) as caught:
        call()
    return caught.value.render()


@needs_compiler
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_and_dtype_compiles(tmp_path: Path, family: str, dtype: str) -> None:
    cards = {"llama": "rtx-4090", "mistral": "rtx-3090", "qwen2": "rtx-5090", "qwen3": "l4"}
    checkpoint = write_checkpoint(tmp_path, family, dtype=dtype, head_dim=None if family == "qwen2" else 16)
    engine = build(checkpoint, tmp_path / "steps", gpu=cards[family])
    config = json.loads((engine / "config.json").read_text())
    assert config["compiler"] == {"name": "tensorrt-rtx", "version": COMPILERS["tensorrt-rtx"].tested}
    assert set(config["networks"]) == {"chain-greedy", "chain-sampled", "draft-greedy", "draft-sampled"}
    fused = dtype != "float32" and family != "qwen2"  # whose heads are 8 wide
    for network in config["networks"].values():
        assert set(network["product_types"]) == {{"float32": "FLOAT", "float16": "HALF", "bfloat16": "BF16"}[dtype]}
        assert network["layers"]["KV_CACHE_UPDATE"] == 2 * 2, "keys and values of two layers, in place"
        assert network["layers"].get("ATTENTION_OUTPUT", 0) == (2 if fused else 0)
        assert network["plan_bytes"] == len(read_plan(engine / network["file"])) > 100_000
        assert 0 < network["peak_bytes"] < 4e9
    if dtype == "float32":
        assert load(engine).info.draft_shape == DraftShape(4, 3)


@needs_compiler
@pytest.mark.parametrize("family", FAMILIES)
def test_eight_bit_weights_compile(tmp_path: Path, family: str) -> None:
    plain = write_checkpoint(tmp_path, family, dtype="bfloat16", head_dim=None if family == "qwen2" else 16)
    checkpoint = quantize_fp8(plain, tmp_path / "fp8", ["lm_head", "drafter*"])
    engine = build(checkpoint, tmp_path / "steps", gpu="rtx-4090")
    for network in json.loads((engine / "config.json").read_text())["networks"].values():
        assert network["layers"]["DEQUANTIZE"] == 2 * 5, "five linears in each of two layers"
        assert set(network["product_types"]) == {"BF16"}
    said = message(MismatchError, lambda: build(checkpoint, tmp_path / "other", gpu="rtx-3090"))
    assert "cannot compute in float8" in said and "its compute capability is 8.6, not 8.9" in said


@needs_compiler
def test_weights_inside(tmp_path: Path) -> None:
    """The plans are larger by the weights, which are no inputs any more; what is executed elsewhere is the same."""
    checkpoint = write_checkpoint(tmp_path, dtype="float32", vocab_size=2000)
    outside = build(checkpoint, tmp_path / "outside")
    inside = build(checkpoint, tmp_path / "inside", weights="inside")
    configs = [json.loads((engine / "config.json").read_text()) for engine in (inside, outside)]
    sizes = [config["networks"]["chain-greedy"]["plan_bytes"] for config in configs]
    assert [config["weights"] for config in configs] == ["inside", "inputs"]
    assert sizes[0] - sizes[1] > 2 * 2000 * 32 * 4, "embedding and LM head at least"
    asked = [Request((5, 9), SamplingParams(8))]
    assert load(inside).generate(asked)[0].token_ids == load(outside).generate(asked)[0].token_ids


@needs_compiler
def test_a_missing_operator_is_named(tmp_path: Path) -> None:
    graph = Graph()
    x = graph.input("x", FLOAT, [2, 3])
    graph.output("y", graph.op("Det", graph.op("MatMul", x, graph.op("Transpose", x))), FLOAT, [])
    said = message(BackendError, lambda: run_job(job_for(graph, tmp_path), tmp_path, what="a network"))
    assert "does not take Det" in said and "use the version in constraints.txt" in said


@needs_compiler
def test_too_little_memory(tmp_path: Path) -> None:
    graph = Graph()
    graph.output("y", graph.op("Relu", graph.input("x", FLOAT, [2, 3])), FLOAT, [2, 3])
    job = job_for(graph, tmp_path, memory_bytes=300 * 10**6)
    assert "tensorrt-rtx" in message(BackendError, lambda: run_job(job, tmp_path, what="a network"))


def job_for(graph: Graph, folder: Path, *, memory_bytes: int = 8 * 10**9) -> CompileJob:
    onnx.save(graph.model(), str(folder / "network.onnx"))
    places = {name: str(folder / name) for name in ("output", "result")}
    return CompileJob(
        compiler="tensorrt-rtx", model=str(folder / "network.onnx"), **places, capability=[8, 9], shapes={},
        memory_bytes=memory_bytes,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("ending", "said"),
    [
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "crashed while compiling a network"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", "was killed while compiling a network"),
        ("raise RuntimeError('broken wheel')", "broken wheel"),
    ],
)
def test_a_compiler_that_takes_its_process_down(tmp_path: Path, ending: str, said: str) -> None:
    job = CompileJob("tensorrt-rtx", "", "", str(tmp_path / "result"), [8, 9], {}, 10**9)
    with patch("trtllm_redrafter.backends.tensorrt.build._COMMAND", ["-c", ending]):
        assert said in message(BackendError, lambda: run_job(job, tmp_path, what="a network"))


def test_what_was_compiled_is_compared_with_what_was_asked() -> None:
    graph = Graph()
    graph.output("y", graph.op("Relu", graph.input("x", FLOAT, [2, 3])), FLOAT, [2, 3])
    good = {"inputs": {"x": "FLOAT"}, "outputs": {"y": "FLOAT"}, "product_types": {"FLOAT": 1}}
    check_outcome(CompileOutcome(**good), graph.model(), dtype="float32", network="chain-greedy")  # type: ignore[arg-type]
    for wrong in ({"inputs": {"x": "HALF"}}, {"outputs": {}}, {"product_types": {"FLOAT": 1, "HALF": 1}}):
        outcome = CompileOutcome(**good | wrong)  # type: ignore[arg-type]
        with pytest.raises(BackendError, match="compiled to something else"):
            check_outcome(outcome, graph.model(), dtype="float32", network="chain-greedy")


def test_cards_and_their_compilers(tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path, dtype="bfloat16")
    for card, compiler in (("rtx-4090", "tensorrt-rtx"), ("l4", "tensorrt-rtx"), ("h100-80gb", "tensorrt"),
                           ("h200", "tensorrt"), ("b200", "tensorrt")):  # fmt: skip
        plan = TensorRTBackend().plan(options(checkpoint, tmp_path / "steps", gpu=card))
        assert plan.compiler.name == plan.as_dict()["compiler"] == compiler and compiler in plan.render()
    forced = options(checkpoint, tmp_path / "steps", gpu="h100-80gb", compiler="tensorrt-rtx")
    said = message(MismatchError, lambda: TensorRTBackend().plan(forced))
    assert "tensorrt-rtx does not compile for H100 SXM 80 GB" in said and "9.0; known are 7.5, 8.0" in said
    on_host = options(checkpoint, tmp_path / "steps", gpu="h100-80gb")
    said = message(BackendError, lambda: TensorRTBackend().build(TensorRTBackend().plan(on_host), lambda *a: None))
    assert "measures its kernels on the GPU itself" in said and not (tmp_path / "steps").exists()
    turing = gpu("rtx-3090").__class__(**vars(gpu("rtx-3090")) | {"compute_capability": (7, 5)})
    assert "cannot compute in bfloat16" in message(MismatchError, lambda: choose_compiler(turing, "bfloat16"))


def test_a_missing_or_old_compiler() -> None:
    compiler = COMPILERS["tensorrt-rtx"]

    def missing() -> object:
        raise ImportError("No module named 'tensorrt_rtx_libs'")

    absent = compiler.__class__(**vars(compiler) | {"load": missing})
    said = message(BackendError, lambda: import_compiler(absent))
    assert "tensorrt-rtx is not installed" in said and "trtllm-redrafter[tensorrt-rtx]" in said
    old = type("module", (), {"__version__": "1.1", "INetworkDefinition": object})
    aged = compiler.__class__(**vars(compiler) | {"load": lambda: old})
    assert "1.1 is too old" in message(BackendError, lambda: import_compiler(aged))


def test_onnx_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "needs the package onnx" in message(BackendError, lambda: load_backend("tensorrt"))


def test_a_failed_build_leaves_nothing(tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path)
    where = "trtllm_redrafter.backends.tensorrt.build."
    failure = BackendError("the compiler crashed")
    with patch(where + "run_job", side_effect=failure), patch(where + "check_compiler", return_value="1"):
        assert "crashed" in message(BackendError, lambda: build(checkpoint, tmp_path / "steps"))
    assert not (tmp_path / "steps").exists() and not list(tmp_path.glob(".steps*"))
    build_without_compiler(checkpoint, tmp_path / "steps")
    assert "exists already" in message(OutputError, lambda: build_without_compiler(checkpoint, tmp_path / "steps"))
    where = "trtllm_redrafter.backends.tensorrt.build_plan.check_place"
    with patch(where, side_effect=OutputError("the disk is full")):
        assert "disk is full" in message(OutputError, lambda: build(checkpoint, tmp_path / "other"))


def test_limits_and_models_that_cannot_be(tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path)
    said = message(MismatchError, lambda: build(checkpoint, tmp_path / "steps", max_seq_len=4096))
    assert "exceeds the model's 256 positions" in said


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint and an engine beside it."""
    folder = tmp_path_factory.mktemp("pair")
    build_without_compiler(write_checkpoint(folder), folder / "steps")
    return folder


@pytest.fixture
def engine(pair: Path, tmp_path: Path) -> Path:
    shutil.copytree(pair, tmp_path / "pair")
    return tmp_path / "pair" / "steps"


def test_an_engine_finds_its_checkpoint_beside_itself(engine: Path, pair: Path) -> None:
    assert str(pair) not in str(engine)
    found = load(engine)._decoder
    found.close()
    (engine.parent / "checkpoint").rename(engine.parent / "elsewhere")
    assert json.loads((engine / "config.json").read_text())["checkpoint"]["path"] == str(pair / "checkpoint")
    load(engine).close()  # the place it was built from is still there


def test_a_checkpoint_that_changed(engine: Path) -> None:
    weights = engine.parent / "checkpoint" / "rank0.safetensors"
    data = bytearray(weights.read_bytes())
    data[-5] ^= 1
    weights.write_bytes(data)
    said = message(InputError, lambda: load(engine))
    assert "has changed since the engine was built" in said and "rank0.safetensors" in said


def test_a_checkpoint_that_is_gone(tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path)
    engine = build_without_compiler(checkpoint, tmp_path / "steps")
    shutil.rmtree(checkpoint)
    said = message(InputError, lambda: load(engine))
    assert "the engine's checkpoint is not there" in said and "build the engine again where it is now" in said


def test_an_engine_of_another_version_of_the_network(engine: Path) -> None:
    where = "trtllm_redrafter.backends.tensorrt.engine.network_sha256"
    with patch(where, return_value="0" * 64):
        runner = load(engine)
        said = message(BackendError, lambda: runner._decoder.prompt(0, [5], None))
    assert "is another one than this version makes" in said and "build it again" in said


def test_what_a_gpu_host_refuses(engine: Path) -> None:
    said = message(BackendError, lambda: load_on_stand_in(engine, HostLauncher(), version="1.9.0"))
    assert "built with tensorrt-rtx 1.7.1.116, this is 1.9.0" in said
    backend = TensorRTBackend()
    where = "trtllm_redrafter.backends.tensorrt.execution."

    def loaded() -> object:
        return backend.load(engine, device="auto", verify_hashes=False)

    version = type("module", (), {"__version__": "1.7.1.116"})
    with patch(where + "import_compiler", return_value=version):
        with patch("torch.cuda.is_available", return_value=False):
            assert "there is no GPU to run the plan on" in message(BackendError, loaded)
        with (
            patch("torch.cuda.is_available", return_value=True),
            patch("torch.cuda.get_device_name", return_value="NVIDIA H100 80GB HBM3"),
            patch("torch.cuda.get_device_capability", return_value=(9, 0)) as capability,
        ):
            said = message(BackendError, loaded)
            assert "H100 80GB HBM3 cannot run this engine" in said and "does not know compute capability 9.0" in said
            capability.return_value = (12, 0)
            assert "the plan is for another card" in message(BackendError, loaded)


def test_beams_are_compiled_in(engine: Path) -> None:
    def loaded() -> object:
        return TensorRTBackend().load(engine, device="auto", verify_hashes=False, draft_shape=DraftShape(2, 2))

    assert "drafts what it was compiled for" in message(UsageError, loaded)


def test_a_damaged_plan(engine: Path) -> None:
    plan = engine / "draft-greedy.plan.gz"
    plan.write_bytes(plan.read_bytes()[:-20])
    assert "the plan is damaged" in message(InputError, lambda: read_plan(plan))
    assert "size has changed" in message(InputError, lambda: load(engine))


def test_networks_are_the_same_bytes_each_time(pair: Path) -> None:
    checkpoint = Checkpoint.open(pair / "checkpoint")
    config = read_engine_config(pair / "steps")
    sizes = engine_sizes(checkpoint, config.draft_shape, max_seq_len=200, head_rows=0)
    for network in networks_of(sizes.draft):
        first, second = (make_network(sizes, network).SerializeToString() for _ in range(2))
        assert first == second


def test_what_verify_and_inspect_say_of_it(engine: Path) -> None:
    report = verify_files(engine, hashes=True)
    assert report.ok and "its plans are compared by hash only" in report.render()
    shown = inspect(engine).render()
    assert "engine of the tensorrt backend" in shown and "rtx-4090" in shown and "tensorrt-rtx" in shown
    assert set(inspect(engine).facts["draft"]) == {"num_beams", "draft_len"}
    against = verify(engine, against=engine.parent / "base", hashes=False, progress=no_progress)
    assert against.ok and "the weights are not in the engine and not compared" in against.render()
    (engine / "chain-greedy.plan.gz").write_bytes(b"")
    assert "size has changed" in verify_files(engine, hashes=True).render()
