"""Replay the decoding steps of a given text, to count the steps an engine should have taken to write it.

A free-running decode diverges from the engine's text at the first tie, and from there its steps say nothing about the
engine's. So the text is given, and each step is repeated from where the engine was: draft from the hidden state of the
last committed token, run the tree, decide with TensorRT-LLM's rule, advance by what was accepted.

    replay = load_replay(engine, reference, runner, DraftShape(5, 5), "cpu", greedy=True)
    replay.steps(prompt, tokens)        # Steps(accepted=(2, 0, 3), diverged=0)

In greedy mode the text alone shows what was accepted: a drafted token that comes next in the text was accepted, because
the token drawn after a rejection is never one of the drafts. The rule on the reference's logits agrees except for ties;
steps where it does not are counted as `diverged`. For a sampled text only an upper bound is known: a draft that is
tried once per beam, with different random numbers, can be rejected and still be drawn.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from trtllm_redrafter.backends.engine_config import TORCH, EngineConfig
from trtllm_redrafter.backends.torch.drafting import frequent_rows, load_drafter
from trtllm_redrafter.checkpoint.reader import Checkpoint
from trtllm_redrafter.redrafter.beam_search import Beams, DraftHead, beam_search, draft_head
from trtllm_redrafter.redrafter.config import DraftShape
from trtllm_redrafter.redrafter.drafter import Drafter
from trtllm_redrafter.redrafter.sampling import SamplingSettings
from trtllm_redrafter.redrafter.token_tree import Tree, build_tree
from trtllm_redrafter.redrafter.verification import RULES, DraftRecord, Step, VerifyOutput

if TYPE_CHECKING:
    from trtllm_redrafter.backends.torch.runner import TorchRunner

_EMBEDDING = "transformer.vocab_embedding.weight"


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
    engine: EngineConfig, reference: Path, runner: TorchRunner, shape: DraftShape, device: str, *, greedy: bool
) -> Replay:
    """`runner` runs the checkpoint `reference`; its drafter is read again here, in the dtype it is stored in."""
    checkpoint = Checkpoint.open(reference)
    config = checkpoint.config.drafter
    assert config is not None
    place = torch.device(device)
    drafter = load_drafter(checkpoint, config, place)
    rows = frequent_rows(reference, engine.head_rows, checkpoint.config.vocab_size)
    score_dtype = torch.float32 if engine.backend == TORCH else None
    embedding = checkpoint.load(_EMBEDDING).to(place)
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
    return RULES["trtllm"](Step(build_tree(beams), cast, SamplingSettings.of([], cast.device), None, record))


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
