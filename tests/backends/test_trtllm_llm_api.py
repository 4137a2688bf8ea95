"""The LLM API in the executor's place: the same texts, figures and errors, from a stand-in of documented signatures."""

from __future__ import annotations

import gc
import json
import os
import re
import shutil
import time
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.backends.trtllm_engines import VOCAB, build, expected, run
from tests.engines import build_engine, write_checkpoint, write_tokenizer
from tests.standins.host import CONTRACT, GPU_LINE, Host
from tests.trtllm_options import settings
from trtllm_redrafter.backends.base import FinishReason, Request, Result, Runner, SamplingParams
from trtllm_redrafter.backends.tensorrt_llm.backend import TensorRTLLMBackend
from trtllm_redrafter.backends.tensorrt_llm.client import ClientRequest, Event
from trtllm_redrafter.backends.tensorrt_llm.options import Api, RuntimeOptions
from trtllm_redrafter.backends.tensorrt_llm.remote_client import worker_command, worker_environment
from trtllm_redrafter.checkpoint.manifest import Manifest
from trtllm_redrafter.errors import BackendError, UsageError
from trtllm_redrafter.fsio import read_json, write_json
from trtllm_redrafter.run.options import tensorrt_llm_options
from trtllm_redrafter.run.session import open_runner
from trtllm_redrafter.settings.layers import Layer, Origin, resolve
from trtllm_redrafter.verify.inspect import inspect

RUNTIME = replace(settings().runtime, api="llm")
SLURM = {"SLURM_JOB_ID": "7"}


def load(engine: Path, api: Api | None = "llm", device: str = "auto") -> Runner:
    return TensorRTLLMBackend().load(engine, device=device, verify_hashes=False, draft_shape=None, api=api)


def timeless(results: list[Result]) -> list[dict[str, Any]]:
    """Everything but times and ids."""
    unequal = ("request_id", "queue_seconds", "prefill_seconds", "decode_seconds", "tokens_per_second")
    return [{k: v for k, v in result.as_dict().items() if k not in unequal} for result in results]


def both(engine: Path, *prompts: tuple[int, ...], **sampling: Any) -> list[Result]:
    """The LLM API's results, which are the executor's."""
    found = []
    for api in ("executor", "llm"):
        runner = load(engine, api)  # type: ignore[arg-type]
        found.append(run(runner, *prompts, **sampling))
        runner.close()
    assert timeless(found[0]) == timeless(found[1])
    return found[1]


def test_texts_and_figures_are_the_executors(host: Host, checkpoints: Path, tmp_path: Path) -> None:
    results = both(build(checkpoints, tmp_path), (5, 6), (7,), (100, 3), ignore_eos=True)
    assert [r.token_ids for r in results] == [expected(p, 20, end=-1) for p in ((5, 6), (7,), (100, 3))]
    assert (
        results[0].steps == 7 and results[0].accepted_per_position == [5, 4, 2, 1] and results[0].drafted_tokens == 28
    )


def test_streaming_gives_steps(host: Host, checkpoints: Path, tmp_path: Path) -> None:
    runner = load(build(checkpoints, tmp_path))
    updates = list(runner.stream(Request((5, 6), SamplingParams(max_tokens=10, ignore_eos=True))))
    assert [len(u.token_ids) for u in updates] == [1, 3, 4, 2]
    assert "".join(u.text for u in updates) == (updates[-1].result or Result("", 0)).text
    runner.close()


def test_end_tokens(host: Host, checkpoints: Path, tmp_path: Path) -> None:
    """The first is the API's end token, the other one a stop token; both stay in the output."""
    engine = build(checkpoints, tmp_path)
    start = next(p for p in range(3, VOCAB) if 2 in expected((p,), 9)[1:])
    (ended,) = both(engine, (start,))
    assert ended.token_ids[-1] == 2 and ended.finish_reason is FinishReason.STOP
    other = expected((50,), 6, end=-1)[-1]
    models = Path(shutil.copytree(checkpoints, tmp_path / "models"))
    (models / "tokenizer" / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, other]}))
    (tmp_path / "again").mkdir()
    engine = build(models, tmp_path / "again")
    (stopped,) = both(engine, (50,))
    assert stopped.token_ids == expected((50,), 6, end=-1) and stopped.finish_reason is FinishReason.STOP
    (whole,) = both(engine, (50,), ignore_eos=True)
    assert len(whole.token_ids) == 20 and whole.finish_reason is FinishReason.LENGTH


def test_end_tokens_of_the_bases_config_json(host: Host, tmp_path: Path) -> None:
    """They reach the engine through the checkpoint's manifest."""
    models = tmp_path / "models"
    write_tokenizer(models / "tokenizer")
    sizes = {"dtype": "bfloat16", "num_beams": 3, "draft_len": 4, "vocab_size": VOCAB, "head_dim": 32}
    other = expected((50,), 6, end=-1)[-1]
    write_checkpoint(models / "one", eos_token_id=[other], **sizes)  # type: ignore[arg-type]
    engine = build(models, tmp_path)
    assert read_json(engine / "redrafter.json")["eos_token_ids"] == [2, other] == inspect(engine).facts["eos_token_ids"]
    (stopped,) = both(engine, (50,))
    assert stopped.token_ids == expected((50,), 6, end=-1) and stopped.finish_reason is FinishReason.STOP


def test_stop_token_ids_are_the_executors_to_find(host: Host, checkpoints: Path, tmp_path: Path) -> None:
    engine = build(checkpoints, tmp_path)
    tokens = expected((50,), 20, end=-1)
    (stopped,) = both(engine, (50,), ignore_eos=True, stop_token_ids=(tokens[5],))
    assert stopped.token_ids == tokens[:6] and stopped.stop_reason == tokens[5]
    assert stopped.finish_reason is FinishReason.STOP
    (whole,) = both(engine, (50,), ignore_eos=True, skip_special_tokens=False)
    assert whole.token_ids == tokens


def test_stop_strings_across_token_borders(host: Host, checkpoints: Path, tmp_path: Path) -> None:
    engine = build(checkpoints, tmp_path)
    (whole,) = both(engine, (258,), ignore_eos=True)
    piece = whole.text[2:4]
    (stopped,) = both(engine, (258,), ignore_eos=True, stop=(piece,))
    assert stopped.text == whole.text[: whole.text.index(piece)] and stopped.stop_reason == piece


def test_cancel(host: Host, checkpoints: Path, tmp_path: Path) -> None:
    runner = load(build(checkpoints, tmp_path))
    request_id = runner.submit(Request((5,), SamplingParams(max_tokens=90, ignore_eos=True)))
    other = runner.submit(Request((6,), SamplingParams(max_tokens=8, ignore_eos=True)))
    runner.step()
    result = runner.cancel(request_id)
    assert result is not None and result.finish_reason is FinishReason.CANCELLED
    found = {}
    while runner.has_work:
        found |= {u.request_id: u.result for u in runner.step() if u.result}
    assert set(found) == {other} and found[other].token_ids == expected((6,), 8, end=-1)  # type: ignore[union-attr]
    runner.close()


def test_merged_responses_are_counted_by_iterations(
    host: Host, checkpoints: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STANDIN_RUN", "merge")
    (result,) = both(build(checkpoints, tmp_path), (5, 6), ignore_eos=True)
    assert result.steps == 7 and result.accepted_tokens == 12 and result.drafted_tokens == 28
    assert result.accepted_per_position == []


def test_without_iterations_steps_are_responses(
    host: Host, checkpoints: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STANDIN_RUN", "no-iterations")
    (result,) = both(build(checkpoints, tmp_path), (5, 6), ignore_eos=True)
    assert result.steps == 7 and sum(result.accepted_per_position) == result.accepted_tokens == 12


def test_sampling_without_a_drafter(host: Host, checkpoints: Path, tmp_path: Path) -> None:
    (result,) = both(
        build(checkpoints, tmp_path, "plain"), (5, 6), temperature=0.7, top_k=5, top_p=0.9, seed=3, ignore_eos=True
    )
    assert len(result.token_ids) == 20 and result.drafted_tokens == 0


def test_no_tokenizer_is_needed(host: Host, checkpoints: Path, tmp_path: Path) -> None:
    (result,) = both(build(checkpoints, tmp_path, tokenizer=False), (5, 6))
    assert result.token_ids == expected((5, 6), 20, end=-1) and result.text == ""


def test_settings_reach_the_api(host: Host, checkpoints: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """KV cache and multi-block mode as the engine's directory says; the GPU by what the worker sees."""
    host.gpus(GPU_LINE, GPU_LINE)
    monkeypatch.setenv("STANDIN_LLM_RECORD", str(tmp_path / "seen.json"))
    runtime = RuntimeOptions(kv_cache_fraction=0.5, block_reuse=True, multi_block_mode=False, api="llm")
    engine = build(checkpoints, tmp_path, runtime=runtime)
    load(engine, None, "cuda:1").close()
    seen = read_json(tmp_path / "seen.json")
    assert seen["kv"] == {"enable_block_reuse": True, "free_gpu_memory_fraction": 0.5, "max_tokens": None}
    TensorRTLLMBackend().load(
        engine, device="auto", verify_hashes=False, draft_shape=None, api="llm", kv_cache_tokens=4096
    ).close()
    assert read_json(tmp_path / "seen.json")["kv"]["max_tokens"] == 4096
    assert seen["knobs"] == {"multi_block_mode": False}
    assert seen["environment"]["CUDA_VISIBLE_DEVICES"] == "1"
    assert seen["environment"]["TLLM_WORKER_USE_SINGLE_PROCESS"] == "1"
    assert "TLLM_WORKER_USE_SINGLE_PROCESS" not in os.environ and "CUDA_VISIBLE_DEVICES" not in os.environ
    assert worker_environment(1, "llm", 1, {"CUDA_VISIBLE_DEVICES": "4,6"})["CUDA_VISIBLE_DEVICES"] == "6"
    operator = {"TLLM_WORKER_USE_SINGLE_PROCESS": "0"}
    assert worker_environment(1, "llm", None, operator)["TLLM_WORKER_USE_SINGLE_PROCESS"] == "0"
    assert worker_environment(2, "executor", None, {"PATH": "/bin"}) == {"PATH": "/bin"}


def test_the_recipe_chooses_and_the_engine_keeps_it(host: Host, checkpoints: Path, tmp_path: Path) -> None:
    resolved = resolve([Layer(Origin("file", "recipe.yaml"), {"tensorrt_llm": {"api": "llm"}})])
    assert tensorrt_llm_options(resolved).runtime.api == "llm"
    assert tensorrt_llm_options(resolve([])).runtime.api == "executor"
    engine = build(checkpoints, tmp_path, runtime=RUNTIME)
    assert read_json(engine / "redrafter.json")["runtime"]["api"] == "llm"
    found = {}
    for api in (None, "executor"):
        runner = load(engine, api)  # type: ignore[arg-type]
        found[api] = type(runner._client).__name__  # type: ignore[attr-defined]
        runner.close()
    assert found == {None: "RemoteClient", "executor": "ExecutorClient"}


@pytest.mark.parametrize(("layers", "client"), [
    ([], "RemoteClient"),
    ([Layer(Origin("flag", "--api"), {"tensorrt_llm": {"api": "executor"}})], "ExecutorClient"),
    ([Layer(Origin("file", "recipe.yaml"), {"tensorrt_llm": {"api": "executor"}})], "ExecutorClient"),
])  # fmt: skip
def test_a_run_may_choose_another(
    host: Host, checkpoints: Path, tmp_path: Path, layers: list[Layer], client: str
) -> None:
    engine = build(checkpoints, tmp_path, runtime=RUNTIME)
    chosen = resolve([*layers, Layer(Origin("flag", "--engine"), {"engine": str(engine)})])
    runner = open_runner(chosen, verify_hashes=False)
    assert type(runner._client).__name__ == client  # type: ignore[attr-defined]
    runner.close()


def test_torch_engines_have_no_choice(tmp_path: Path) -> None:
    engine = build_engine(write_checkpoint(tmp_path), tmp_path / "engine")
    here = Layer(Origin("flag", "--engine"), {"engine": str(engine)})
    choice = {"tensorrt_llm": {"api": "llm"}}
    open_runner(resolve([Layer(Origin("file", "recipe.yaml"), choice), here]), verify_hashes=False).close()
    with pytest.raises(UsageError, match="only TensorRT-LLM engines"):
        open_runner(resolve([Layer(Origin("flag", "--api"), choice), here]), verify_hashes=False)


def edit_notes(engine: Path, **changes: Any) -> None:
    notes = read_json(engine / "redrafter.json")
    notes["runtime"] = {k: v for k, v in {**notes["runtime"], **changes}.items() if v is not None}
    write_json(engine / "redrafter.json", notes)
    manifest = read_json(engine / "manifest.json")
    manifest["files"] = {k: v for k, v in manifest["files"].items() if k != "redrafter.json"}
    write_json(engine / "manifest.json", manifest)
    assert Manifest.read(engine)


def test_engines_from_before_the_choice(host: Host, checkpoints: Path, tmp_path: Path) -> None:
    engine = build(checkpoints, tmp_path)
    edit_notes(engine, api=None)
    runner = load(engine, None)
    assert run(runner, (5, 6))[0].token_ids == expected((5, 6), 20)
    runner.close()
    edit_notes(engine, api="executor", lookahead=True)
    with pytest.raises(BackendError, match="does not know"):
        load(engine, None)
    edit_notes(engine, api="triton", lookahead=None)
    with pytest.raises(BackendError, match="no interface 'triton'"):
        load(engine, None)


@pytest.mark.parametrize(
    ("how", "says"),
    [("load-oom", "not enough free memory"), ("response-error", "free memory"), ("die", "ended unexpectedly")],
)
def test_failures_are_explained(
    host: Host, checkpoints: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str, says: str
) -> None:
    monkeypatch.setenv("STANDIN_RUN", how)
    engine = build(checkpoints, tmp_path)
    with pytest.raises(BackendError) as caught:
        run(load(engine), (5, 6))
    assert says in caught.value.render() and "remedy" in caught.value.render()


def test_a_refused_request_does_not_end_the_others(
    host: Host, checkpoints: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STANDIN_RUN", "error")
    runner = load(build(checkpoints, tmp_path))
    with pytest.raises(BackendError, match="prompt is refused"):
        run(runner, (9,))
    assert run(runner, (5, 6), ignore_eos=True)[0].token_ids == expected((5, 6), 20, end=-1)
    runner.close()


def test_wrong_versions(host: Host, checkpoints: Path, tmp_path: Path) -> None:
    engine = build(checkpoints, tmp_path)
    host.package("tensorrt_llm", "1.2.0")
    with pytest.raises(BackendError, match=re.escape("of 1.2.1, installed is 1.2.0")):
        load(engine)
    host.package("tensorrt_llm", "1.2.1")
    shutil.rmtree(host.packages / "tensorrt_llm" / "_tensorrt_engine")
    with pytest.raises(BackendError) as caught:
        load(engine)
    assert "tensorrt_llm._tensorrt_engine cannot be imported" in caught.value.render()
    run(load(engine, "executor"), (5, 6))


def alive(pid: int) -> bool:
    """Running, not only waiting for its parent to take notice of its end."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def gone(pids: list[int]) -> bool:
    """Within a second, since those that MPI or Slurm started are not ours to wait for."""
    deadline = time.monotonic() + 1
    while any(map(alive, pids)) and time.monotonic() < deadline:
        time.sleep(0.01)
    return not any(map(alive, pids))


@pytest.mark.parametrize("slurm", [False, True])
def test_several_gpus(
    host: Host, checkpoints: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, slurm: bool
) -> None:
    """One worker holds the LLM object, whose ranks are spawned by it, or by srun and the launcher."""
    host.gpus(GPU_LINE, GPU_LINE)
    (ranks := tmp_path / "ranks").mkdir()
    monkeypatch.setenv("STANDIN_RANKS", str(ranks))
    monkeypatch.setenv("STANDIN_LLM_RECORD", str(tmp_path / "seen.json"))
    host.program("mpirun", "#!/bin/sh\nexit 1\n")
    if slurm:
        host.slurm()
    runner = load(build(checkpoints, tmp_path, "two"))
    for prompt in ((5, 6), (7,)):
        assert run(runner, prompt, ignore_eos=True)[0].token_ids == expected(prompt, 20, 260, end=-1)
    runner.submit(Request((5,), SamplingParams(max_tokens=90, ignore_eos=True)))
    pids = [int((ranks / f"rank{r}").read_text()) for r in range(2)]
    assert os.getpid() not in pids and all(map(alive, pids))
    runner.close()
    assert gone(pids)
    seen = read_json(tmp_path / "seen.json")["environment"]
    assert seen["TLLM_WORKER_USE_SINGLE_PROCESS"] is None and seen["SLURM_PROCID"] is None
    assert seen["TLLM_SPAWN_PROXY_PROCESS"] == ("1" if slurm else None)


@pytest.mark.parametrize(("how", "says"), [("load-oom", "not enough free memory"), ("die", "ended unexpectedly")])
def test_a_crash_under_slurm_is_noticed(
    host: Host, checkpoints: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str, says: str
) -> None:
    """Although the launcher's server goes on, with our pipe open; nothing is left over, closed or not."""
    host.gpus(GPU_LINE, GPU_LINE)
    host.slurm()
    (ranks := tmp_path / "ranks").mkdir()
    monkeypatch.setenv("STANDIN_RANKS", str(ranks))
    monkeypatch.setenv("STANDIN_RUN", how)
    engine = build(checkpoints, tmp_path, "two")
    with pytest.raises(BackendError, match=says):
        run(load(engine), (5, 6))
    assert gone([int(file.read_text()) for file in ranks.iterdir()])


def test_the_command_under_slurm(host: Host) -> None:
    host.slurm()
    command = worker_command(Path("/engines/a"), 4, "llm", SLURM | {"PATH": str(host.programs)})
    assert command[:7] == ["srun", "--mpi=pmix", "--input=0", "--overlap", "--kill-on-bad-exit=1", "-n", "4"]
    assert command[8:] == [
        "-m", "trtllm_redrafter.backends.tensorrt_llm.llmapi_launch", "outside", "/engines/a", "--api", "llm",
    ]  # fmt: skip
    for ranks, environment in ((4, {}), (1, SLURM)):
        (_, *rest) = worker_command(Path("/engines/a"), ranks, "llm", environment)
        assert rest == ["-m", "trtllm_redrafter.backends.tensorrt_llm.worker", "/engines/a", "--api", "llm"]
    with pytest.raises(BackendError, match="splits its command at blanks"):
        worker_command(Path("/my engines/a"), 4, "llm", SLURM | {"PATH": str(host.programs)})
    with pytest.raises(BackendError, match="trtllm-llmapi-launch is not installed"):
        worker_command(Path("/engines/a"), 4, "llm", SLURM | {"PATH": "/nowhere"})


def test_the_client_uses_documented_names_only(host: Host, checkpoints: Path, tmp_path: Path) -> None:
    """In this process, where a name that is not in the tables is an error at once."""
    from trtllm_redrafter.backends.tensorrt_llm.llm_client import ENGINE_API, LLM_API, LlmClient

    tables = read_json(CONTRACT / "llm_api.json")
    assert all(row.get("source") for name, row in tables.items() if name != "_meta")
    assert {ENGINE_API, LLM_API} <= set(tables)
    host.monkeypatch.setenv("TLLM_WORKER_USE_SINGLE_PROCESS", "1")
    client = LlmClient(build(checkpoints, tmp_path), runtime=RUNTIME, tp_size=1)
    request = ClientRequest(4, [5, 6], 6, 2, [[3]], {"temperature": 0.5, "top_k": 3, "top_p": 0.9, "seed": 1})
    client.submit(request)
    events: list[Event] = []
    while not events or not events[-1].final:
        events += client.poll(5)
    assert [t for e in events for t in e.token_ids] == expected((5, 6), 6) and {e.number for e in events} == {4}
    assert events[-1].final and events[-1].finish == "length" and events[-1].decoding_iter == len(events)
    assert events[-1].drafted_tokens == 4 * (len(events) - 1)
    with pytest.raises(ValueError, match="too many values"):
        client.submit(replace(request, stop_words=[[3, 4]]))
    client.close()
    client.close()
    client.cancel(4)  # of an engine that is gone: nothing to do
    with pytest.raises(BackendError, match="has been closed"):
        client.submit(request)


def test_ranks_are_ended_whatever_became_of_the_requests(
    host: Host, checkpoints: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A loop that does not get to its requests in time must not keep the GPUs."""
    from trtllm_redrafter.backends.tensorrt_llm import llm_client

    monkeypatch.setenv("TLLM_WORKER_USE_SINGLE_PROCESS", "1")
    monkeypatch.setattr(llm_client, "_CLOSE_SECONDS", 0.2)
    client = llm_client.LlmClient(build(checkpoints, tmp_path), runtime=RUNTIME, tp_size=1)
    client._loop.call_soon_threadsafe(time.sleep, 1.0)
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        client.close()
        assert not client._llm._open
        client._thread.join(10)
        gc.collect()
    assert client._loop.is_closed() and not [w for w in found if "never awaited" in str(w.message)]
