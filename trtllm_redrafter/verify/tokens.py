"""Does a checkpoint or engine compute what its base model computes? Greedy tokens and logits against transformers.

Equal weights do not make an equal model: a wrong rotary base or a missing bias shows only in the output. A few prompts
are decoded with drafting; then transformers computes the distributions along the same tokens, and along random ones,
once exactly and once in the engine's dtype. Every token must be the most likely of its exact distribution, or tie with
it, and logits may be no further from exact than rounding explains (`distributions`).

    report = greedy_parity(Path("engine"), Path("Llama-3.1-8B"))
    report.tokens.same, report.distributions, report.problems
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from trtllm_redrafter.backends import load_backend
from trtllm_redrafter.backends.base import Request, Runner, SamplingParams
from trtllm_redrafter.backends.engine_config import TORCH
from trtllm_redrafter.backends.torch.temporary import temporary_runner
from trtllm_redrafter.base_models.transformers_model import load_model
from trtllm_redrafter.checkpoint.kinds import COMPILED, Kind, kind_at
from trtllm_redrafter.checkpoint.reader import Checkpoint
from trtllm_redrafter.conversion.base import takes_file_head
from trtllm_redrafter.errors import Problem
from trtllm_redrafter.verify.distributions import DistributionCheck, check_distributions
from trtllm_redrafter.verify.files import checkpoint_directory
from trtllm_redrafter.verify.gate_decode import probe_texts
from trtllm_redrafter.verify.reference import EXACT, PERTURBATIONS, ReferenceLogits, StoredLogits, Text, perturb
from trtllm_redrafter.verify.token_checks import TokenCheck, check_tokens

PROMPT_LENGTHS = (3, 17, 40, 64)
TOKENS = 32


@dataclass(frozen=True)
class ParityReport:
    """Tokens that are the base model's own choice or tie with it; how far logits are from exact."""

    prompts: int
    tokens: TokenCheck
    distributions: DistributionCheck
    problems: tuple[Problem, ...]

    def checks(self) -> tuple[str, ...]:
        """What was compared, one line each."""
        ties = f", {self.tokens.ties} within rounding of it" if self.tokens.ties else ""
        found = self.distributions
        figures = ", ".join(f"{name} {value:.2f} of {allowed:g}" for name, (value, allowed) in found.figures().items())
        return (
            f"{self.tokens.same} greedy tokens after {self.prompts} prompts are the base model's{ties}",
            f"logits at {found.positions} positions, in units of what {found.dtype} rounds there: {figures} allowed",
        )


def can_compare(path: Path, against: Path) -> str | None:
    """Why greedy tokens cannot be compared here, or None."""
    if kind_at(path) in COMPILED:
        return "greedy tokens are not compared: a compiled engine runs on its GPU only; verify its checkpoint"
    if kind_at(against) is Kind.CHECKPOINT:
        return "what is computed is not compared: transformers reads no checkpoints; --reference runs an engine"
    if Checkpoint.open(checkpoint_directory(path)).config.quant_algo is not None:
        return "greedy tokens are not compared: the checkpoint is quantized"
    return None


def greedy_parity(path: Path, against: Path) -> ParityReport:
    """Decode with the torch backend on the CPU and compare with transformers."""
    with _runner(path) as runner:
        longest = runner.info.max_seq_len - TOKENS
        prompts = [_prompt(min(n, longest), runner.info.vocab_size) for n in PROMPT_LENGTHS if longest > 0]
        sampling = SamplingParams(max_tokens=TOKENS, ignore_eos=True)
        results = runner.generate([Request(prompt, sampling) for prompt in prompts])
        own = [Text(p, tuple(result.token_ids)) for p, result in zip(prompts, results, strict=True)]
        texts = (*own, *probe_texts(runner.info.vocab_size, runner.info.max_input_len, runner.info.max_seq_len))
        along = [runner.teacher_forced(text.prompt, text.tokens) for text in texts]
        dtype = runner.info.dtype
    reference = _transformers_logits(path, against, dtype, texts)
    tokens = check_tokens(path, reference, results, whose="base model")
    rows = ((found.logits, *reference.rows(i)) for i, found in enumerate(along) if found is not None)
    distributions = check_distributions(rows, dtype)
    problems = (*tokens.faults, *distributions.problems(path))
    return ParityReport(len(prompts), tokens, distributions, problems)


def _prompt(length: int, vocab_size: int) -> tuple[int, ...]:
    """Arbitrary tokens, the same ones each time."""
    return tuple(int(t) for t in np.random.default_rng(length).integers(0, vocab_size, length))


@contextmanager
def _runner(path: Path) -> Iterator[Runner]:
    """The engine at `path`, or a temporary one built from the checkpoint there."""
    if kind_at(path) is Kind.TORCH_ENGINE:
        with closing(load_backend(TORCH).load(path, device="cpu", verify_hashes=False)) as runner:
            yield runner
        return
    length = min(Checkpoint.open(path).config.max_position_embeddings, max(PROMPT_LENGTHS) + TOKENS)
    engine = temporary_runner(
        path, max_batch_size=len(PROMPT_LENGTHS), max_input_len=length - 1, max_seq_len=length, device="cpu"
    )
    with engine as built:
        yield built


def _transformers_logits(path: Path, against: Path, dtype: str, texts: Sequence[Text]) -> ReferenceLogits:
    """The model is loaded in the engine's dtype and widened in place, so that both passes have the same weights."""
    file_head = takes_file_head(Checkpoint.open(checkpoint_directory(path)).manifest)
    model = load_model(against, dtype=getattr(torch, dtype), file_head=file_head)
    rounded = _logits(model, texts)
    model = model.to(EXACT[dtype])
    exact = _logits(model, texts)
    generator = torch.Generator().manual_seed(0)
    for part in model.modules():  # norms and activations, which `reference` perturbs too
        if type(part).__name__.endswith(("RMSNorm", "MLP")):
            part.register_forward_hook(lambda part, given, made: perturb(made, dtype, generator))
    return ReferenceLogits(dtype, exact, rounded, tuple(_logits(model, texts) for _ in range(PERTURBATIONS)))


def _logits(model: Any, texts: Sequence[Text]) -> StoredLogits:
    rows = []
    with torch.no_grad():
        for text in texts:
            ids = torch.tensor([[*text.prompt, *text.tokens[:-1]]])
            logits = model(input_ids=ids).logits[0, len(text.prompt) - 1 :]
            rows.append(logits if logits.dtype is torch.float64 else logits.float())
    return StoredLogits(tuple(rows))
