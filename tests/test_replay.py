"""Replayed steps: a table by hand, correct engines, and engines whose drafter or verification is wrong."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.engines import build_engine, convert_pair, load, write_checkpoint
from tests.tiny_models import write_base
from tests.training.conftest import add_tokenizer, train_options
from trtllm_redrafter.backends.base import Result
from trtllm_redrafter.backends.engine_config import parse_engine_config
from trtllm_redrafter.backends.torch import runner as torch_runner
from trtllm_redrafter.backends.torch.executor import PromptOutput, TreeOutput
from trtllm_redrafter.backends.torch.runner import TorchRunner
from trtllm_redrafter.checkpoint.reader import Checkpoint
from trtllm_redrafter.errors import MismatchError
from trtllm_redrafter.progress import no_progress
from trtllm_redrafter.redrafter.beam_search import Beams
from trtllm_redrafter.redrafter.config import DraftShape
from trtllm_redrafter.redrafter.token_tree import Tree
from trtllm_redrafter.training.execute import train
from trtllm_redrafter.training.plan import plan_training
from trtllm_redrafter.verify import gate, gate_decode
from trtllm_redrafter.verify.gate import GateReport, GateRequest, parity_gate
from trtllm_redrafter.verify.steps import AcceptanceCheck, Replay, StepCounts, Steps, load_replay

PROMPTS = ("Number A0", "Number C2", "Number E4")


# A text by hand: a table says what the base model continues a token with, another what the drafter proposes.

VOCAB = 10


class Table:
    """A base model by table: `best[t]` are the tokens that may follow t, equally likely. Hidden states are [t]."""

    def __init__(self, best: Mapping[int, tuple[int, ...]]) -> None:
        self._best = best
        self.cached: list[int] = []
        self._nodes: list[int] = []

    def prefill(self, slot: int, token_ids: Sequence[int]) -> PromptOutput:
        self.cached = list(token_ids)
        return PromptOutput(torch.tensor([float(token_ids[-1])]), self._logits(token_ids[-1:])[0])

    def forward(self, slots: Sequence[int], bases: Sequence[int], trees: Sequence[Tree], *, logits: bool) -> TreeOutput:
        [tree], [base] = trees, bases
        assert base == len(self.cached)
        self._nodes, rows = tree.tokens, self._logits(tree.tokens)
        return TreeOutput(torch.tensor(tree.tokens).float().view(-1, 1), rows.argmax(dim=-1), rows)

    def commit(self, slot: int, base: int, path: Sequence[int]) -> None:
        self.cached += [self._nodes[node] for node in path]

    def _logits(self, tokens: Sequence[int]) -> Tensor:
        logits = torch.zeros(len(tokens), VOCAB)
        for row, token in enumerate(tokens):
            logits[row, list(self._best[token])] = 9.0
        return logits


class Drafts:
    """Beams by root; each draft has probability 1/2. Records the contexts it was given."""

    def __init__(self, beams: dict[int, list[list[int]]]) -> None:
        self._beams = beams
        self.contexts: list[tuple[int, int]] = []

    def beams(self, context: Tensor, root: int) -> Beams:
        self.contexts.append((int(context), root))
        tokens = torch.tensor([[[root, *beam] for beam in self._beams[root]]])
        log_probs = torch.full((1, *tokens.shape[1:2], tokens.shape[2] - 1, VOCAB), 0.5).log()
        return Beams(tokens, torch.zeros(tokens.shape), log_probs)


def replay(best: Mapping[int, tuple[int, ...]], beams: dict[int, list[list[int]]]) -> tuple[Replay, Table, Drafts]:
    table, drafts = Table(best), Drafts(beams)
    return Replay(SimpleNamespace(executor=table), drafts, greedy=True), table, drafts  # type: ignore[arg-type]


def test_steps_by_hand() -> None:
    following = {token: (token + 1,) for token in range(1, 9)} | {9: (1,)}
    drafted = {
        2: [[3, 9], [3, 4]],  # the second beam is right twice: 3, 4, then 5 by the base itself
        5: [[9, 9], [8, 8]],  # nothing
        6: [[7, 9], [9, 9]],  # one: 7, then 8
    }  # after 8 one token is left: nothing is drafted for it
    replayed, table, drafts = replay(following, drafted)
    assert replayed.steps([9, 1], [2, 3, 4, 5, 6, 7, 8, 9]) == Steps(accepted=(2, 0, 1, 0), diverged=0)
    assert drafts.contexts == [(1, 2), (4, 5), (5, 6)]  # the state before each root
    assert table.cached == [9, 1, 2, 3, 4, 5, 6, 7]


def test_a_step_ends_where_the_text_does() -> None:
    replayed, _, _ = replay({1: (2,), 2: (3,), 3: (4,), 4: (5,), 5: (6,), 9: (9,)}, {2: [[3, 4, 5], [9, 9, 9]]})
    assert replayed.steps([1], [2, 3, 4]) == Steps((1,), diverged=0)  # the second draft is the text's last token
    assert replayed.steps([1], [2, 3, 4, 5]) == Steps((2,), diverged=0)


def test_counts_by_position() -> None:
    assert Steps((2, 0, 1, 0), 0).accepted_per_position(3) == [2, 1, 0]


def test_short_texts_have_no_steps() -> None:
    replayed, _, drafts = replay({}, {})
    assert replayed.steps([1], []) == Steps((), 0) and not drafts.contexts
    replayed, _, _ = replay({1: (2,)}, {})
    assert replayed.steps([1], [2]) == Steps((), 0)


def test_a_tie_accepts_both_drafts_and_the_text_decides() -> None:
    # 5 and 6 are equally likely after 2. TensorRT-LLM's rule takes the lower beam; the engine wrote the other.
    following = {1: (2,), 2: (5, 6), 5: (7,), 6: (8,), 8: (9,), 9: (9,)}
    replayed, _, _ = replay(following, {2: [[5, 9], [6, 9]]})
    assert replayed.steps([1], [2, 6, 8, 9]) == Steps((1, 0), diverged=1)
    replayed, _, _ = replay(following, {2: [[6, 9], [5, 9]]})
    assert replayed.steps([1], [2, 6, 8, 9]) == Steps((1, 0), diverged=0)


# Whole engines, whose drafter is right now and then.


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """In float32 and bfloat16 a checkpoint and its engine; drafts are accepted about every second step."""
    folder = tmp_path_factory.mktemp("replay")
    base = add_tokenizer(write_base(folder / "base", "llama", vocab_size=259))
    options = train_options(
        base, folder, max_steps=400, learning_rate=1e-2, held_out=0.0, draft_vocab=0, max_answer_tokens=40, batch=8
    )
    train(plan_training(options), no_progress)
    for dtype in ("float32", "bfloat16"):
        (folder / dtype).mkdir()
        (folder / dtype / "base").symlink_to(base)
        (folder / dtype / "drafter").symlink_to(options.output)
        checkpoint = convert_pair(folder / dtype, num_beams=2, draft_len=3, dtype=dtype)
        build_engine(checkpoint, folder / dtype / "engine", base)
    return folder


def request(models: Path, dtype: str = "float32", engine: Path | None = None) -> GateRequest:
    return GateRequest(
        engine or models / dtype / "engine", models / dtype / "checkpoint", PROMPTS, 60, min_acceptance=None,
        device="cpu",
    )  # fmt: skip


def says(report: GateReport, *words: str) -> None:
    assert not report.ok, report.render()
    for word in words:
        assert word in report.render(), report.render()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_right_engine_takes_the_expected_steps(models: Path, dtype: str) -> None:
    report = parity_gate(request(models, dtype))
    assert report.ok and report.steps is not None, report.render()
    found, expected = report.steps.found, report.steps.expected
    assert found.acceptance_length is not None and found.acceptance_length > 1.5 and found.accepted_per_position[2] > 5
    if dtype == "float32":
        assert found == expected and report.steps.diverged == 0
    assert f"{found.total} steps, {expected.total} expected" in report.render()
    assert report.as_dict()["steps"]["expected"]["steps"] == list(expected.steps)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("tensor", ["drafter.lm_head.weight", "drafter.rnn_u.weight"])
def test_a_drafter_with_permuted_weights_is_found(models: Path, tmp_path: Path, dtype: str, tensor: str) -> None:
    wrong = tmp_path / "checkpoint"
    shutil.copytree(models / dtype / "checkpoint", wrong)
    tensors = load_file(wrong / "rank0.safetensors")
    tensors[tensor] = tensors[tensor].flip(0).contiguous()
    save_file(tensors, wrong / "rank0.safetensors", metadata={"format": "pt"})
    (wrong / "manifest.json").unlink()
    engine = build_engine(wrong, tmp_path / "engine", models / dtype / "base")
    report = parity_gate(request(models, dtype, engine))
    says(report)
    assert not report.faults and any("accepted" in a.what or "acceptance" in a.what for a in report.alarms)


def shift_contexts(monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine drafts from the state of one position earlier; the replay does not run this code."""
    original: Callable[..., list[list[int]]] = TorchRunner._accept

    def accept(self: TorchRunner, batch: Any, trees: Any, output: TreeOutput, draws: list[int]) -> list[list[int]]:
        before = [getattr(active, "right", active.context) for active in batch]
        gained, first = original(self, batch, trees, output, draws), 0
        for active, tree, old in zip(batch, trees, before, strict=True):
            path = tree.walk(draws[first : first + len(tree)])
            active.right = active.context
            active.context = old if len(path) == 1 else output.hidden[first + path[-2]]
            first += len(tree)
        return gained

    monkeypatch.setattr(TorchRunner, "_accept", accept)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_context_of_the_wrong_position_is_found(models: Path, monkeypatch: pytest.MonkeyPatch, dtype: str) -> None:
    shift_contexts(monkeypatch)
    report = parity_gate(request(models, dtype))
    says(report, "acceptance differs from the checkpoint's", "expected")
    assert not report.faults and report.acceptance_length and report.reference_acceptance_length
    assert report.acceptance_length < report.reference_acceptance_length


def test_a_verification_that_accepts_everything_is_found(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = torch_runner._draw

    def draw(batch: Any, trees: list[Tree], output: TreeOutput, settings: Any) -> list[int]:
        draws, first = original(batch, trees, output, settings), 0
        for tree in trees:
            for node in reversed(range(1, len(tree))):  # the lowest child wins
                draws[first + tree.parents[node]] = tree.tokens[node]
            first += len(tree)
        return draws

    monkeypatch.setattr(torch_runner, "_draw", draw)
    report = parity_gate(request(models))
    says(report, "every draft was accepted", "rounding in float32 explains")
    assert report.faults and report.steps is not None and report.steps.diverged > 0.5 * report.steps.expected.total


def test_a_sampled_text_is_compared_by_likelihood(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gate, "_samples", lambda request: True)
    report = parity_gate(request(models))
    assert report.ok and report.sampled and not report.same, report.render()
    assert "drawn after 3 prompts" in report.render() and "at most" in report.render()
    assert (
        report.acceptance_length == report.reference_acceptance_length
    )  # the exact rule: the text tells what was accepted
    original = gate_decode._generate

    def others(*arguments: Any) -> Any:
        results, accepted = original(*arguments)
        for result in results:
            result.token_ids[:] = [(7 * token + 3) % 259 for token in result.token_ids]
        return results, accepted

    monkeypatch.setattr(gate_decode, "_generate", others)
    says(parity_gate(request(models)), "not drawn from the checkpoint's distributions", "nats per token")


def test_an_engine_and_a_checkpoint_of_which_one_has_no_drafter_are_refused(models: Path, tmp_path: Path) -> None:
    plain = write_checkpoint(tmp_path / "plain", drafter=False, vocab_size=259)
    engine = build_engine(plain, tmp_path / "engine", models / "float32" / "base")
    with pytest.raises(MismatchError, match="only the checkpoint has a drafter"):
        parity_gate(request(models, engine=engine))
    wrong = replace(request(models), reference=plain)
    with pytest.raises(MismatchError, match="only the engine has a drafter"):
        parity_gate(wrong)


def test_a_tensorrt_llm_engine_is_replayed_with_its_own_search(models: Path, tmp_path: Path) -> None:
    """Scores in the model's dtype over the whole head; few steps of correct texts are decided by ties."""
    limits = {"max_batch_size": 4, "max_input_len": 64, "max_seq_len": 128}
    engine = parse_engine_config({"pretrained_config": {"vocab_size": 259}, "build_config": limits}, {}, tmp_path)
    runner = load(models / "bfloat16" / "engine")
    replayed = load_replay(
        engine, Checkpoint.open(models / "bfloat16" / "checkpoint"), runner, DraftShape(2, 3), "cpu", greedy=True
    )
    assert replayed._search.score_dtype is None and replayed._search.head.rows is None
    report = parity_gate(request(models, "bfloat16"))
    prompts = [runner.encode_prompt(text, chat=True) for text in PROMPTS]
    texts = [replayed.steps(p, ids) for p, ids in zip(prompts, report.token_ids, strict=True)]
    assert report.steps is not None
    assert sum(len(t.accepted) for t in texts) == pytest.approx(report.steps.found.total, rel=0.05)
    assert sum(t.diverged for t in texts) <= 0.1 * report.steps.found.total


# How the counts are judged.


def check(found: Sequence[int], expected: Sequence[int], **changes: Any) -> list[str]:
    made = AcceptanceCheck(counts(found), counts(expected), diverged=0, tolerance=0.05, sampled=False)
    return alarms(replace(made, **changes))


def alarms(made: AcceptanceCheck) -> list[str]:
    return [problem.render() for problem in made.alarms(Path("engine"), 3, None)]


def counts(steps: Sequence[int], at: Sequence[int] = (40, 20, 10)) -> StepCounts:
    return StepCounts(tuple(steps), sum(at), tuple(at))


def test_small_differences_pass() -> None:
    assert check([50, 50], [50, 50]) == [] == check([48, 50], [51, 50]) == check([52, 52], [50, 50])
    assert check([8, 8], [10, 9]) == []  # a few steps are luck


def test_a_difference_of_all_prompts_or_of_one() -> None:
    [found] = check([53, 53], [50, 50])
    assert "why: 106 steps where these texts take 100\n" in found
    [found] = check([60, 43], [50, 50])
    assert "why: prompt 1: 60 steps where its text takes 50\n" in found
    assert check([60, 60], [50, 50], tolerance=0.25) == []


def test_a_position_that_is_accepted_less() -> None:
    made = AcceptanceCheck(counts([50, 50], (46, 20, 5)), counts([50, 50]), 0, tolerance=0.05, sampled=False)
    [found] = alarms(made)
    assert "why: position 1: 46 drafts accepted, 40 expected\n" in found


def test_a_position_that_is_never_accepted() -> None:
    expected = counts([50, 50])
    made = AcceptanceCheck(counts([50, 50], (40, 20, 0)), expected, diverged=0, tolerance=0.05, sampled=False)
    [found] = alarms(made)
    assert "why: position 3: 0 drafts accepted, 10 expected\n" in found
    assert alarms(replace(made, found=StepCounts((50, 50), 60, ()))) == []  # merged responses


def test_many_diverged_steps() -> None:
    [found] = check([50, 50], [50, 50], diverged=11)
    assert "leaves the text in 11 of 100 steps" in found
    assert check([50, 50], [50, 50], diverged=10) == []


def test_results_whose_responses_were_merged_have_no_positions() -> None:
    whole = Result("a", 3, [1] * 9, steps=4, accepted_tokens=4, accepted_per_position=[3, 1, 0])
    merged = Result("b", 3, [1] * 9, steps=6, accepted_tokens=2)
    empty = Result("c", 3, [], accepted_per_position=[0, 0, 0])
    assert StepCounts.of_results([whole, empty]) == StepCounts((4, 0), 4, (3, 1, 0))
    assert StepCounts.of_results([whole, merged]) == StepCounts((4, 6), 6, ())
