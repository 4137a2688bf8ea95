"""The parity gate: does an engine write what its checkpoint says, and does its drafter draft?

The engine decodes a few prompts. Then the torch backend computes the checkpoint's laws along the engine's own tokens:
each must be the largest of its law. In 16 bits two nearly equal logits may change places (a tie); anything further down
is a fault. A wrong drafter changes no token, only the speed, so the steps are walked again along the same tokens with
TensorRT-LLM's search and rule (`replay`), and their number is compared (`gate_acceptance`).

    report = parity_gate(GateRequest(engine, reference, prompts, ...))
    report.ok, report.render()

A sampling engine is decoded at temperature 1, and less can be said of it: see `gate_checks` and `replay`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trtllm_redrafter.backends import engine_backend, load_backend
from trtllm_redrafter.backends.base import Request, Result, Runner, SamplingParams
from trtllm_redrafter.checkpoint.config_reader import read_checkpoint_config
from trtllm_redrafter.errors import MismatchError, Problem
from trtllm_redrafter.generation.gate_acceptance import AcceptanceCheck, StepCounts, tolerance
from trtllm_redrafter.generation.gate_checks import compare, sampled_alarms, token_alarms
from trtllm_redrafter.generation.session import best_device, built_shape
from trtllm_redrafter.planning.sizes import weight_bytes

if TYPE_CHECKING:
    from trtllm_redrafter.backends.torch.runner import TorchRunner
    from trtllm_redrafter.redrafter.config import DraftShape

PROMPTS = (
    "Why is the sky blue? Answer in three sentences.",
    "Write a short story about a lighthouse keeper who finds a map.",
    "List the first ten prime numbers and explain what makes them prime.",
    "Translate into French: The train leaves at nine, but the station opens at seven.",
)
"""What is decoded when nobody names prompts: prose, story, list, translation."""

REFERENCE_SHARE = 1.3
"""Of the model's bytes, what its reference takes: the replay's second copy of drafter and embedding, logits, cache."""


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
    """`alarms` are findings that no single token shows. `sampled`: the tokens were drawn, and are not counted."""

    request: GateRequest
    same: int
    ties: int
    faults: tuple[Problem, ...]
    alarms: tuple[Problem, ...]
    steps: AcceptanceCheck | None
    """None: the engine has no drafter."""
    token_ids: tuple[tuple[int, ...], ...]
    sampled: bool

    @property
    def ok(self) -> bool:
        return not self.faults and not self.alarms

    @property
    def acceptance(self) -> float | None:
        """Tokens per step, as the engine counted them."""
        return None if self.steps is None else self.steps.found.acceptance_length

    @property
    def reference_acceptance(self) -> float | None:
        """Tokens per step that the checkpoint's drafter gives the same texts."""
        return None if self.steps is None else self.steps.expected.acceptance_length

    def render(self) -> str:
        prompts = f"after {len(self.request.prompts)} prompts"
        counts = f"{self.same} the checkpoint's own, {self.ties} numeric ties, {len(self.faults)} faults"
        tokens = f"{self.same + self.ties + len(self.faults)} checked {prompts}: {counts}"
        if self.sampled:
            drawn = sum(map(len, self.token_ids))
            tokens = f"{drawn} drawn {prompts}: single ones cannot be checked, their likelihood was"
        lines = [
            f"{self.request.engine} {'passes' if self.ok else 'FAILS'} against {self.request.reference}",
            f"  tokens      {tokens}",
        ]
        if self.steps is not None:
            lines.append(self.steps.render())
        problems = (*self.faults, *self.alarms)
        return "\n".join(lines + ["- " + problem.render().replace("\n", "\n  ") for problem in problems])

    def as_dict(self) -> dict[str, Any]:
        return {
            "engine": str(self.request.engine),
            "reference": str(self.request.reference),
            "ok": self.ok,
            "sampled": self.sampled,
            "same": self.same,
            "ties": self.ties,
            "faults": [p.as_dict() for p in self.faults],
            "alarms": [p.as_dict() for p in self.alarms],
            "acceptance_length": self.acceptance,
            "reference_acceptance_length": self.reference_acceptance,
            "steps": None if self.steps is None else self.steps.as_dict(),
            "token_ids": [list(ids) for ids in self.token_ids],
        }


def parity_gate(request: GateRequest) -> GateReport:
    """Decode with the engine, let go of it, then compute the reference: the two never share the memory."""
    engine_backend(request.engine)  # says what the directory is, if it is no engine
    _check_pair(request)
    sampled = _samples(request)
    prompts, results, shape = _decode(request, sampled=sampled)
    same, ties, faults, alarms = 0, 0, list[Problem](), list[Problem]()
    quantized = read_checkpoint_config(request.reference).quant_algo is not None
    steps = None
    device = reference_device(request.reference)  # asked once: the replay's tensors meet the reference's
    with _reference_runner(request, prompts, device) as reference:
        if sampled:
            alarms += sampled_alarms(request.engine, reference, prompts, results)
        else:
            same, ties, faults = compare(request.engine, reference, quantized, prompts, results)
        if shape is not None:
            allowed = tolerance(reference.info.dtype, quantized=quantized, sampled=sampled)
            steps = _replayed(request, reference, device, shape, prompts, results, allowed, sampled=sampled)
    alarms += token_alarms(request.engine, results, same, ties)
    if steps is not None and shape is not None:
        alarms += steps.alarms(request.engine, shape.draft_len, request.min_acceptance)
    token_ids = tuple(tuple(result.token_ids) for result in results)
    return GateReport(request, same, ties, tuple(faults), tuple(alarms), steps, token_ids, sampled)


def _samples(request: GateRequest) -> bool:
    """TensorRT-LLM compiles the choice into an engine with a drafter; without one the request decides."""
    config = read_checkpoint_config(request.reference)
    return engine_backend(request.engine) == "tensorrt-llm" and config.drafter is not None and not config.greedy


def _decode(request: GateRequest, *, sampled: bool) -> tuple[list[tuple[int, ...]], list[Result], DraftShape | None]:
    """What the engine makes of the prompts, and what it drafts with."""
    backend = load_backend(engine_backend(request.engine))
    runner = backend.load(request.engine, device=request.device, verify_hashes=False)
    try:
        prompts = [_encode(runner, text, request.max_tokens) for text in request.prompts]
        sampling = SamplingParams(request.max_tokens, temperature=float(sampled), seed=1 if sampled else None)
        return prompts, runner.generate([Request(prompt, sampling) for prompt in prompts]), runner.info.draft_shape
    finally:
        runner.close()


def _replayed(
    request: GateRequest, reference: TorchRunner, device: str, shape: DraftShape, prompts: Sequence[tuple[int, ...]],
    results: Sequence[Result], allowed: float, *, sampled: bool,
) -> AcceptanceCheck:  # fmt: skip
    """The engine's steps beside those its texts take."""
    from trtllm_redrafter.generation.replay import load_replay

    replay = load_replay(request.engine, request.reference, reference, shape, device, greedy=not sampled)
    texts = [replay.steps(prompt, result.token_ids) for prompt, result in zip(prompts, results, strict=True)]
    found, expected = StepCounts.of_results(results), StepCounts.of_replay(texts, shape.draft_len)
    return AcceptanceCheck(found, expected, sum(text.parted for text in texts), allowed, sampled)


def _check_pair(request: GateRequest) -> None:
    """A reference of another model would make every token a fault."""
    from trtllm_redrafter.fsio import read_json

    config = read_checkpoint_config(request.reference)
    raw = read_json(request.engine / "config.json")
    found = raw.get("pretrained_config")
    if not isinstance(found, dict):
        found = read_json(request.engine / "checkpoint" / "config.json")
    if (built_shape(request.engine) is None) != (config.drafter is None):
        which = "the checkpoint" if config.drafter is not None else "the engine"
        raise MismatchError(
            "the engine was not built from this checkpoint", where=request.reference, why=f"only {which} has a drafter",
            remedy="pass the checkpoint that the engine's manifest names",
        )  # fmt: skip
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


def reference_device(checkpoint: Path) -> str:
    """The GPU where the whole model in 16 bits fits into what is free on one; else the CPU.

    An engine over several GPUs has a reference that none of them holds: slower is better than out of memory after hours
    of building.
    """
    device = best_device()
    if device == "cpu":
        return device
    import torch

    whole = weight_bytes(replace(read_checkpoint_config(checkpoint), tp_size=1, quantization={})).total
    free, _ = torch.cuda.mem_get_info()
    return device if REFERENCE_SHARE * whole <= free else "cpu"


@contextmanager
def _reference_runner(request: GateRequest, prompts: Sequence[tuple[int, ...]], device: str) -> Iterator[TorchRunner]:
    """The checkpoint on the torch backend, for as long as it is needed."""
    from trtllm_redrafter.backends.torch.temporary import temporary_directory, temporary_runner

    longest = max(len(prompt) for prompt in prompts)
    with temporary_directory(beside=request.reference) as folder:
        engine = temporary_runner(
            request.reference, folder, max_batch_size=len(prompts), max_input_len=longest,
            max_seq_len=longest + request.max_tokens, device=device,
        )  # fmt: skip
        with engine as runner:
            yield runner
