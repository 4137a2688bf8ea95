"""Requests joining and leaving, ways to end, refusals: what a server needs of the runner."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.engines import build_engine, load, make_runner, with_oracle, write_checkpoint, write_tokenizer
from trtllm_redrafter.backends.base import FinishReason, Request, Result, SamplingParams, Update
from trtllm_redrafter.backends.torch.runner import TorchRunner
from trtllm_redrafter.errors import BackendError, RequestError
from trtllm_redrafter.redrafter.config import DraftShape

PROMPTS = ((5, 9, 23, 7), (3,), (11, 60, 4, 44, 31, 17, 8, 9, 10), (30, 31), (40, 8, 9), (12, 13, 14))


@pytest.fixture(scope="module")
def runner(tmp_path_factory: pytest.TempPathFactory) -> TorchRunner:
    return make_runner(tmp_path_factory.mktemp("runner"))


@pytest.fixture(scope="module")
def text_runner(tmp_path_factory: pytest.TempPathFactory) -> TorchRunner:
    folder = tmp_path_factory.mktemp("text")
    checkpoint = write_checkpoint(folder, vocab_size=259)
    return load(build_engine(checkpoint, folder / "engine", write_tokenizer(folder / "tokenizer")))


def run(runner: TorchRunner, prompt: tuple[int, ...], count: int = 30, **changes: object) -> Result:
    sampling = SamplingParams(**({"max_tokens": count, "ignore_eos": True} | changes))  # type: ignore[arg-type]
    return runner.generate([Request(prompt, sampling)])[0]


def test_requests_join_and_leave_between_steps(runner: TorchRunner) -> None:
    """Six requests of different lengths through four slots, each as if it were alone."""
    alone = {p: run(runner, p, 10 + 3 * i).token_ids for i, p in enumerate(PROMPTS)}
    longest = {p: run(runner, p, 40).token_ids for p in PROMPTS}
    real = runner._drafting
    with_oracle(runner, longest, DraftShape(4, 3))
    try:
        ids = {}
        results: dict[str, Result] = {}
        for i, prompt in enumerate(PROMPTS):
            ids[prompt] = runner.submit(Request(prompt, SamplingParams(10 + 3 * i, ignore_eos=True), draft=i != 2))
            for update in runner.step():
                if update.result:
                    results[update.request_id] = update.result
        while runner.has_work:
            for update in runner.step():
                if update.result:
                    results[update.request_id] = update.result
    finally:
        runner._drafting = real
    assert {p: results[i].token_ids for p, i in ids.items()} == alone
    assert results[ids[PROMPTS[2]]].drafted_tokens == 0
    assert all(r.finish_reason is FinishReason.LENGTH for r in results.values())


def test_end_token_ends_and_counts_only_what_is_emitted(tmp_path: Path) -> None:
    runner = make_runner(tmp_path)
    tokens = run(runner, PROMPTS[0], 40).token_ids
    end = next(t for i, t in enumerate(tokens) if i > 3 and t not in tokens[:i])
    runner._eos = frozenset({end})
    expected = tokens[: tokens.index(end) + 1]
    plain = run(runner, PROMPTS[0], 40, ignore_eos=False)
    with_oracle(runner, {PROMPTS[0]: tokens}, DraftShape(2, 5))
    drafted = run(runner, PROMPTS[0], 40, ignore_eos=False)
    for result in (plain, drafted):
        assert result.token_ids == expected
        assert result.finish_reason is FinishReason.STOP
        assert len(result.token_ids) == 1 + result.steps + result.accepted_tokens


def test_end_tokens_come_from_the_model(tmp_path: Path) -> None:
    assert make_runner(tmp_path)._eos == frozenset({2})


def test_max_tokens_one_needs_no_step(runner: TorchRunner) -> None:
    result = run(runner, PROMPTS[0], 1)
    assert (len(result.token_ids), result.steps, result.acceptance_length) == (1, 0, None)


def test_stop_strings_cross_tokens_and_steps(text_runner: TorchRunner) -> None:
    """The tokenizer has one token per byte, so a three-letter stop string spans three tokens."""
    prompt = text_runner.encode_prompt("hello", chat=False)
    whole = run(text_runner, prompt, 60)
    text = whole.text
    stop = text[20:23]
    place = text.find(stop)
    for draft in (True, False):
        sampling = SamplingParams(60, stop=("never seen", stop), ignore_eos=True)
        result = text_runner.generate([Request(prompt, sampling, draft=draft)])[0]
        assert result.text == text[:place]
        assert result.stop_reason == stop
        assert result.finish_reason is FinishReason.STOP
        assert result.token_ids == whole.token_ids[: len(result.token_ids)]


def test_stream_gives_the_text_in_pieces_and_never_a_stop_string(text_runner: TorchRunner) -> None:
    prompt = text_runner.encode_prompt("hello", chat=False)
    text = run(text_runner, prompt, 60).text
    stop = text[20:23]
    updates = list(text_runner.stream(Request(prompt, SamplingParams(60, stop=(stop,), ignore_eos=True))))
    assert "".join(u.text for u in updates) == text[: text.find(stop)]
    assert [u.result is not None for u in updates] == [False] * (len(updates) - 1) + [True]
    result = updates[-1].result
    assert result is not None and [t for u in updates for t in u.token_ids] == result.token_ids


def test_closing_a_stream_frees_its_slot(runner: TorchRunner) -> None:
    for _ in range(runner.info.max_batch_size + 1):
        stream = runner.stream(Request(PROMPTS[0], SamplingParams(50)))
        next(stream)
        stream.close()  # type: ignore[attr-defined]
    assert not runner.has_work
    assert len(runner._free) == runner.info.max_batch_size


def test_cancel_waiting_running_and_unknown(runner: TorchRunner) -> None:
    ids = [runner.submit(Request(PROMPTS[i % 6], SamplingParams(50))) for i in range(6)]
    runner.step()
    running, waiting = runner.cancel(ids[0]), runner.cancel(ids[5])
    assert running is not None and running.finish_reason is FinishReason.CANCELLED and running.token_ids
    assert waiting is not None and waiting.finish_reason is FinishReason.CANCELLED and not waiting.token_ids
    assert runner.cancel("nobody") is None
    for i in ids[1:5]:
        runner.cancel(i)
    assert not runner.has_work


def test_a_prompt_that_fails_takes_no_place_with_it(runner: TorchRunner, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(slot: int, token_ids: object) -> object:
        raise MemoryError

    with monkeypatch.context() as patch, pytest.raises(BackendError, match="not enough memory for a step"):
        patch.setattr(runner.executor, "prefill", fails)
        run(runner, PROMPTS[0])
    assert not runner.has_work and len(runner._free) == runner.info.max_batch_size


def test_seeds(runner: TorchRunner) -> None:
    def sample(seed: int | None) -> list[int]:
        return run(runner, PROMPTS[0], temperature=1.5, seed=seed).token_ids

    assert sample(1) == sample(1)
    assert sample(1) != sample(2)
    assert sample(None) != sample(None)


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (Request((), SamplingParams(5)), "the prompt is empty"),
        (Request((5,) * 101, SamplingParams(5)), "the prompt has 101 tokens, the engine takes 100"),
        (Request((5,) * 90, SamplingParams(120)), "90 prompt tokens and 120 to write exceed the engine's 200"),
        (Request((5, 64), SamplingParams(5)), "token 2 has the id 64, outside the model's vocabulary of 64"),
        (Request((5,), SamplingParams(0)), "max_tokens is 0"),
        (Request((5,), SamplingParams(5, temperature=-1.0)), "temperature is -1.0"),
        (Request((5,), SamplingParams(5, temperature=float("nan"))), "temperature is nan"),
        (Request((5,), SamplingParams(5, top_p=0.0)), "top_p is 0.0"),
        (Request((5,), SamplingParams(5, top_k=-2)), "top_k is -2"),
        (Request((5,), SamplingParams(5, seed=-1)), "seed is -1"),
        (Request((5,), SamplingParams(5, stop=("",))), "a stop string is empty"),
        (Request((5,), SamplingParams(5, temperature=10**400)), r"temperature is 1000.*\(401 characters\)"),
        (Request((5,), SamplingParams(5, temperature=1e308)), r"temperature is 1e\+308"),
        (Request((5,), SamplingParams(5, temperature=True)), "temperature is True"),
        (Request((5,), SamplingParams(10**400)), r"1 prompt tokens and 1000.* to write exceed the engine's 200"),
        (Request((5,), SamplingParams(5, top_k=2.5)), "top_k is 2.5"),  # type: ignore[arg-type]
        (Request((5,), SamplingParams(5, seed=10**400)), "seed is 1000"),
        (Request((5,), SamplingParams(5, stop_token_ids=(3, 64))), "stop_token_ids has 64, outside the vocabulary"),
        (Request((5,), SamplingParams(5, stop_token_ids=(-1,))), "stop_token_ids are"),
        (Request((5,), SamplingParams(5, stop=("a",))), "stop strings need a tokenizer"),
    ],
)
def test_refused_before_any_work(runner: TorchRunner, request_: Request, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        runner.submit(request_)
    assert not runner.has_work


def test_all_problems_of_a_request_come_together(runner: TorchRunner) -> None:
    with pytest.raises(RequestError) as caught:
        runner.submit(Request((), SamplingParams(0, temperature=-1.0)))
    assert len(caught.value.problems) == 3


def test_an_id_in_use_is_refused(runner: TorchRunner) -> None:
    runner.submit(Request((5,), SamplingParams(50), request_id="mine"))
    with pytest.raises(RequestError, match="'mine' is in use"):
        runner.submit(Request((6,), SamplingParams(5), request_id="mine"))
    runner.cancel("mine")


def test_no_prompts(runner: TorchRunner) -> None:
    with pytest.raises(RequestError, match="the list of prompts is empty"):
        runner.generate([])


def test_the_engines_full_length_can_be_used(runner: TorchRunner) -> None:
    """The last trees reach beyond max_seq_len; the cache has room for them."""
    result = run(runner, tuple(5 + i % 50 for i in range(100)), 100)
    assert len(result.token_ids) == 100


def test_chat_and_plain_prompts(text_runner: TorchRunner, runner: TorchRunner) -> None:
    plain = text_runner.encode_prompt("hi", chat=False)
    chat = text_runner.encode_prompt("hi", chat=True)
    messages = text_runner.encode_prompt([{"role": "user", "content": "hi"}], chat=True)
    assert chat == messages == text_runner.encode_prompt("<user>hi\n<assistant>", chat=False)
    assert len(plain) == 2
    with pytest.raises(RequestError, match="messages need the chat template"):
        text_runner.encode_prompt([{"role": "user", "content": "hi"}], chat=False)
    with pytest.raises(RequestError, match="the engine has no tokenizer"):
        runner.encode_prompt("hi", chat=False)


def test_stop_token_ids_end_a_text_and_leave_none_of_it(text_runner: TorchRunner) -> None:
    prompt = text_runner.encode_prompt("hello", chat=False)
    whole = run(text_runner, prompt, 40)
    stop = whole.token_ids[20]
    place = whole.token_ids.index(stop)
    for draft in (True, False):
        sampling = SamplingParams(40, stop_token_ids=(stop,), ignore_eos=True)
        result = text_runner.generate([Request(prompt, sampling, draft=draft)])[0]
        assert result.token_ids == whole.token_ids[: place + 1] and result.stop_reason == stop
        assert result.finish_reason is FinishReason.STOP
        before = run(text_runner, prompt, place) if place else None
        assert result.text == (before.text if before else "")


def test_one_refused_request_leaves_nothing_behind(runner: TorchRunner) -> None:
    good, bad = Request(PROMPTS[0], SamplingParams(5)), Request((), SamplingParams(0))
    with pytest.raises(RequestError) as caught:
        runner.generate([good, bad, good, Request((99,), SamplingParams(5))])
    said = caught.value.render()
    assert "2 of 4 prompts are refused; none was run" in said
    assert "prompt 2: max_tokens is 0" in said and "prompt 2: the prompt is empty" in said
    assert "prompt 4: token 1 has the id 99, outside the model's vocabulary" in said
    assert not runner.has_work
    assert len(runner.generate([good, good])) == 2


def test_an_error_on_the_way_leaves_nothing_behind(runner: TorchRunner, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> list[Update]:
        raise KeyboardInterrupt

    monkeypatch.setattr(runner, "step", broken)
    with pytest.raises(KeyboardInterrupt):
        runner.generate([Request(PROMPTS[0], SamplingParams(5))] * 6)
    assert not runner.has_work and len(runner._free) == runner.info.max_batch_size
