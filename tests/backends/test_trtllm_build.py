"""Building against a trtllm-build that behaves as documented: whole runs, every kind of failure, interruption."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.cli.tiny import Program
from tests.engines import write_checkpoint, write_tokenizer
from tests.standins.host import GPU_LINE, ROOT, Host
from tests.trtllm_options import options, settings
from trtllm_redrafter.backends import load_backend
from trtllm_redrafter.backends.base import BuildOptions
from trtllm_redrafter.backends.tensorrt_llm.build_plan import plan_build
from trtllm_redrafter.backends.tensorrt_llm.builder import BuildProgress, warnings_in
from trtllm_redrafter.backends.tensorrt_llm.engine_dir import read_engine
from trtllm_redrafter.backends.tensorrt_llm.failures import FAILURES, explain
from trtllm_redrafter.checkpoint.manifest import Manifest
from trtllm_redrafter.errors import BackendError, InputError, OutputError, RedrafterError, UsageError
from trtllm_redrafter.fsio import read_json
from trtllm_redrafter.progress import Progress, no_progress
from trtllm_redrafter.run import api


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    write_tokenizer(folder / "tokenizer", 64)
    return write_checkpoint(folder, dtype="bfloat16", tp_size=2, num_beams=3, draft_len=3, head_dim=32)


def wanted(checkpoint: Path, folder: Path, *, cache: bool = False, **changes: Any) -> BuildOptions:
    trt = settings(cache=cache, cache_dir=folder / "cache", **changes)
    return options(
        trt, checkpoint=checkpoint, output=folder / "engine", tokenizer=checkpoint.parent / "tokenizer",
        max_batch_size=4, max_input_len=100, max_seq_len=200,
    )  # fmt: skip


def build(request: BuildOptions, progress: Progress = no_progress) -> Path:
    backend = load_backend("tensorrt-llm")
    return backend.build(backend.plan(request), progress)


def commands(host: Host) -> list[list[str]]:
    return [json.loads(line) for line in host.record.read_text().splitlines()] if host.record.exists() else []


def test_an_engine_is_complete(host: Host, checkpoint: Path, tmp_path: Path) -> None:
    stages: list[str] = []
    engine = build(wanted(checkpoint, tmp_path), lambda stage, done, total, unit: stages.append(stage))
    names = {p.name for p in engine.iterdir()}
    assert {"config.json", "rank0.engine", "rank1.engine", "redrafter.json", "manifest.json", "build.log"} < names
    assert (engine / "tokenizer" / "tokenizer.json").is_file()
    found = read_engine(engine, verify_hashes=True)
    assert found.world_size == 2 and found.greedy
    assert found.config.max_seq_len == 200 and found.config.version == "1.2.1"
    assert found.draft_shape is not None and found.draft_shape.num_beams == 3 and found.runtime.block_reuse is False
    built = json.loads((engine / "config.json").read_text())["build_config"]
    assert built["max_seq_len"] == 209 and built["max_draft_len"] == 9
    manifest = Manifest.read(engine)
    assert manifest.derived["versions"] == {"tensorrt_llm": "1.2.1", "tensorrt": "10.14.1.48.post1"} | {
        k: v for k, v in manifest.derived["versions"].items() if k == "cuda"
    }
    assert manifest.derived["gpu"] == "NVIDIA H100 80GB HBM3" and manifest.derived["driver"] == "580.82.07"
    assert manifest.options["max_num_tokens"] == 100 + 3 * 10 and not manifest.notes
    assert manifest.derived["builder_warnings"] == ["Specifying a `max_num_tokens` larger than usual."]
    assert any(stage.startswith("build: compiling, rank 0") or "engine written" in stage for stage in stages)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["engine", "host"]


def test_dry_run_of_the_command_starts_nothing(checkpoint: Path, tmp_path: Path) -> None:
    """No TensorRT-LLM, no GPU, no torch: the plan is there all the same."""
    flags = ["build", "--backend", "tensorrt-llm", "--checkpoint", str(checkpoint),
             "--output", str(tmp_path / "engine"), "--max-seq-len", "200", "--gpu", "h200",
             "--dry-run", "--json"]  # fmt: skip
    code = (
        f"import sys; from trtllm_redrafter.cli import run_app; code = run_app({flags!r}); "
        "bad = {'torch', 'transformers', 'tensorrt_llm'} & set(sys.modules); assert not bad, bad; sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout.splitlines()[-1])
    assert document["plan"]["gpu"] == "h200" and document["plan"]["tp_size"] == 2
    assert {"name": "max_draft_len", "given": "0", "becomes": "9", "why": "3 beams x 3 from config.json"} in (
        document["plan"]["changes"]
    )
    assert "--opt_num_tokens" in done.stdout and "KV cache" in done.stdout and not (tmp_path / "engine").exists()


@pytest.mark.parametrize(
    ("how", "says", "remedy"),
    [
        ("oom", "not enough free memory", "max_batch_size"),
        ("kernel", "no attention kernel", "another KV cache type"),
        ("exit", "failed with exit code 1", "read the log"),
        ("killed", "was killed", "more memory"),
        ("missing-rank", "engine is incomplete", "read the log"),
    ],
)
def test_failures_are_explained_and_leave_no_engine(
    host: Host, checkpoint: Path, tmp_path: Path, how: str, says: str, remedy: str
) -> None:
    host.builds(how)
    with pytest.raises(BackendError) as caught:
        build(wanted(checkpoint, tmp_path, cache=True))
    assert says in caught.value.render() and remedy in caught.value.render()
    left = {p.name for p in tmp_path.iterdir()}
    assert left - {"cache"} == {"engine.build.log", "host"}, "the log stays, and nothing else"
    assert not list((tmp_path / "cache").glob("engines/*"))
    host.builds("ok")
    assert build(wanted(checkpoint, tmp_path)).is_dir() and not (tmp_path / "engine.build.log").exists()


def test_a_tokenizer_that_trtllm_serve_cannot_use(checkpoint: Path, tmp_path: Path) -> None:
    """It reads the model type beside the tokenizer; a checkpoint's config.json has none."""
    tokenizer = write_tokenizer(tmp_path / "tokenizer")

    def warned() -> bool:
        plan = plan_build(replace(wanted(checkpoint, tmp_path), tokenizer=tokenizer))
        return any("`trtllm-serve` reads it" in (p.why or "") for p in plan.warnings)

    assert warned()
    (tokenizer / "config.json").write_text('{"architecture": "ReDrafterForLLaMALM"}')
    assert warned()
    (tokenizer / "config.json").write_text('{"model_type": "llama"}')
    assert not warned()


def test_a_failed_rebuild_keeps_the_old_engine(host: Host, checkpoint: Path, tmp_path: Path) -> None:
    request = wanted(checkpoint, tmp_path)
    before = Manifest.read(build(request)).created
    with pytest.raises(OutputError, match="exists already"):
        build(request)
    host.builds("oom")
    with pytest.raises(BackendError):
        build(replace(request, overwrite=True))
    assert Manifest.read(tmp_path / "engine").created == before
    assert not read_engine(tmp_path / "engine", verify_hashes=True).path.with_suffix(".partial").exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interruption_ends_the_child_and_cleans_up(
    host: Host, checkpoint: Path, tmp_path: Path, number: signal.Signals
) -> None:
    pid_file = tmp_path / "host" / "pid"
    environment = os.environ | {"STANDIN_BUILD": "sleep", "STANDIN_PID": str(pid_file)}
    flags = ["build", "--backend", "tensorrt-llm", "--checkpoint", str(checkpoint),
             "--output", str(tmp_path / "engine"), "--max-seq-len", "200",
             "--set", "tensorrt_llm.cache=false"]  # fmt: skip
    command = [sys.executable, "-m", "trtllm_redrafter", *flags]
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True, cwd=ROOT) as program:
        deadline = time.monotonic() + 60
        while not pid_file.exists() or not pid_file.read_text():
            assert program.poll() is None, program.stderr and program.stderr.read()
            assert time.monotonic() < deadline
            time.sleep(0.05)
        program.send_signal(number)
        code = program.wait(60)
    assert code == 128 + number
    assert not Path(f"/proc/{pid_file.read_text()}").exists(), "the builder outlived us"
    assert {p.name for p in tmp_path.iterdir()} == {"engine.build.log", "host"}


def test_the_cache_builds_the_same_thing_once(host: Host, checkpoint: Path, tmp_path: Path) -> None:
    first = build(wanted(checkpoint, tmp_path, cache=True))
    log = (first / "build.log").read_text()
    again = build(replace(wanted(checkpoint, tmp_path, cache=True), output=tmp_path / "second"))
    assert len(commands(host)) == 1 and Manifest.read(again).derived["from_cache"] is True
    assert (again / "rank0.engine").read_bytes() == (first / "rank0.engine").read_bytes() and log
    assert read_engine(again, verify_hashes=True).draft_shape == read_engine(first, verify_hashes=True).draft_shape
    changed = wanted(checkpoint, tmp_path, cache=True, flags={"tokens_per_block": 64})
    build(replace(changed, output=tmp_path / "third"))
    host.package("tensorrt", "10.14.2")
    build(replace(wanted(checkpoint, tmp_path, cache=True), output=tmp_path / "fourth"))
    host.gpus(GPU_LINE.replace("580.82.07", "590.1"))  # another driver is no reason to build again
    build(replace(wanted(checkpoint, tmp_path, cache=True), output=tmp_path / "fifth"))
    assert len(commands(host)) == 3
    entry = next((tmp_path / "cache" / "engines").iterdir())
    (entry / "rank0.engine").unlink()
    (entry / "rank0.engine").write_bytes(b"damaged")
    for name in ("sixth", "seventh", "eighth"):
        build(replace(wanted(checkpoint, tmp_path, cache=True), output=tmp_path / name))
    assert (tmp_path / "eighth" / "rank0.engine").read_bytes() == (first / "rank0.engine").read_bytes()


def test_the_cache_keeps_no_end_tokens(host: Host, checkpoint: Path, tmp_path: Path) -> None:
    """generation_config.json is the tokenizer's: another one must neither find nor overwrite the cached engine's."""
    ends: dict[str, list[Any]] = {}
    for name, end in (("first", 5), ("second", None), ("third", 7)):
        tokenizer = write_tokenizer(tmp_path / f"tokenizer-{name}", 64)
        if end is not None:
            (tokenizer / "generation_config.json").write_text(json.dumps({"eos_token_id": [end]}))
        request = replace(wanted(checkpoint, tmp_path, cache=True), tokenizer=tokenizer, output=tmp_path / name)
        engine = build(request)
        found = engine / "generation_config.json"
        ends[name] = read_json(found)["eos_token_id"] if found.exists() else []
    assert ends == {"first": [5], "second": [], "third": [7]} and len(commands(host)) == 1
    Manifest.read(tmp_path / "first").check_files(tmp_path / "first", hashes=True)


def test_measured_kernels_are_kept_and_recorded(host: Host, checkpoint: Path, tmp_path: Path) -> None:
    first = build(wanted(checkpoint, tmp_path, cache=True))
    assert Manifest.read(first).derived["timing_cache"]["used_sha256"] is None
    second = build(replace(wanted(checkpoint, tmp_path, cache=True, workers=2), output=tmp_path / "second"))
    used = Manifest.read(second).derived["timing_cache"]["used_sha256"]
    assert used == Manifest.read(first).files["timing.cache"].sha256
    assert "--input_timing_cache" not in commands(host)[0] and "--input_timing_cache" in commands(host)[1]
    assert read_json(tmp_path / "cache" / "times.json")


def test_builds_that_share_a_cache_do_not_meet(tmp_path: Path) -> None:
    """Two processes at once: neither may take the other's unfinished file for its own."""
    code = (
        "import sys; from pathlib import Path; "
        "from trtllm_redrafter.backends.tensorrt_llm.engine_cache import BuildIdentity, EngineCache; "
        "folder, name = Path(sys.argv[1]), sys.argv[2]; file = folder / name; "
        "file.write_bytes(name.encode() * 200000); "
        "cache = EngineCache(folder / 'cache'); identity = BuildIdentity({}, (), {'tensorrt': '1'}, 'gpu')\n"
        "for _ in range(150): cache.keep_timing_cache(identity, file); cache.remember_seconds(name, 1.0)"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    running = [subprocess.Popen([*command, name], cwd=ROOT, stderr=subprocess.PIPE, text=True) for name in "ab"]
    assert [process.communicate()[1] for process in running] == ["", ""]
    (kept,) = (tmp_path / "cache" / "timing").iterdir()
    assert len(set(kept.read_bytes())) == 1 and read_json(tmp_path / "cache" / "times.json")


def test_a_cache_that_cannot_be_written_costs_no_engine(host: Host, checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file where the cache should be")
    engine = build(wanted(checkpoint, tmp_path, cache=True))
    assert "was not cached" in Manifest.read(engine).notes[0]


def test_a_build_that_differs_from_its_plan_is_noted(host: Host, checkpoint: Path, tmp_path: Path) -> None:
    host.builds("surprise")
    engine = build(wanted(checkpoint, tmp_path))
    assert Manifest.read(engine).notes == ("max_seq_len is 1000, the plan said 209",)


def test_verify_knows_the_engine(
    host: Host, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    engine, program = build(wanted(checkpoint, tmp_path)), Program(capsys)
    assert program("verify", engine) == 0 and "all checks passed" in program.out
    (engine / "rank1.engine").write_bytes(b"x" * (engine / "rank1.engine").stat().st_size)
    assert program("verify", engine) == 8 and "content has changed" in program.err


def test_the_python_api_takes_the_settings(host: Host, checkpoint: Path, tmp_path: Path) -> None:
    host.gpus(GPU_LINE.replace("H100 80GB HBM3, 81559", "H200, 143771"))
    made = {"gpu": "h200", "cache": False}
    folder = checkpoint.parent / "tokenizer"
    engine = api.build(checkpoint, tmp_path / "engine", backend="tensorrt-llm", tokenizer=folder, tensorrt_llm=made)
    assert Manifest.read(engine).derived["gpu"] == "NVIDIA H200"
    with pytest.raises(UsageError, match="gpu_kind"):
        api.build(checkpoint, tmp_path / "other", backend="tensorrt-llm", tensorrt_llm={"gpu_kind": "h200"})


def refused(request: BuildOptions) -> str:
    with pytest.raises(RedrafterError) as caught:
        build(request)
    assert not request.output.exists()
    return caught.value.render()


def test_what_the_host_lacks_comes_at_once(
    host: Host, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    host.gpus("NVIDIA L40S, 46068, 45000, 8.9, 580.82.07")
    host.package("tensorrt_llm", "1.1.0")
    text = refused(wanted(checkpoint, tmp_path))
    assert "the GPU is NVIDIA L40S" in text and "tensorrt_llm 1.1.0 is installed" in text and "release:1.2.1" in text
    monkeypatch.setenv("PATH", "/nowhere")
    text = refused(wanted(checkpoint, tmp_path))
    assert "trtllm-build is not installed" in text and "no NVIDIA GPU" in text
    assert not commands(host)


def test_different_gpus_are_refused_for_several_ranks(host: Host, checkpoint: Path, tmp_path: Path) -> None:
    host.gpus(GPU_LINE, "NVIDIA H200, 143771, 143000, 9.0, 580.82.07")
    assert "the GPUs differ" in refused(wanted(checkpoint, tmp_path))
    host.gpus(GPU_LINE.replace("81000", "0"), GPU_LINE)
    assert "is in use" in refused(wanted(checkpoint, tmp_path))
    host.gpus("NVIDIA H100 PCIe, 40000, 39000, 9.0, 580.82.07")
    assert "it has 42 GB" in refused(wanted(checkpoint, tmp_path))


def test_a_damaged_checkpoint_is_found_before_the_child(host: Host, checkpoint: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in checkpoint.iterdir():
        if file.is_file():
            (broken / file.name).write_bytes(file.read_bytes())
    config = read_json(broken / "config.json")
    (broken / "config.json").write_text(json.dumps(config | {"redrafter_num_layers": 3}))
    (broken / "manifest.json").unlink(missing_ok=True)
    text = refused(replace(wanted(checkpoint, tmp_path), checkpoint=broken))
    assert "drafter.layers.2.linear.weight" in text and not commands(host)
    (broken / "rank1.safetensors").unlink()
    assert "rank1.safetensors is missing" in refused(replace(wanted(checkpoint, tmp_path), checkpoint=broken))


def test_an_engine_that_lost_a_file_is_refused(host: Host, checkpoint: Path, tmp_path: Path) -> None:
    engine = build(wanted(checkpoint, tmp_path))
    (engine / "rank1.engine").unlink()
    with pytest.raises(InputError, match=r"rank1\.engine is missing"):
        read_engine(engine, verify_hashes=False)


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("gpu-memory", "[TRT] [E] 2: [virtualMemoryBuffer.cpp::resizePhysical] Error Code 2: OutOfMemory"),
        ("gpu-memory", "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB"),
        ("no-implementation", "[TRT] [E] Could not find any implementation for node {ForeignNode[...]}."),
        ("missing-kernel", "No available XQA kernels are found for speculative decoding mode."),
        ("missing-tensors", "RuntimeError: Required but not provided tensors:{'drafter.rnn_u.weight'}"),
        ("mpi", "ImportError: libmpi.so.40: cannot open shared object file: No such file or directory"),
        ("cuda-library", "ImportError: libcublasLt.so.13: cannot open shared object file: No such file"),
        ("disk", "OSError: [Errno 28] No space left on device"),
        ("unknown-flag", "trtllm-build: error: unrecognized arguments: --max_output_len 3"),
        ("version", "The engine plan file is not compatible: version mismatch, expecting 10.14 got 10.11"),
        ("mpi-spawn", "mpi4py.MPI.Exception: MPI_ERR_SPAWN: could not spawn processes"),
        ("nccl", "Failed, NCCL error cpp/tensorrt_llm/runtime/ncclCommunicator.cpp:111 'unhandled system error'"),
        ("slurm-pmi", 'The application appears to have been direct launched using "srun", but OMPI was not built with'),
        ("wrong-sm", "The engine plan file is generated on an incompatible device, expecting compute 9.0 got 8.9"),
    ],
)
def test_known_messages(name: str, line: str) -> None:
    found = explain(f"something before\n{line}\nsomething after")
    assert found is not None and found.name == name


def test_the_failure_table_is_complete() -> None:
    assert all(f.what and f.remedy for f in FAILURES) and len({f.name for f in FAILURES}) == len(FAILURES)
    assert explain("[TRT-LLM] [I] Total time of building all engines: 00:00:41") is None


def test_progress_from_the_log() -> None:
    state = BuildProgress(ranks=2)
    lines = ["[TRT-LLM] [I] Set gemm_plugin to bfloat16.", "[TRT-LLM] [I] Build TensorRT engine Unnamed Network 0",
             "[TRT-LLM] [I] Serializing engine to x/rank0.engine...", "[TRT-LLM] [I] Engine serialized."]  # fmt: skip
    headlines = []
    for line in lines:
        state.line(line)
        headlines.append(state.headline)
    assert headlines[:2] == ["build: reading the configuration, rank 0", "build: compiling, rank 0"]
    assert headlines[-1] == "build: engine written, rank 1"
    assert warnings_in("[TRT-LLM] [W] a\n[TRT-LLM] [W] a\n[TRT-LLM] [W] b\n[TRT-LLM] [I] c") == ["a", "b"]
