"""Equal beams, trees and decisions with TensorRT-LLM's graph, on vectors that its own code computed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.redrafter import golden
from trtllm_redrafter.redrafter.beam_search import Beams, beam_search
from trtllm_redrafter.redrafter.config import DraftShape
from trtllm_redrafter.redrafter.reference import (
    DraftRecord,
    TokenTree,
    VerifyInput,
    base_log_probs,
    build_tree,
    trtllm_decide,
    trtllm_draw,
)
from trtllm_redrafter.redrafter.sampling import SamplingSettings

NO_SETTINGS = SamplingSettings.of([])


def test_the_set_is_complete() -> None:
    for kind in ("draft", "tree", "verify", "step"):
        assert golden.cases(kind), f"no {kind} case in {golden.DIRECTORY}"


WITH_AND_WITHOUT_ROWS = pytest.mark.parametrize("load", [golden.load, golden.load_empty], ids=["rows", "no rows"])
"""Every case once more with an empty batch: what is computed of no rows is no rows, of the same width."""

Load = Callable[[str], tuple[dict[str, Any], dict[str, Tensor]]]


@WITH_AND_WITHOUT_ROWS
@pytest.mark.parametrize("name", golden.cases("draft"))
def test_draft(name: str, load: Load) -> None:
    case, tensors = load(name)
    drafter = golden.drafter_of(case, tensors)
    context_part, state_part = tensors["in.probe"].float().chunk(2, dim=-1)
    golden.close(drafter.logits(context_part, state_part), tensors["out.probe_logits"])
    shape = DraftShape(case["num_beams"], case["draft_len"])
    inputs = (tensors["param.embedding"].float(), tensors["in.prompt_state"].float(), tensors["in.init_token"])
    beams = beam_search(drafter, *inputs, shape, keep_log_probs=True)
    golden.same(beams.tokens, tensors["out.beams"])
    assert beams.log_probs is not None
    golden.close(beams.log_probs, tensors["out.log_probs"])
    assert torch.equal(beam_search(drafter, *inputs, shape).tokens, beams.tokens)


def check_tree(tree: TokenTree, base: Tensor, expected: dict[str, Tensor]) -> None:
    nodes = tree.is_node  # TensorRT-LLM's graph returns sequences concatenated, without padding
    golden.same(tree.draft_indices, expected["indices"])
    golden.same(tree.tokens[nodes].int(), expected["flat_tokens"])
    golden.same(tree.lengths.int(), expected["lengths"])
    golden.same((base.view(-1, 1) + tree.depths)[nodes].int(), expected["position_ids"])
    if len(tree.lengths):
        assert tree.width == expected["mask"].shape[1] == int(expected["lengths"].max())
    for row, length in enumerate(tree.lengths.tolist()):  # padding is not a fixed value in TensorRT-LLM
        golden.same(tree.depths[row, :length].int(), expected["offsets"][row, :length])
        golden.same(tree.mask[row, :length, :length], expected["mask"][row, :length, :length])


@WITH_AND_WITHOUT_ROWS
@pytest.mark.parametrize("name", golden.cases("tree"))
def test_tree(name: str, load: Load) -> None:
    _, tensors = load(name)
    tokens = tensors["in.beams"].long()
    tree = build_tree(Beams(tokens, torch.zeros(tokens.shape), None))
    expected = {
        "indices": tensors["out.draft_token_indices"],
        "flat_tokens": tensors["out.flat_tokens"],
        "lengths": tensors["out.generation_lengths"],
        "position_ids": tensors["out.packed_position_ids"],
        "offsets": tensors["out.position_offsets"],
        "mask": tensors["out.mask"],
    }
    check_tree(tree, tensors["in.position_ids_base"], expected)


def unpack(rows: Tensor, lengths: Tensor, first: int) -> Tensor:
    """[rows, X] packed end to end from `first` on -> [B, T, X], padded with zeros."""
    if not len(lengths):
        return rows.new_zeros(0, 1, rows.shape[1])
    parts = torch.split(rows[first:], lengths.tolist())
    return torch.nn.utils.rnn.pad_sequence(list(parts), batch_first=True)


def decide(
    tensors: dict[str, Tensor], tree: TokenTree | None, tokens: Tensor, log_probs: Tensor, *, greedy: bool
) -> dict[str, Tensor]:
    """One verification over context rows, then generation rows, as the graph orders them."""
    logits, hidden = tensors["in.logits"].float(), tensors["in.hidden"].float()
    generations = 0 if tree is None else len(tree.lengths)
    contexts = len(tensors["in.request_types"]) - generations
    inverse = tensors["in.inverse_temperature"]
    scale = 1.0 if greedy else inverse[:contexts].unsqueeze(1)
    next_probs = [base_log_probs(logits[:contexts] * scale, greedy=greedy).softmax(dim=-1)]
    inputs = [hidden[:contexts]]
    accepted = [torch.zeros(contexts, dtype=torch.int64)]
    beams = [torch.zeros(contexts, dtype=torch.int64)]
    if tree is not None:
        draft = DraftRecord(
            tokens, log_probs, tensors["in.rand_validation"], tensors["in.rand_sample"], inverse[contexts:], greedy
        )
        decision = trtllm_decide(VerifyInput(tree, unpack(logits, tree.lengths, contexts), NO_SETTINGS, None, draft))
        states = unpack(hidden, tree.lengths, contexts)
        next_probs.append(decision.next_probs)
        inputs.append(states[torch.arange(generations), decision.node])
        accepted.append(decision.accepted)
        beams.append(decision.beam)
    probs = torch.cat(next_probs)
    return {
        "probs": probs,
        "draft_input": torch.cat(inputs),
        "accepted": torch.cat(accepted),
        "beam": torch.cat(beams),
        "next_token": trtllm_draw(probs, tensors["in.rand_sample"]),
    }


def check_decision(found: dict[str, Tensor], tensors: dict[str, Tensor], accepted: Tensor) -> None:
    golden.same(found["accepted"], accepted)
    golden.same(found["beam"], tensors["out.accepted_beam_index"])
    golden.close(found["probs"], tensors["out.probs"])
    golden.same(found["next_token"], tensors["out.next_token"])
    golden.close(found["draft_input"], tensors["out.draft_input"])


@WITH_AND_WITHOUT_ROWS
@pytest.mark.parametrize("name", golden.cases("verify"))
def test_verify(name: str, load: Load) -> None:
    case, tensors = load(name)
    tokens = tensors["in.draft_tokens"].long()
    tree = build_tree(Beams(tokens, torch.zeros(tokens.shape), None))
    golden.same(tree.draft_indices, tensors["in.draft_indices"])
    golden.same(tree.lengths, tensors["in.generation_lengths"])
    found = decide(tensors, tree, tokens, tensors["in.draft_log_probs"], greedy=case["greedy"])
    check_decision(found, tensors, tensors["out.num_accepted_drafts"])
    assert found["accepted"].tolist() == case["accepted"]


@WITH_AND_WITHOUT_ROWS
@pytest.mark.parametrize("name", golden.cases("step"))
def test_steps(name: str, load: Load) -> None:
    """Whole steps in a row: verify, draw, draft, merge; each step's tree is the next one's input."""
    case, tensors = load(name)
    drafter = golden.drafter_of(case, tensors)
    embedding = tensors["param.embedding"].float()
    shape = DraftShape(case["num_beams"], case["draft_len"])
    steps = sorted({key.split(".")[0] for key in tensors if key.startswith("step")}, key=lambda s: int(s[4:]))
    beams: Beams | None = None
    for step in steps:
        now = {k.removeprefix(step + "."): v for k, v in tensors.items() if k.startswith(step + ".")}
        kept = now["in.kept_requests"].long()
        drafts, log_probs, tree = torch.empty(0), torch.empty(0), None
        if len(kept):
            assert beams is not None and beams.log_probs is not None
            drafts, log_probs = beams.tokens[kept], beams.log_probs[kept]
            tree = build_tree(Beams(drafts, beams.path_scores[kept], None))
        found = decide(now, tree, drafts, log_probs, greedy=case["greedy"])
        check_decision(found, now, now["out.num_accepted_tokens"] - 1)
        beams = beam_search(drafter, embedding, found["draft_input"], found["next_token"], shape, keep_log_probs=True)
        assert beams.log_probs is not None
        golden.same(beams.tokens, now["out.next_draft_tokens"])
        golden.close(beams.log_probs, now["out.next_draft_probs"])
        next_tree = build_tree(beams)
        expected = {
            "indices": now["out.next_draft_indices"],
            "flat_tokens": now["out.next_flat_tokens"],
            "lengths": now["out.next_spec_decoding_generation_lengths"],
            "position_ids": now["out.packed_position_ids"],
            "offsets": now["out.next_spec_decoding_position_offsets"],
            "mask": now["out.spec_decoding_mask"],
        }
        check_tree(next_tree, now["in.position_ids_base"] + found["accepted"] + 1, expected)
        if len(next_tree.lengths):
            assert now["out.max_gen_token"].item() == next_tree.width
        assert now["out.total_gen_token"].sum() == next_tree.lengths.sum()
