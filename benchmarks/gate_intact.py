"""Does the parity gate keep quiet about engines that are right? Tiny random models: many seeds, all families, dtypes.

    python benchmarks/gate_intact.py --seeds 0 40 --device cpu --output benchmarks/results/gate_intact.json

Each engine goes through `verify --reference` and, on a CPU, `verify --against` (transformers). Printed are alarms, and
the largest figure of each kind: how far intact engines stay from being refused. Odd seeds are wider and deeper, every
fourth has no drafter.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections import defaultdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the tests' tiny models

from tests.engines import build_engine, write_checkpoint, write_tokenizer
from tests.tiny_models import FAMILIES
from trtllm_redrafter.verify.gate import GateRequest, parity_gate
from trtllm_redrafter.verify.tokens import greedy_parity

PROMPTS = ("one", "a second prompt", "3")
Figures = dict[str, dict[str, list[float]]]


def run(seed: int, family: str, dtype: str, device: str, figures: Figures) -> list[str]:
    """Alarms of one engine; what was measured is added to `figures`."""
    wider = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3} if seed % 2 else {}
    tied = {"tie_word_embeddings": True} if seed % 3 == 2 and family == "llama" else {}
    alarms = []
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        checkpoint = write_checkpoint(
            place / "model", family, drafter=seed % 4 != 3, dtype=dtype, seed=seed, vocab_size=259, **wider, **tied
        )
        engine = build_engine(checkpoint, place / "engine", write_tokenizer(place / "tokenizer"))
        report = parity_gate(GateRequest(engine, checkpoint, PROMPTS, 40, None, device))
        alarms += [p.render() for p in (*report.faults, *report.alarms)]
        if report.distributions is not None:
            add(figures[f"logits, {dtype}"], {k: v for k, (v, _) in report.distributions.figures().items()})
        if report.drafts is not None:
            add(figures[f"drafter, {dtype}"], {"typical": report.drafts.typical, "worst": report.drafts.worst})
        if report.steps is not None and report.steps.single.compared:
            single = report.steps.single
            add(figures[f"steps, {dtype}"], {"apart": single.apart / single.compared})
        if device == "cpu":
            parity = greedy_parity(engine, place / "model" / "base")
            alarms += [p.render() for p in parity.problems]
            add(figures[f"transformers, {dtype}"], {k: v for k, (v, _) in parity.distributions.figures().items()})
    return [f"seed {seed}, {family}, {dtype}: {alarm}" for alarm in alarms]


def add(figures: dict[str, list[float]], found: dict[str, float]) -> None:
    for name, value in found.items():
        figures[name].append(value)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs=2, default=(0, 40))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    figures: Figures = defaultdict(lambda: defaultdict(list))
    alarms, engines = list[str](), 0
    for seed in range(*args.seeds):
        for family in FAMILIES:
            for dtype in ("float32", "bfloat16", "float16"):
                alarms += run(seed, family, dtype, args.device, figures)
                engines += 1
    largest = {kind: {name: max(values) for name, values in found.items()} for kind, found in figures.items()}
    document = {"engines": engines, "device": args.device, "alarms": alarms, "largest": largest}
    print(json.dumps(document, indent=1))
    if args.output is not None:
        args.output.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
