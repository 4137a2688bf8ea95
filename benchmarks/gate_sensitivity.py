"""How small a fault does the parity gate see, and does it keep quiet about engines that are right?

    python benchmarks/gate_sensitivity.py --base .cache/smollm2-135m-instruct --drafter drafters/smollm2-135m-instruct \
        --output benchmarks/results/gate_sensitivity.json

Faults of each kind are planted in a torch engine's weights in memory, from large to small, and the gate's figures are
computed as `verify --reference` computes them. Weights are never compared bit for bit here: that sees every one of
these exactly, and is switched off to show what behaviour alone tells. Kinds of single weights are planted at
several places; a fault counts as seen where it is seen at all of them.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trtllm_redrafter.backends.base import Request, SamplingParams
from trtllm_redrafter.backends.engine_config import read_engine_config
from trtllm_redrafter.backends.torch.backend import TorchBackend, _make_executor
from trtllm_redrafter.backends.torch.drafting import frequent_rows, load_drafter, make_search
from trtllm_redrafter.backends.torch.low_rank import load_factor
from trtllm_redrafter.backends.torch.runner import TorchRunner
from trtllm_redrafter.backends.torch.weights import ModelWeights, load_weights
from trtllm_redrafter.benchmark.environment import describe
from trtllm_redrafter.checkpoint.config import CheckpointConfig
from trtllm_redrafter.checkpoint.reader import Checkpoint
from trtllm_redrafter.run import api
from trtllm_redrafter.verify.distributions import check_distributions
from trtllm_redrafter.verify.gate_decode import LOGITS, probe_texts
from trtllm_redrafter.verify.gate_drafter import check_drafts, pick_contexts
from trtllm_redrafter.verify.gate_report import PROMPTS
from trtllm_redrafter.verify.reference import ReferenceLogits, Text, reference_logits

PLACES = 3
"""Layers (first, middle, last) in which a fault of one weight or one layer is planted."""


@dataclass(frozen=True)
class Kind:
    """A kind of fault and its sizes, falling. `places` 1: the fault has no place to choose."""

    name: str
    sizes: tuple[float, ...]
    places: int = PLACES


FACTORS = (2.0, 1.5, 1.2, 1.1, 1.05, 1.03, 1.02, 1.01, 1.005)
VALUES = (1000.0, 300.0, 100.0, 30.0, 10.0, 3.0, 1.0, 0.3)
BASE = (
    Kind("final norm x", FACTORS, 1),
    Kind("all MLPs x", FACTORS, 1),
    Kind("one MLP x", FACTORS),
    Kind("one layer's norm x", FACTORS),
    Kind("one norm weight x", (16.0, 8.0, 4.0, 2.0, 1.5)),
    Kind("one embedding row x", FACTORS, 1),
    Kind("one head row x", FACTORS, 1),
    Kind("one MLP weight =", VALUES),
    Kind("one attention weight =", VALUES),
    Kind("one weight x", (16.0, 4.0, 2.0, 1.1, 1.01)),
    Kind("epsilon x", (1000.0, 100.0, 30.0, 10.0, 3.0), 1),
    Kind("rotary base x", FACTORS, 1),
)
DRAFTER = (
    Kind("drafter: one block x", FACTORS),
    Kind("drafter: recurrence x", FACTORS, 1),
    Kind("drafter: one weight =", VALUES),
    Kind("drafter: one bias +", (30.0, 10.0, 5.0, 3.0, 1.0, 0.3)),
    Kind("drafter: one head weight =", VALUES, 1),
)


def layer_of(count: int, place: int) -> int:
    return (0, count // 2, count - 1)[place]


def planted(weights: ModelWeights, config: CheckpointConfig, name: str, size: float, place: int, token: int) -> tuple[
    ModelWeights, CheckpointConfig
]:  # fmt: skip
    """The fault in a copy of what it touches."""
    if name == "epsilon x":
        return weights, replace(config, norm_epsilon=config.norm_epsilon * size)
    if name == "rotary base x":
        return weights, replace(config, rotary_base=config.rotary_base * size)
    if name == "final norm x":
        return replace(weights, final_norm=weights.final_norm * size), config
    if name in ("one embedding row x", "one head row x"):
        field = "embedding" if "embedding" in name else "head"
        table = getattr(weights, field).clone()
        table[token] *= size
        return replace(weights, **{field: table}), config
    layers, index = list(weights.layers), layer_of(len(weights.layers), place)
    for i in range(len(layers)) if name.startswith("all") else [index]:
        layer = layers[i]
        if name in ("all MLPs x", "one MLP x"):
            layers[i] = replace(layer, down_proj=layer.down_proj * size)
        elif name == "one layer's norm x":
            layers[i] = replace(layer, input_norm=layer.input_norm * size)
        elif name == "one norm weight x":
            norm = layer.input_norm.clone()
            norm[int(norm.abs().argmax())] *= size
            layers[i] = replace(layer, input_norm=norm)
        else:
            field = "qkv" if "attention" in name else "down"
            matrix = getattr(layer, field).clone()
            matrix[7, 11] = matrix[7, 11] * size if name.endswith("x") else size
            layers[i] = replace(layer, **{field: matrix})
    return replace(weights, layers=tuple(layers)), config


def plant_drafter(tensors: Mapping[str, Tensor], name: str, size: float, place: int, token: int) -> None:
    """In place; tensors are copies."""
    blocks = sorted(key for key in tensors if key.startswith("layers.") and key.endswith("weight"))
    block = blocks[layer_of(len(blocks), place)]
    if name.endswith("block x"):
        tensors[block].mul_(size)
    elif name.endswith("recurrence x"):
        tensors["rnn_u.weight"].mul_(size)
    elif name.endswith("head weight ="):
        tensors["lm_head.weight"][token, 5] = size
    elif name.endswith("weight ="):
        tensors[block][3, 5] = size
    else:
        tensors[block.replace("weight", "bias")][3] += size


class Bench:
    """An intact engine, its texts and what they should give."""

    def __init__(self, engine: Path) -> None:
        self.engine = engine
        self.runner = TorchBackend().load(engine, device="cpu", verify_hashes=False)
        self.checkpoint = Checkpoint.open(engine / "checkpoint")
        self.weights = load_weights(self.checkpoint, torch.device("cpu"))
        info = self.runner.info
        prompts = [self.runner.encode_prompt(text, chat=self.runner.has_chat_template) for text in PROMPTS]
        results = self.runner.generate([Request(prompt, SamplingParams(LOGITS)) for prompt in prompts])
        own = [Text(prompt, tuple(r.token_ids)) for prompt, r in zip(prompts, results, strict=True)]
        self.texts: Sequence[Text] = (*own, *probe_texts(info.vocab_size, info.max_input_len, info.max_seq_len))
        self.pair: ReferenceLogits = reference_logits(self.checkpoint, self.texts, "cpu")
        self.token = own[0].tokens[3]
        states = [found.states for found in map(self._along, self.texts)]
        self.contexts, self.roots = pick_contexts([s for s in states if s is not None], self.texts)
        config = read_engine_config(engine)
        self.limits, self.head_rows = config.limits, config.head_rows

    def _along(self, text: Text) -> Any:
        return self.runner.teacher_forced(text.prompt, text.tokens)

    def base(self, name: str | None, size: float = 1.0, place: int = 0) -> tuple[bool, dict[str, float]]:
        """Is it seen, and by which figures?"""
        weights, config = self.weights, self.checkpoint.config
        if name is not None:
            weights, config = planted(weights, config, name, size, place, self.token)
        executor, _ = _make_executor(config, weights, self.limits, self.runner.info.draft_shape)
        runner = TorchRunner(self.runner.info, executor, None, None, frozenset())
        rows = (
            (runner.teacher_forced(t.prompt, t.tokens).logits, *self.pair.rows(i)) for i, t in enumerate(self.texts)
        )
        found = check_distributions(rows, self.pair.dtype)
        runner.close()
        return bool(found.exceeded() or found.not_finite), {k: v for k, (v, _) in found.figures().items()}

    def drafter(self, name: str | None, size: float = 1.0, place: int = 0) -> tuple[bool, dict[str, float]]:
        config = self.checkpoint.config.drafter
        assert config is not None and self.runner.info.draft_shape is not None
        drafter = load_drafter(self.checkpoint, config, torch.device("cpu"))
        for parameter in drafter.parameters():
            parameter.data = parameter.data.clone()
        factor = load_factor(self.engine, self.weights.head)
        if name is not None:
            plant_drafter({k: p.data for k, p in drafter.named_parameters()}, name, size, place, self.token)
            factor = None if "head" in name else factor  # the engine that was built from such a head has no factor
        info = self.runner.info
        rows = frequent_rows(self.checkpoint.path, self.head_rows, self.checkpoint.config.vocab_size)
        self.runner._drafting = make_search(
            drafter, self.runner.executor, self.weights.embedding, info.draft_shape,
            rows=rows, max_batch_size=info.max_batch_size, low_rank=factor,
        )  # fmt: skip
        beams = self.runner.drafts(self.contexts, self.roots)
        assert beams is not None
        found = check_drafts(beams, self.contexts, self.checkpoint, head_rows=self.head_rows)
        return not found.ok, {"typical": found.typical, "worst": found.worst}


def smallest(kind: Kind, run: Callable[[str, float, int], tuple[bool, dict[str, float]]]) -> dict[str, Any]:
    """Sizes falling until one is missed at every place; what was seen everywhere, and what anywhere."""
    everywhere, anywhere, figures = None, None, {}
    for size in kind.sizes:
        found = [run(kind.name, size, place) for place in range(kind.places)]
        figures[str(size)] = [{k: round(v, 2) for k, v in values.items()} for _, values in found]
        seen = [one for one, _ in found]
        everywhere = size if all(seen) and everywhere in (None, previous(kind, size)) else everywhere
        anywhere = size if any(seen) else anywhere
        if not any(seen):
            break
    result = {"kind": kind.name, "seen_everywhere": everywhere, "seen_somewhere": anywhere, "figures": figures}
    print(f"{kind.name:28s} everywhere {everywhere}, somewhere {anywhere}", flush=True)
    return result


def previous(kind: Kind, size: float) -> float | None:
    place = kind.sizes.index(size)
    return kind.sizes[place - 1] if place else None


def results(bench: Bench) -> Iterator[dict[str, Any]]:
    for kind in BASE:
        yield smallest(kind, bench.base)
    for kind in DRAFTER:
        yield smallest(kind, bench.drafter)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--drafter", type=Path, required=True)
    parser.add_argument("--dtype", help="of the engine; the base model's by default")
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = api.convert(args.base, Path(folder) / "checkpoint", drafter=args.drafter, dtype=args.dtype)
        bench = Bench(api.build(checkpoint, Path(folder) / "engine", max_batch_size=4, max_seq_len=512))
        intact = {"base": bench.base(None)[1], "drafter": bench.drafter(None)[1]}
        print("intact", intact, flush=True)
        found = list(results(bench))
        document = {
            "model": args.base.name, "dtype": bench.pair.dtype, "intact": intact, "faults": found,
            "environment": describe(bench.runner.info, sys.argv),
        }  # fmt: skip
    args.output.write_text(json.dumps(document, indent=1, default=str) + "\n")


if __name__ == "__main__":
    main()
