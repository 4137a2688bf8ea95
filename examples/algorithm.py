"""ReDrafter's algorithm alone, on random weights: draft, merge into a tree, verify. No files, no engine.

What it shows:

- `beam_search` lets a `Drafter` propose K continuations of L tokens each.
- `build_tree` merges their common prefixes, so that the base model reads each of them once.
- `exact` walks the tree with the base model's own draws. It accepts what a plain sampler with the same seed would
  have drawn, so the text is the base model's, however bad the drafter is. This one is random.

The base model here is a toy: a decaying sum of embeddings, and a random head. Run it from the repository's root:

    .venv/bin/python examples/algorithm.py

A few seconds, most of them for importing torch.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass

import torch
from torch import Tensor

from trtllm_redrafter.redrafter.beam_search import beam_search
from trtllm_redrafter.redrafter.config import DrafterConfig, DraftShape
from trtllm_redrafter.redrafter.drafter import Drafter
from trtllm_redrafter.redrafter.reference import TokenTree, VerifyInput, VerifyOutput, build_tree, exact, node_uniforms
from trtllm_redrafter.redrafter.sampling import SamplingSettings, draw, uniform

VOCAB, HIDDEN = 10, 16
SHAPE = DraftShape(num_beams=3, draft_len=3)


@dataclass(frozen=True)
class Sampling:
    temperature: float = 0.8
    top_k: int = 0
    top_p: float = 1.0


SETTINGS = SamplingSettings.of([Sampling()])


class ToyBase:
    """state' = state / 2 + embedding of the token; logits = head * state'."""

    def __init__(self) -> None:
        self.embedding = torch.randn(VOCAB, HIDDEN)
        self.head = torch.randn(VOCAB, HIDDEN) / 2

    def after(self, state: Tensor, token: int) -> Tensor:
        return state / 2 + self.embedding[token]

    def over_tree(self, state: Tensor, tree: TokenTree) -> Tensor:
        """States [T, H] after each node. A real model computes them in one pass, with `tree.mask` for attention."""
        states: list[Tensor] = []
        for token, parent in zip(tree.tokens[0].tolist(), tree.parents[0].tolist(), strict=True):
            states.append(self.after(state if parent < 0 else states[parent], token))
        return torch.stack(states)


def show(tree: TokenTree, verdict: VerifyOutput) -> None:
    """The tree, accepted nodes marked."""
    tokens, parents, depths = tree.tokens[0].tolist(), tree.parents[0].tolist(), tree.depths[0].tolist()
    accepted = set(verdict.path[0].tolist())

    def below(node: int) -> None:
        mark = "  accepted" if node in accepted and node else "  root" if node == 0 else ""
        print(f"    {'   ' * depths[node]}{tokens[node]}{mark}")
        for child, parent in enumerate(parents):
            if parent == node:
                below(child)

    below(0)
    emitted = [token for token in verdict.emitted[0].tolist() if token >= 0]
    print(f"    emitted: {emitted}\n")


def speculative(base: ToyBase, drafter: Drafter, prompt: list[int], count: int, seed: int) -> tuple[list[int], int]:
    """`count` tokens, and the number of steps they took."""
    state = torch.zeros(HIDDEN)
    for token in prompt:
        state = base.after(state, token)
    root = int(draw((base.head @ state)[None], SETTINGS, uniform(seed, 0)))
    written, steps = [root], 0
    while len(written) < count:
        beams = beam_search(drafter, base.embedding, state[None], torch.tensor([root]), SHAPE)
        tree = build_tree(beams)
        states = base.over_tree(state, tree)
        uniforms = node_uniforms(tree, [seed], torch.tensor([len(written)]))
        verdict = exact(VerifyInput(tree, (states @ base.head.T)[None], SETTINGS, uniforms))
        if steps < 3:
            print(f"step {steps + 1}: {tree.width} nodes of {SHAPE.max_tree_tokens}")
            show(tree, verdict)
        written += [token for token in verdict.emitted[0].tolist() if token >= 0]
        state, root, steps = states[int(verdict.last_node)], int(verdict.next_token), steps + 1
    return written[:count], steps


def plain(base: ToyBase, prompt: list[int], count: int, seed: int) -> list[int]:
    """One token after the other; output position i meets the same uniform number as above."""
    state, written = torch.zeros(HIDDEN), []
    for token in prompt:
        state = base.after(state, token)
    for position in range(count):
        written.append(int(draw((base.head @ state)[None], SETTINGS, uniform(seed, position))))
        state = base.after(state, written[-1])
    return written


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description="Draft, merge into a tree, verify, on random weights.")
    parser.add_argument("--seed", type=int, default=11)
    parser.add_argument("--tokens", type=int, default=60)
    arguments = parser.parse_args()
    torch.manual_seed(arguments.seed)
    base = ToyBase()
    drafter = Drafter(DrafterConfig(VOCAB, HIDDEN, exit_dim=2 * HIDDEN, num_layers=1))
    drafted, steps = speculative(base, drafter, [1, 2, 3], arguments.tokens, arguments.seed)
    sampled = plain(base, [1, 2, 3], arguments.tokens, arguments.seed)
    print(f"speculative: {drafted[:20]} ...\nplain:       {sampled[:20]} ...")
    assert drafted == sampled, "exact verification emits the plain sampler's tokens"
    print(f"the same {len(drafted)} tokens, in {steps} steps instead of {len(sampled) - 1}")


if __name__ == "__main__":
    main()
