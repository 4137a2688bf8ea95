"""The parity gate: does an engine write what its checkpoint says, and does its drafter draft?

The engine decodes a few prompts. Then the torch backend computes the checkpoint's laws along the engine's own tokens:
each must be the largest of its law. In 16 bits two nearly equal logits may change places (a tie); anything further down
is a fault. A wrong drafter changes no token, only the speed, so acceptance is compared too, and both extremes alarm:
nothing ever accepted (a drafter that is not connected), everything always (a verification that does not verify).

    report = parity_gate(GateRequest(engine, reference, prompts, ...))
    report.ok, report.render()
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trtllm_redrafter.backends import engine_backend, load_backend
from trtllm_redrafter.backends.base import BuildOptions, Request, Runner, SamplingParams
from trtllm_redrafter.checkpoint.config_reader import read_checkpoint_config
from trtllm_redrafter.errors import MismatchError, Problem
from trtllm_redrafter.generation.gate_checks import acceptance_alarms, acceptance_length, compare, token_alarms
from trtllm_redrafter.generation.session import best_device
from trtllm_redrafter.progress import no_progress

if TYPE_CHECKING:
    from trtllm_redrafter.backends.torch.runner import TorchRunner

PROMPTS = (
    "Why is the sky blue? Answer in three sentences.",
    "Write a short story about a lighthouse keeper who finds a map.",
    "List the first ten prime numbers and explain what makes them prime.",
    "Translate into French: The train leaves at nine, but the station opens at seven.",
)
"""What is decoded when nobody names prompts: prose, story, list, translation."""


@dataclass(frozen=True)
class GateRequest:
    """What to compare. `prompts` are texts; `min_acceptance` a floor in tokens per step, None for none."""

    engine: Path
    reference: Path
    prompts: tuple[str, ...]
    max_tokens: int
    min_acceptance: float | None
    device: str


@dataclass(frozen=True)
class GateReport:
    """`alarms` are findings that no single token shows."""

    request: GateRequest
    same: int
    ties: int
    faults: tuple[Problem, ...]
    alarms: tuple[Problem, ...]
    acceptance: float | None
    reference_acceptance: float | None
    token_ids: tuple[tuple[int, ...], ...]

    @property
    def ok(self) -> bool:
        return not self.faults and not self.alarms

    def render(self) -> str:
        total = self.same + self.ties + len(self.faults)
        verdict = "passes" if self.ok else "FAILS"
        lines = [
            f"{self.request.engine} {verdict} against {self.request.reference}",
            f"  tokens      {total} checked after {len(self.request.prompts)} prompts: "
            f"{self.same} the checkpoint's own, {self.ties} numeric ties, {len(self.faults)} faults",
        ]
        if self.acceptance is not None:
            other = "" if self.reference_acceptance is None else f", torch backend {self.reference_acceptance:.2f}"
            lines.append(f"  acceptance  {self.acceptance:.2f} tokens per step{other}")
        problems = (*self.faults, *self.alarms)
        return "\n".join(lines + ["- " + problem.render().replace("\n", "\n  ") for problem in problems])

    def as_dict(self) -> dict[str, Any]:
        return {
            "engine": str(self.request.engine),
            "reference": str(self.request.reference),
            "ok": self.ok,
            "same": self.same,
            "ties": self.ties,
            "faults": [p.as_dict() for p in self.faults],
            "alarms": [p.as_dict() for p in self.alarms],
            "acceptance_length": self.acceptance,
            "reference_acceptance_length": self.reference_acceptance,
            "token_ids": [list(ids) for ids in self.token_ids],
        }


def parity_gate(request: GateRequest) -> GateReport:
    """Decode with the engine, let go of it, then compute the reference: the two never share the memory."""
    backend = load_backend(engine_backend(request.engine))
    _check_pair(request)
    runner = backend.load(request.engine, device=request.device, verify_hashes=False)
    try:
        prompts = [_encode(runner, text, request.max_tokens) for text in request.prompts]
        sampling = SamplingParams(max_tokens=request.max_tokens)
        results = runner.generate([Request(prompt, sampling) for prompt in prompts])
        drafts = runner.info.draft_shape
    finally:
        runner.close()
    quantized = read_checkpoint_config(request.reference).quant_algo is not None
    with _reference_runner(request, prompts) as reference:
        same, ties, faults = compare(request.engine, reference, quantized, prompts, results)
        expected = reference.generate([Request(prompt, sampling) for prompt in prompts]) if drafts else []
    alarms = [*token_alarms(request.engine, results, same, ties)]
    if drafts is not None:
        alarms += acceptance_alarms(request.engine, results, expected, drafts.draft_len, request.min_acceptance)
    return GateReport(
        request, same, ties, tuple(faults), tuple(alarms),
        acceptance_length(results) if drafts else None,
        acceptance_length(expected) if drafts else None,
        tuple(tuple(result.token_ids) for result in results),
    )  # fmt: skip


def _check_pair(request: GateRequest) -> None:
    """A reference of another model would make every token a fault."""
    from trtllm_redrafter.fsio import read_json

    config = read_checkpoint_config(request.reference)
    raw = read_json(request.engine / "config.json")
    found = raw.get("pretrained_config")
    if not isinstance(found, dict):
        found = read_json(request.engine / "checkpoint" / "config.json")
    keys = ("hidden_size", "num_hidden_layers", "vocab_size")
    differ = [key for key in keys if found.get(key) != getattr(config, key)]
    if differ:
        why = "; ".join(f"{key} is {found.get(key)} there, {getattr(config, key)} here" for key in differ)
        raise MismatchError(
            "the engine was not built from this checkpoint", where=request.reference, why=why,
            remedy="pass the checkpoint that the engine's manifest names",
        )  # fmt: skip


def _encode(runner: Runner, text: str, max_tokens: int) -> tuple[int, ...]:
    room = min(runner.info.max_input_len, runner.info.max_seq_len - max_tokens)
    return runner.encode_prompt(text, chat=runner.has_chat_template)[-room:]


@contextmanager
def _reference_runner(request: GateRequest, prompts: Sequence[tuple[int, ...]]) -> Iterator[TorchRunner]:
    """The checkpoint on the torch backend, for as long as it is needed."""
    from trtllm_redrafter.backends.torch.backend import TorchBackend

    backend = TorchBackend()
    longest = max(len(prompt) for prompt in prompts)
    parent = request.reference.resolve().parent
    with tempfile.TemporaryDirectory(prefix=".redrafter-gate-", dir=parent) as folder:
        options = BuildOptions(
            checkpoint=request.reference, output=Path(folder) / "engine", backend="torch", tokenizer=None,
            max_batch_size=len(prompts), max_input_len=longest, max_seq_len=longest + request.max_tokens,
            overwrite=False,
        )  # fmt: skip
        backend.build(backend.plan(options), no_progress)
        runner = backend.load(options.output, device=best_device(), verify_hashes=False)
        try:
            yield runner
        finally:
            runner.close()
