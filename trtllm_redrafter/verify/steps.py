"""Did the engine take the steps that the checkpoint's drafter takes for the same text? The gate's check of speed.

A wrong drafter changes no token of a greedy text, only the number of steps. So the steps that this text takes are
counted, and both counts are compared by prompt and by position; too few and too many are both alarms.

    replay = load_replay(engine, checkpoint, runner, DraftShape(5, 5), "cpu", greedy=True)
    replay.steps(prompt, tokens)        # Steps(accepted=(2, 0, 3), diverged=0)
    compared = AcceptanceCheck(found, expected, diverged, tolerance("bfloat16", ...), sampled)
    compared.render(), list(compared.alarms(engine, draft_len, floor))

A free-running decode diverges from the engine's text at the first tie, and from there its steps say nothing about the
engine's. So the text is given, and each step is repeated from where the engine was: draft from the hidden state of the
last committed token, run the tree, decide with TensorRT-LLM's rule, advance by what was accepted.

In greedy mode the text alone shows what was accepted: a drafted token that comes next in the text was accepted, because
the token drawn after a rejection is never one of the drafts. The rule on the reference's logits agrees except for ties;
steps where it does not are counted as `diverged`. For a sampled text only an upper bound is known: a draft that is
tried once per beam, with different random numbers, can be rejected and still be drawn.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trtllm_redrafter.backends.base import Result, acceptance_length
from trtllm_redrafter.backends.engine_config import TENSORRT, EngineConfig
from trtllm_redrafter.backends.torch.drafting import frequent_rows, load_drafter
from trtllm_redrafter.backends.torch.runner import TorchRunner
from trtllm_redrafter.checkpoint.names import EMBEDDING
from trtllm_redrafter.checkpoint.reader import Checkpoint
from trtllm_redrafter.errors import Problem
from trtllm_redrafter.redrafter.beam_search import Beams, DraftHead, beam_search, draft_head
from trtllm_redrafter.redrafter.config import DraftShape
from trtllm_redrafter.redrafter.drafter import Drafter
from trtllm_redrafter.redrafter.reference import RULES, DraftRecord, VerifyInput, VerifyOutput, build_tree
from trtllm_redrafter.redrafter.sampling import SamplingSettings
from trtllm_redrafter.redrafter.token_tree import Tree


@dataclass(frozen=True)
class Steps:
    """Drafts accepted in each step of one text; the last step ends with the text."""

    accepted: tuple[int, ...]
    diverged: int
    """Steps in which the rule, on the reference's logits, does not follow the text: numeric ties, or faults."""

    def accepted_per_position(self, draft_len: int) -> list[int]:
        """[j]: number of steps in which at least j + 1 drafts were accepted, as in `Result`."""
        return [sum(count > j for count in self.accepted) for j in range(draft_len)]


@dataclass(frozen=True)
class ReplaySearch:
    """How the engine drafts: TensorRT-LLM with the whole head and scores in the model's dtype, the torch backend with
    its fast head and scores in float32."""

    drafter: Drafter
    embedding: Tensor  # [V, H]
    head: DraftHead
    shape: DraftShape
    score_dtype: torch.dtype | None

    def beams(self, context: Tensor, root: int) -> Beams:
        """Draft from one context [H] and the token after it."""
        first = torch.tensor([root], device=context.device)
        return beam_search(
            self.drafter, self.embedding, context.unsqueeze(0), first, self.shape,
            head=self.head, keep_log_probs=True, score_dtype=self.score_dtype,
        )  # fmt: skip


class Replay:
    """The reference's base model with the checkpoint's drafter, drafting as the engine does."""

    def __init__(self, reference: TorchRunner, search: ReplaySearch, *, greedy: bool) -> None:
        self._executor = reference.executor
        self._search = search
        self._greedy = greedy

    @torch.no_grad()
    def steps(self, prompt: Sequence[int], tokens: Sequence[int]) -> Steps:
        """Replay one text. Its first token comes with the prompt's pass and is no step."""
        if not tokens:
            return Steps((), 0)
        context = self._executor.prefill(0, prompt).hidden
        accepted: list[int] = []
        place, base, diverged = 0, len(prompt), 0
        while place < len(tokens) - 1:
            following = tokens[place + 1 :]
            if len(following) == 1:  # whatever is drafted, this step emits one token
                return Steps((*accepted, 0), diverged)
            beams = self._search.beams(context, tokens[place])
            tree = Tree.merge(beams.tokens[0].tolist())
            output = self._executor.forward([0], [base], [tree], logits=True)
            assert output.logits is not None
            path = _along(tree, following)
            if self._greedy:
                diverged += not _follows(_rule_output(beams, output.logits), path, len(following))
            self._executor.commit(0, base, path)
            context = output.hidden[path[-1]]
            accepted.append(min(len(path), len(following)) - 1)
            place += len(path)
            base += len(path)
        return Steps(tuple(accepted), diverged)


def load_replay(
    engine: EngineConfig, checkpoint: Checkpoint, runner: TorchRunner, shape: DraftShape, device: str, *, greedy: bool
) -> Replay:
    """`runner` runs `checkpoint`, whose drafter is read again here, in the dtype it is stored in."""
    config = checkpoint.config.drafter
    assert config is not None
    place = torch.device(device)
    drafter = load_drafter(checkpoint, config, place)
    rows = frequent_rows(checkpoint.path, engine.head_rows, checkpoint.config.vocab_size)
    score_dtype = None if engine.backend == TENSORRT else torch.float32
    embedding = checkpoint.load(EMBEDDING).to(place)
    search = ReplaySearch(drafter, embedding, draft_head(drafter, rows), shape, score_dtype)
    return Replay(runner, search, greedy=greedy)


def _rule_output(beams: Beams, logits: Tensor) -> VerifyOutput:
    """What TensorRT-LLM's rule decides. It casts logits to the model's dtype first, which makes ties common.

    In greedy mode its random numbers only choose between tied tokens, so any will do.
    """
    assert beams.log_probs is not None
    cast = logits.to(beams.log_probs.dtype).unsqueeze(0)
    half = torch.full(beams.log_probs.shape[:3], 0.5, dtype=cast.dtype, device=cast.device)
    record = DraftRecord(beams.tokens, beams.log_probs, half, half[:, 0, 0], half[:, 0, 0], greedy=True)
    return RULES["trtllm"](VerifyInput(build_tree(beams), cast, SamplingSettings.of([], cast.device), None, record))


def _along(tree: Tree, following: Sequence[int]) -> list[int]:
    """The path through the tree that the text takes, root first."""
    path = [0]
    for token in following:
        child = [node for node, parent in enumerate(tree.parents) if parent == path[-1] and tree.tokens[node] == token]
        if not child:
            break
        path.append(child[0])
    return path


def _follows(output: VerifyOutput, path: Sequence[int], remaining: int) -> bool:
    """Did the rule take the text's path? Past the text's end it may accept anything."""
    taken = [node for node in output.path[0].tolist() if node >= 0]
    return taken == list(path) or (len(path) > remaining and taken[: len(path)] == list(path))


TOLERANCE = {"float32": 0.02, "float16": 0.05, "bfloat16": 0.05}
"""Share of all prompts' steps, for their number and for those that accept a draft at each position. In bfloat16,
correct engines were within 0.025 (docs/tensorrt-llm.md); one that drafts from the previous position was 0.23 off."""

SINGLE_STEPS = {"float32": 0.02, "float16": 0.1, "bfloat16": 0.1}
"""Share of the steps beginning at the same token that may accept another number of drafts than the replay's do."""

QUANTIZED_TOLERANCE = 0.15
"""With quantized activations, which the reference does not have; not measured on such an engine."""

SAMPLED_TOLERANCE = 0.25
"""For sampled texts, of which only an upper bound of the accepted drafts is known."""

PROMPT_TOLERANCE = 0.15
"""Share of one prompt's steps, where one accepted draft counts for more."""

MAX_DIVERGED = 0.1
"""Share of steps that may diverge through ties; 0.02 was seen in bfloat16."""

FEW_STEPS = 3
"""A difference of this many steps is never an alarm."""

MIN_STEPS = 16
"""With fewer steps than this, acceptance is not judged."""

MIN_ACCEPTED = 8
"""If the replay accepts this many drafts at a position, the engine must accept at least one."""


def tolerance(dtype: str, *, quantized: bool, sampled: bool) -> float:
    """By how much a correct engine's steps may differ, as a share of them."""
    if sampled:
        return SAMPLED_TOLERANCE
    return QUANTIZED_TOLERANCE if quantized else TOLERANCE[dtype]


@dataclass(frozen=True)
class StepCounts:
    """Steps of each prompt, and drafts accepted in all of them. `accepted_per_position` is empty if not known."""

    steps: tuple[int, ...]
    accepted: int
    accepted_per_position: tuple[int, ...]

    @classmethod
    def of_results(cls, results: Sequence[Result]) -> StepCounts:
        """The engine's own counts."""
        known = all(result.accepted_per_position for result in results if result.steps)
        at = (
            zip(*(result.accepted_per_position for result in results if result.accepted_per_position), strict=True)
            if known
            else ()
        )
        accepted = sum(result.accepted_tokens for result in results)
        return cls(tuple(result.steps for result in results), accepted, tuple(sum(counts) for counts in at))

    @classmethod
    def of_replay(cls, texts: Sequence[Steps], draft_len: int) -> StepCounts:
        at = [text.accepted_per_position(draft_len) for text in texts]
        steps = tuple(len(text.accepted) for text in texts)
        return cls(steps, sum(map(sum, at)), tuple(map(sum, zip(*at, strict=True))))

    @property
    def total(self) -> int:
        return sum(self.steps)

    @property
    def acceptance_length(self) -> float | None:
        return acceptance_length(self.total, self.accepted)

    def is_full(self, draft_len: int) -> bool:
        """Was every draft accepted? A text's end may cut its last step short."""
        return self.accepted >= draft_len * (self.total - len(self.steps))

    def as_dict(self) -> dict[str, Any]:
        return {"steps": list(self.steps), "accepted_per_position": list(self.accepted_per_position)}


@dataclass(frozen=True)
class SingleSteps:
    """Steps of engine and replay that begin at the same token of a text, and how many of them accept differently.

    Totals hide a fault that loses a draft in one step and gains one in another; single steps do not.
    """

    compared: int
    apart: int

    @classmethod
    def of(cls, found: Sequence[Sequence[int] | None], expected: Sequence[Sequence[int]]) -> SingleSteps:
        """Drafts accepted in each step, per text; None where an engine does not report single steps."""
        compared = apart = 0
        for ours, theirs in zip(found, expected, strict=True):
            one, other = _by_start(ours or ()), _by_start(theirs)
            shared = one.keys() & other.keys()
            compared += len(shared)
            apart += sum(one[place] != other[place] for place in shared)
        return cls(compared, apart)


def _by_start(accepted: Sequence[int]) -> dict[int, int]:
    """Steps by the token they begin at; the last one, cut short by the text's end, is left out."""
    starts, place = {}, 0
    for count in accepted[:-1]:
        starts[place] = count
        place += count + 1
    return starts


@dataclass(frozen=True)
class AcceptanceCheck:
    """`found`: the engine's steps; `expected`: the replay's, of which `diverged` do not follow the text."""

    found: StepCounts
    expected: StepCounts
    diverged: int
    tolerance: float
    sampled: bool
    single: SingleSteps = SingleSteps(0, 0)
    single_tolerance: float = 1.0

    def render(self) -> str:
        """Two lines for the report."""
        found, expected = self.found.acceptance_length, self.expected.acceptance_length
        if found is None or expected is None:
            return "  acceptance  nothing was decoded in steps"
        bound = "at most " if self.sampled else ""
        text = (
            f"  acceptance  {found:.2f} tokens per step, the drafter gives this text {bound}{expected:.2f}: "
            f"{self.found.total} steps, {self.expected.total} expected"
        )
        if self.diverged:
            text += f" ({self.diverged} diverged by ties)"
        if self.single.compared:
            text += f"; {self.single.apart} of {self.single.compared} that begin alike accept differently"
        if self.found.accepted_per_position:
            pairs = zip(self.found.accepted_per_position, self.expected.accepted_per_position, strict=True)
            text += "\n  at least 1, 2, ... drafts accepted in " + ", ".join(f"{a} ({e})" for a, e in pairs)
        return text

    def as_dict(self) -> dict[str, Any]:
        return {
            "found": self.found.as_dict(),
            "expected": self.expected.as_dict(),
            "diverged": self.diverged,
            "tolerance": self.tolerance,
            "single_steps": {"compared": self.single.compared, "apart": self.single.apart},
        }

    def alarms(self, engine: Path, draft_len: int, floor: float | None) -> Iterator[Problem]:
        where = str(engine)
        found, expected = self.found.acceptance_length, self.expected.acceptance_length
        if found is None or expected is None or self.found.total < MIN_STEPS:
            why = f"{self.found.total} steps; at least {MIN_STEPS} are needed"
            yield Problem("too little was written to judge acceptance", where, why, "use more prompts or --max-tokens")
            return
        if found == 1.0 and expected > 1.0:
            why = "the drafter is not connected, or its weights are wrong"
            yield Problem("no draft was ever accepted", where, why, "verify the checkpoint; check release and dtype")
        elif self.found.is_full(draft_len) and (self._diverges_often or not self.expected.is_full(draft_len)):
            why = "drafts are accepted without being verified"
            yield Problem("every draft was accepted", where, why, "do not serve this engine")
        else:
            yield from self._differences(where)
        if floor is not None and found < floor:
            what = f"acceptance is {found:.2f}, the floor is {floor:.2f}"
            yield Problem(what, where, None, "train the drafter further, or lower the floor")

    @property
    def _allowed(self) -> float:
        return max(FEW_STEPS, self.tolerance * self.expected.total)

    @property
    def _diverges_often(self) -> bool:
        return self.diverged > max(FEW_STEPS, max(MAX_DIVERGED, self.tolerance) * self.expected.total)

    def _differences(self, where: str) -> Iterator[Problem]:
        if self._diverges_often:
            why = f"TensorRT-LLM's rule leaves the text in {self.diverged} of {self.expected.total} steps"
            remedy = "do not serve this engine; build it again, and compare release and checkpoint"
            yield Problem("drafts were accepted that the checkpoint refuses, or the reverse", where, why, remedy)
        reasons = [*self._reasons()]
        if reasons:
            remedy = "check release and drafter; compare the drafter's tensors with `verify` on the checkpoint"
            yield Problem("acceptance differs from the checkpoint's", where, "; ".join(reasons), remedy)

    def _reasons(self) -> Iterator[str]:
        """Where the counts differ: in total, by prompt, by position."""
        if abs(self.found.total - self.expected.total) > self._allowed:
            yield f"{self.found.total} steps where these texts take {self.expected.total}"
        single = self.single
        if single.apart > max(FEW_STEPS, self.single_tolerance * single.compared):
            yield f"{single.apart} of {single.compared} steps that begin alike accept another number of drafts"
        share = max(PROMPT_TOLERANCE, self.tolerance)
        for number, (found, expected) in enumerate(zip(self.found.steps, self.expected.steps, strict=True), start=1):
            if abs(found - expected) > max(FEW_STEPS, share * expected):
                yield f"prompt {number}: {found} steps where its text takes {expected}"
        at = zip(self.found.accepted_per_position, self.expected.accepted_per_position, strict=False)
        for place, (found, expected) in enumerate(at, start=1):
            if abs(found - expected) > self._allowed or (found == 0 and expected >= MIN_ACCEPTED):
                yield f"position {place}: {found} drafts accepted, {expected} expected"
