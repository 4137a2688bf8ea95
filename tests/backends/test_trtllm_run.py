"""Running engines against executor bindings that accept and do what is documented, in one process and in several."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest

from tests.backends.trtllm_engines import VOCAB, build, expected, run
from tests.standins.host import GPU_LINE, Host
from trtllm_redrafter.backends import load_backend
from trtllm_redrafter.backends.base import FinishReason, Request, Result, Runner, SamplingParams
from trtllm_redrafter.backends.tensorrt_llm.remote_client import launch_command
from trtllm_redrafter.benchmark.bench import BenchOptions, bench
from trtllm_redrafter.checkpoint.manifest import Manifest
from trtllm_redrafter.errors import BackendError, RedrafterError, RequestError, UsageError
from trtllm_redrafter.progress import no_progress
from trtllm_redrafter.redrafter.config import DraftShape
from trtllm_redrafter.settings.schema import BenchSection


def load(engine: Path, device: str = "auto", shape: DraftShape | None = None) -> Runner:
    return load_backend("tensorrt-llm").load(engine, device=device, verify_hashes=True, draft_shape=shape)


def test_texts_and_statistics(host: Host, checkpoints: Path, tmp_path: Path) -> None:
    runner = load(build(checkpoints, tmp_path))
    info = runner.info
    assert (info.backend, info.device, info.max_seq_len, info.max_batch_size) == (
        "tensorrt-llm", "NVIDIA H100 80GB HBM3", 200, 4,
    )  # fmt: skip
    assert info.draft_shape == DraftShape(3, 4)
    prompts = [(5, 6), (7,), (100, 3)]
    for result, prompt in zip(run(runner, *prompts, ignore_eos=True), prompts, strict=True):
        assert result.token_ids == expected(prompt, 20, end=-1) and result.finish_reason is FinishReason.LENGTH
        # 1 by the prefill, then 3, 4, 5, 1, 2, 3, and 1 of 4 that are left
        assert result.steps == 7 and result.accepted_tokens == 19 - 7 == 12
        assert result.acceptance_length == pytest.approx(19 / 7) and result.drafted_tokens == 7 * 4
        assert result.accepted_per_position == [5, 4, 2, 1] and sum(result.accepted_per_position) == 12
        assert result.text and result.decode_seconds > 0 and result.prefill_seconds > 0
    runner.close()


def test_memory_is_given_back(host: Host, checkpoints: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The executor's memory goes with its object: a closed runner that is still in somebody's hands holds none."""
    monkeypatch.setenv("STANDIN_MEMORY", "100,30,50")
    engine = build(checkpoints, tmp_path)
    first = load(engine)
    with pytest.raises(BackendError, match="not enough free memory"):
        load(engine)
    first.close()
    second = load(engine)
    assert run(second, (5, 6))
    with pytest.raises(BackendError, match="has been closed"):
        first.submit(Request((5,), SamplingParams(max_tokens=5)))
    first.close()
    second.close()


def test_two_engines_share_a_gpu(
    host: Host, checkpoints: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`bench` holds both sides at once: each takes the cache that its requests need, not its share of the GPU."""
    monkeypatch.setenv("STANDIN_MEMORY", "100,30,300")
    engine = build(checkpoints, tmp_path / "drafting")
    plain = build(checkpoints, tmp_path / "plain", "plain")
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"prompt {n}"}) + "\n" for n in range(4)))
    settings = BenchSection(prompts=prompts, batch="1,2", max_tokens=8, warmup=1, resamples=100)
    asked = BenchOptions(engine, plain, "auto", None, settings, overwrite=False, command=())
    result = bench(asked, no_progress).result
    assert result.complete and [batch.batch for batch in result.batches] == [1, 2]
    assert all(batch.drafting.records and not batch.differences for batch in result.batches)


def test_streaming_gives_steps(host: Host, checkpoints: Path, tmp_path: Path) -> None:
    runner = load(build(checkpoints, tmp_path))
    request = Request((5, 6), SamplingParams(max_tokens=10, ignore_eos=True))
    updates = list(runner.stream(request))
    assert [len(u.token_ids) for u in updates] == [1, 3, 4, 2]
    assert "".join(u.text for u in updates) == (updates[-1].result or Result("", 0)).text


def test_end_tokens_and_stop_strings(host: Host, checkpoints: Path, tmp_path: Path) -> None:
    runner = load(build(checkpoints, tmp_path))
    prompt = (258,)  # 5 * 258 + 7 = 3 (mod 259); some tokens later comes the end token
    start = next(p for p in range(3, VOCAB) if 2 in expected((p,), 9)[1:])
    (result,) = run(runner, (start,))
    assert result.token_ids == expected((start,), 20) and result.token_ids[-1] == 2
    assert result.finish_reason is FinishReason.STOP and result.stop_reason is None
    (whole,) = run(runner, prompt, ignore_eos=True)
    piece = whole.text[2:4]
    (stopped,) = run(runner, prompt, ignore_eos=True, stop=(piece,))
    assert stopped.text == whole.text[: whole.text.index(piece)] and stopped.stop_reason == piece
    assert stopped.finish_reason is FinishReason.STOP and not runner.has_work


def test_cancel(host: Host, checkpoints: Path, tmp_path: Path) -> None:
    runner = load(build(checkpoints, tmp_path))
    request_id = runner.submit(Request((5,), SamplingParams(max_tokens=90, ignore_eos=True)))
    other = runner.submit(Request((6,), SamplingParams(max_tokens=8, ignore_eos=True)))
    runner.step()
    result = runner.cancel(request_id)
    assert result is not None and result.finish_reason is FinishReason.CANCELLED and result.token_ids
    assert runner.cancel(request_id) is None
    found = {}
    while runner.has_work:
        found |= {u.request_id: u.result for u in runner.step() if u.result}
    assert set(found) == {other}


def test_merged_responses_are_counted_by_the_executor(
    host: Host, checkpoints: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STANDIN_RUN", "merge")
    runner = load(build(checkpoints, tmp_path))
    (result,) = run(runner, (5, 6), ignore_eos=True)
    assert result.steps == 7 and result.accepted_tokens == 12 and result.drafted_tokens == 28
    assert result.accepted_per_position == [], "positions are not known, and not made up"


def refused(runner: Runner, prompt: tuple[int, ...] = (5,), *, draft: bool = True, **sampling: Any) -> str:
    with pytest.raises(RequestError) as caught:
        runner.submit(Request(prompt, SamplingParams(**{"max_tokens": 5, **sampling}), draft=draft))
    return caught.value.render()


def test_ignored_options_are_refused(host: Host, checkpoints: Path, tmp_path: Path) -> None:
    runner = load(build(checkpoints, tmp_path, tokenizer=False))
    text = refused(runner, temperature=0.7, top_k=5, top_p=0.9)
    for part in ("the engine is greedy", "top_k is 5", "top_p is 0.9", "ignores it", "allow_sampling"):
        assert part in text
    assert "compiled into the engine" in refused(runner, draft=False)
    assert "101 tokens, the engine takes 100" in refused(runner, (3,) * 101)
    assert "exceed the engine's 200" in refused(runner, (3,) * 100, max_tokens=101)
    assert "outside the model's vocabulary" in refused(runner, (VOCAB,)) and "empty" in refused(runner, ())
    assert "need a tokenizer" in refused(runner, stop=("x",)) and "max_tokens is 0" in refused(runner, max_tokens=0)
    with pytest.raises(RequestError, match="no tokenizer"):
        runner.encode_prompt("text", chat=False)
    assert not runner.has_work


def test_an_engine_without_drafter_samples(host: Host, checkpoints: Path, tmp_path: Path) -> None:
    runner = load(build(checkpoints, tmp_path, "plain"))
    assert runner.info.draft_shape is None
    (result,) = run(runner, (5, 6), temperature=0.7, top_k=5, top_p=0.9, seed=3, ignore_eos=True)
    assert len(result.token_ids) == 20 and result.drafted_tokens == 0 and result.acceptance_length == 1.0
    (plain,) = runner.generate([Request((5, 6), SamplingParams(max_tokens=3), draft=False)])
    assert plain.token_ids == expected((5, 6), 3)


def test_several_gpus_are_processes_of_their_own(
    host: Host, checkpoints: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    host.gpus(GPU_LINE, GPU_LINE)
    ranks = tmp_path / "ranks"
    ranks.mkdir()
    monkeypatch.setenv("STANDIN_RANKS", str(ranks))
    runner = load(build(checkpoints, tmp_path, "two"))
    assert runner.info.device == "2 x NVIDIA H100 80GB HBM3"
    prompts = [(5, 6), (7,)]
    for result, prompt in zip(run(runner, *prompts, ignore_eos=True), prompts, strict=True):
        assert result.token_ids == expected(prompt, 20, 260, end=-1) and result.steps == 7
    runner.submit(Request((5,), SamplingParams(max_tokens=90, ignore_eos=True)))
    pids = [int((ranks / f"rank{r}").read_text()) for r in range(2)]
    assert os.getpid() not in pids
    runner.close()
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)


def test_several_gpus_inside_a_slurm_job(host: Host, checkpoints: Path, tmp_path: Path) -> None:
    host.gpus(GPU_LINE, GPU_LINE)
    host.slurm()
    host.program("mpirun", "#!/bin/sh\nexit 1\n")
    runner = load(build(checkpoints, tmp_path, "two"))
    assert run(runner, (5, 6), ignore_eos=True)[0].token_ids == expected((5, 6), 20, 260, end=-1)
    runner.close()


@pytest.mark.parametrize(("how", "says"), [("load-oom", "not enough free memory"), ("die", "ended unexpectedly")])
def test_failing_ranks_are_reported(
    host: Host, checkpoints: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str, says: str
) -> None:
    host.gpus(GPU_LINE, GPU_LINE)
    monkeypatch.setenv("STANDIN_RUN", how)
    engine = build(checkpoints, tmp_path, "two")
    with pytest.raises(BackendError) as caught:
        run(load(engine), (5, 6))
    assert says in caught.value.render() and "remedy" in caught.value.render()


def test_refused_requests_do_not_end_the_others(
    host: Host, checkpoints: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    host.gpus(GPU_LINE, GPU_LINE)
    monkeypatch.setenv("STANDIN_RUN", "error")
    runner = load(build(checkpoints, tmp_path, "two"))
    with pytest.raises(BackendError, match="prompt is refused"):
        run(runner, (9,))
    assert len(run(runner, (5, 6), ignore_eos=True)[0].token_ids) == 20
    runner.close()


@pytest.mark.parametrize(("how", "says"), [("load-oom", "not enough free memory"), ("response-error", "free memory")])
def test_failures_in_this_process(
    host: Host, checkpoints: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str, says: str
) -> None:
    monkeypatch.setenv("STANDIN_RUN", how)
    engine = build(checkpoints, tmp_path)
    with pytest.raises(BackendError) as caught:
        run(load(engine), (5, 6))
    assert says in caught.value.render()


def test_what_does_not_fit_this_machine_comes_at_once(host: Host, checkpoints: Path, tmp_path: Path) -> None:
    engine = build(checkpoints, tmp_path)
    host.gpus("NVIDIA L40S, 46068, 45000, 8.9, 580.82.07")
    host.package("tensorrt_llm", "1.2.0")
    with pytest.raises(BackendError) as caught:
        load(engine, shape=DraftShape(2, 2))
    text = caught.value.render()
    for part in ("not for NVIDIA L40S", "installed is 1.2.0", "built for 3 x 4"):
        assert part in text
    for device in ("cpu", "gpu", "cuda:x"):
        with pytest.raises(UsageError, match="does not run on"):
            load(engine, device)
    host.gpus(GPU_LINE)
    host.package("tensorrt_llm", "1.2.1")
    with pytest.raises(BackendError, match=re.escape("2 GPU(s) are needed, 1 are here")):
        load(engine, "cuda:1")


def test_an_engine_of_several_ranks_needs_them_all(host: Host, checkpoints: Path, tmp_path: Path) -> None:
    engine = build(checkpoints, tmp_path, "two")
    with pytest.raises(RedrafterError, match=re.escape("2 GPU(s) are needed")):
        load(engine)
    with pytest.raises(UsageError, match="names one GPU"):
        load(engine, "cuda:0")


def test_how_ranks_are_started(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    assert launch_command(4, {}) == ["mpirun", "-n", "4", "--allow-run-as-root", "--bind-to", "none"]
    host.program("srun", "#!/bin/sh\n")
    slurm = ["srun", "--mpi=pmix", "--input=0", "--overlap", "--kill-on-bad-exit=1", "-n", "4"]
    assert launch_command(4, {"SLURM_JOB_ID": "1"}) == slurm and launch_command(4, {})[0] == "mpirun"
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(BackendError, match="mpirun is not installed"):
        launch_command(2, {})


def test_the_command_line_runs_it(host: Host, checkpoints: Path, tmp_path: Path, capsys: Any) -> None:
    from tests.cli.tiny import Program

    engine, program = build(checkpoints, tmp_path), Program(capsys)
    assert program("run", "--engine", engine, "--prompt", "one", "--max-tokens", 8, "--json") == 0, program.err
    document = program.document
    assert document["engine"]["backend"] == "tensorrt-llm" and document["results"][0]["completion_tokens"] <= 8
    assert program("run", "--engine", engine, "--prompt", "one", "--temperature", 0.5) != 0
    assert "the engine is greedy" in program.err
    assert program("inspect", engine) == 0 and "TensorRT-LLM engine" in program.out
    assert "'num_beams'" in program.out


def served_by_trtllm_serve(engine: Path) -> None:
    """What the server reads at start-up: the model type beside the tokenizer, more end tokens from the root."""
    from transformers import AutoConfig, GenerationConfig

    assert AutoConfig.from_pretrained(engine / "tokenizer").model_type == "llama"
    assert GenerationConfig.from_pretrained(engine).eos_token_id == [2, 7]
    assert {"generation_config.json", "tokenizer/config.json"} <= Manifest.read(engine).files.keys()


def test_a_recipe_goes_from_base_model_to_text(
    host: Host, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """convert, build and run as one pipeline; the second time everything is there already."""
    from tests.cli.tiny import Program, write_models

    monkeypatch.chdir(tmp_path)
    write_models(tmp_path / "models", head_dim=32)
    Path("models/base/generation_config.json").write_text('{"eos_token_id": [2, 7]}')
    Path("recipe.yaml").write_text(
        "base: models/base\ndrafter: models/drafter\nbackend: tensorrt-llm\n"
        "convert: {dtype: bfloat16, num_beams: 2}\nbuild: {max_seq_len: 128, max_batch_size: 2}\n"
        "tensorrt_llm: {cache_dir: cache}\nrun: {prompts: [one, two], max_tokens: 6, output: results.jsonl}\n"
    )
    program = Program(capsys)
    assert program("pipeline", "recipe.yaml", "--json") == 0, program.err
    assert [s["status"] for s in program.document["stages"]] == ["miss", "miss", "miss"]
    served_by_trtllm_serve(Path(program.document["stages"][1]["output"]))
    assert len(Path("results.jsonl").read_text().splitlines()) == 2
    assert program("pipeline", "recipe.yaml", "--json") == 0
    assert [s["status"] for s in program.document["stages"]] == ["hit", "hit", "hit"]
    changed = ["--set", "tensorrt_llm.flags={tokens_per_block: 64}", "--set", "run.prompts=[]"]
    assert program("pipeline", "recipe.yaml", *changed, "--json") == 0, program.err
    assert [s["status"] for s in program.document["stages"]][:2] == ["hit", "miss"]
    assert program("pipeline", "recipe.yaml", "--set", "tensorrt_llm.gpu=l40s", "--set", "run.prompts=[]") == 6
    assert "the GPU is NVIDIA H100" in program.err
