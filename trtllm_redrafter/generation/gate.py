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
from trtllm_redrafter.backends.base import BuildOptions, Request, Result, Runner, SamplingParams
from trtllm_redrafter.checkpoint.config_reader import read_checkpoint_config
from trtllm_redrafter.errors import MismatchError, Problem
from trtllm_redrafter.generation.parity import ROUNDING
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

FP8_ROUNDING = 2.0**-3
"""Quantized activations, which the reference does not imitate, come apart further than 16 bits do."""

TIE_ALARM = 0.05
REPEATS_ALARM = 16
ACCEPTANCE_TOLERANCE = 0.25
"""Relative; the two backends draft from hidden states that differ by rounding."""

MIN_STEPS = 16
"""Fewer steps than this say nothing about acceptance."""


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
    with _reference_runner(request, prompts) as reference:
        same, ties, faults = _compare(request, reference, prompts, results)
        expected = reference.generate([Request(prompt, sampling) for prompt in prompts]) if drafts else []
    alarms = [*_token_alarms(request, results, same, ties)]
    if drafts is not None:
        alarms += _acceptance_alarms(request, results, expected, drafts.draft_len)
    return GateReport(
        request, same, ties, tuple(faults), tuple(alarms),
        acceptance_length(results) if drafts else None,
        acceptance_length(expected) if drafts else None,
        tuple(tuple(result.token_ids) for result in results),
    )  # fmt: skip


def acceptance_length(results: Sequence[Result]) -> float | None:
    """Mean tokens per step over all steps of all requests."""
    steps = sum(result.steps for result in results)
    return None if steps == 0 else 1.0 + sum(result.accepted_tokens for result in results) / steps


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


def _compare(
    request: GateRequest, reference: TorchRunner, prompts: Sequence[tuple[int, ...]], results: Sequence[Result]
) -> tuple[int, int, list[Problem]]:
    """Tokens that are the reference's own choice, ties, and a fault per prompt that has one."""
    rounding = ROUNDING[reference.info.dtype]
    if read_checkpoint_config(request.reference).quant_algo is not None:
        rounding = max(rounding, FP8_ROUNDING)
    same = ties = 0
    faults = []
    for number, (prompt, result) in enumerate(zip(prompts, results, strict=True), start=1):
        laws = _laws(reference, prompt, result.token_ids)
        for place, (token, law) in enumerate(zip(result.token_ids, laws, strict=True), start=1):
            gap, best, bound = law.gap(token), law.best, rounding * law.scale
            if gap == 0.0:
                same += 1
            elif gap <= bound:
                ties += 1
            else:
                what = f"token {place} of prompt {number} is {token}, the checkpoint's is {best}"
                why = f"its logit is {gap:.4g} lower, rounding explains {bound:.2g}"
                remedy = "do not serve this engine; build it again, and compare release and checkpoint"
                faults.append(Problem(what, str(request.engine), why, remedy))
                break  # what follows a wrong token tells nothing more
    return same, ties, faults


@dataclass(frozen=True)
class _Law:
    """One position's logits, as far as they matter."""

    logits: Any  # [V] float32

    @property
    def best(self) -> int:
        return int(self.logits.argmax())

    @property
    def scale(self) -> float:
        return float(self.logits.abs().max())

    def gap(self, token: int) -> float:
        return float(self.logits.max() - self.logits[token])


def _laws(reference: TorchRunner, prompt: tuple[int, ...], tokens: Sequence[int]) -> Iterator[_Law]:
    """The law of each token, computed along the tokens themselves, in chains no longer than a tree."""
    from trtllm_redrafter.redrafter.token_tree import Tree

    if not tokens:
        return
    shape, executor = reference.info.draft_shape, reference.executor
    width = 1 if shape is None else shape.max_tree_tokens
    yield _Law(executor.prefill(0, prompt).logits.float())
    base = len(prompt)
    for start in range(0, len(tokens) - 1, width):
        chunk = list(tokens[start : min(start + width, len(tokens) - 1)])
        output = executor.forward([0], [base], [Tree.merge([chunk])], logits=True)
        assert output.logits is not None
        executor.commit(0, base, range(len(chunk)))
        base += len(chunk)
        for row in output.logits.float():
            yield _Law(row)


def _token_alarms(request: GateRequest, results: Sequence[Result], same: int, ties: int) -> Iterator[Problem]:
    where = str(request.engine)
    if ties > TIE_ALARM * max(1, same + ties):
        why = f"{ties} of {same + ties}; rounding alone makes far fewer"
        yield Problem("too many numeric ties", where, why, "look for a tensor of the wrong dtype or scale")
    for number, result in enumerate(results, start=1):
        longest = _longest_run(result.token_ids)
        if longest >= REPEATS_ALARM:
            why = "NaN logits and a broken cache show like this"
            yield Problem(f"prompt {number} repeats one token {longest} times", where, why, "do not serve this engine")
        if not result.token_ids:
            yield Problem(f"prompt {number} has no tokens", where, None, "look at the executor's log")


def _longest_run(tokens: Sequence[int]) -> int:
    longest = run = 0
    for place, token in enumerate(tokens):
        run = run + 1 if place and token == tokens[place - 1] else 1
        longest = max(longest, run)
    return longest


def _acceptance_alarms(
    request: GateRequest, results: Sequence[Result], expected: Sequence[Result], draft_len: int
) -> Iterator[Problem]:
    where, steps = str(request.engine), sum(result.steps for result in results)
    found, reference = acceptance_length(results), acceptance_length(expected)
    if steps < MIN_STEPS or found is None or reference is None:
        why = f"{steps} steps; at least {MIN_STEPS} are needed"
        yield Problem("too little was written to judge acceptance", where, why, "use more prompts or --max-tokens")
        return
    if found == 1.0 and reference > 1.0:
        why = "the drafter is not connected, or its weights are wrong"
        yield Problem("no draft was ever accepted", where, why, "verify the checkpoint; check release and dtype")
    elif found >= draft_len + 0.99 and reference < draft_len + 0.99:
        why = "drafts are accepted without being verified"
        yield Problem("every draft was accepted", where, why, "do not serve this engine")
    elif abs(found - reference) > ACCEPTANCE_TOLERANCE * reference:
        why = f"{found:.2f} tokens per step, the torch backend has {reference:.2f} with the same drafter"
        yield Problem("acceptance differs from the torch backend's", where, why, "check release and drafter")
    if request.min_acceptance is not None and found < request.min_acceptance:
        what = f"acceptance is {found:.2f}, the floor is {request.min_acceptance:.2f}"
        yield Problem(what, where, None, "train the drafter further, or lower the floor")
