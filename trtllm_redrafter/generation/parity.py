"""Does a checkpoint or engine write what its base model writes? Greedy tokens against transformers.

Equal weights are not yet an equal model: a wrong rotary base or a forgotten bias shows only in the text. A few prompts
are decoded with drafting; then transformers computes the laws along those very tokens, and every token must be the
largest of its law. Computed in 16 bits, two nearly equal logits may change places, so a token counts as a near tie
when its logit is no further below the largest than rounding can explain; float32 leaves little room for that.

    report = greedy_parity(Path("engine"), Path("Llama-3.1-8B"))
    report.same, report.near_ties, report.problems
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from trtllm_redrafter.backends import engine_backend, load_backend
from trtllm_redrafter.backends.base import Request, Runner, SamplingParams
from trtllm_redrafter.checkpoint.reader import Checkpoint
from trtllm_redrafter.checkpoint.verify import checkpoint_directory
from trtllm_redrafter.conversion.head import takes_file_head
from trtllm_redrafter.errors import Problem
from trtllm_redrafter.fsio import read_json

if TYPE_CHECKING:
    from torch import Tensor

PROMPT_LENGTHS = (3, 17, 40, 64)
TOKENS = 32

ROUNDING = {"float32": 2.0**-14, "float16": 2.0**-8, "bfloat16": 2.0**-5}
"""How far equal computations may come apart, relative to the largest logit: a few units in the last place."""


@dataclass(frozen=True)
class ParityReport:
    """Tokens that are the base model's own choice, those that nearly are, and what is wrong with the others."""

    prompts: int
    same: int
    near_ties: int
    problems: tuple[Problem, ...]

    def render(self) -> str:
        ties = f", {self.near_ties} within rounding of it" if self.near_ties else ""
        return f"{self.same} greedy tokens after {self.prompts} prompts are the base model's{ties}"


def can_compare(path: Path) -> str | None:
    """Why greedy tokens cannot be compared here, or None."""
    config = read_json(path / "config.json")
    if "pretrained_config" in config:
        return "greedy tokens are not compared: a TensorRT-LLM engine runs on its GPU only; verify its checkpoint"
    checkpoint = path / "checkpoint" if "backend" in config else path
    if Checkpoint.open(checkpoint).config.quant_algo is not None:
        return "greedy tokens are not compared: the checkpoint is quantized"
    return None


def greedy_parity(path: Path, against: Path) -> ParityReport:
    """Decode with the torch backend on the CPU and check every token with transformers."""
    with _runner(path) as runner:
        longest = runner.info.max_seq_len - TOKENS
        prompts = [_prompt(min(n, longest), runner.info.vocab_size) for n in PROMPT_LENGTHS if longest > 0]
        sampling = SamplingParams(max_tokens=TOKENS, ignore_eos=True)
        results = runner.generate([Request(prompt, sampling) for prompt in prompts])
        dtype = runner.info.dtype
    model = _reference(path, against, dtype)
    same = near_ties = 0
    problems: list[Problem] = []
    for number, (prompt, result) in enumerate(zip(prompts, results, strict=True), start=1):
        gaps, bests, bound = _gaps(model, prompt, result.token_ids, ROUNDING[dtype])
        for place, (token, gap, best) in enumerate(zip(result.token_ids, gaps, bests, strict=True), start=1):
            if gap == 0.0:
                same += 1
            elif gap <= bound:
                near_ties += 1
            else:
                what = f"greedy token {place} of prompt {number} is {token}, the base model's is {best}"
                why = f"its logit is {gap:.4g} lower, rounding in {dtype} explains {bound:.2g}"
                problems.append(Problem(what, str(path), why, "convert again from this base model"))
                break  # what follows a wrong token tells nothing more
    return ParityReport(len(prompts), same, near_ties, tuple(problems))


def _prompt(length: int, vocab_size: int) -> tuple[int, ...]:
    """Arbitrary tokens, the same ones each time."""
    return tuple(int(t) for t in np.random.default_rng(length).integers(0, vocab_size, length))


@contextmanager
def _runner(path: Path) -> Iterator[Runner]:
    """The engine at `path`, or one built from the checkpoint there for as long as it is needed."""
    if "backend" in read_json(path / "config.json"):
        engine_backend(path)
        runner = load_backend("torch").load(path, device="cpu", verify_hashes=False)
        try:
            yield runner
        finally:
            runner.close()
        return
    from trtllm_redrafter.backends.torch.temporary import temporary_directory, temporary_runner

    length = min(Checkpoint.open(path).config.max_position_embeddings, max(PROMPT_LENGTHS) + TOKENS)
    with temporary_directory(beside=path) as folder:
        engine = temporary_runner(
            path, folder, max_batch_size=len(PROMPT_LENGTHS), max_input_len=length - 1, max_seq_len=length, device="cpu"
        )
        with engine as built:
            yield built


def _reference(path: Path, against: Path, dtype: str) -> Any:
    import torch

    from trtllm_redrafter.base_models.transformers_model import load_model

    file_head = takes_file_head(Checkpoint.open(checkpoint_directory(path)).manifest)
    return load_model(against, dtype=getattr(torch, dtype), file_head=file_head)


def _gaps(
    model: Any, prompt: tuple[int, ...], tokens: list[int], rounding: float
) -> tuple[list[float], list[int], float]:
    """How far below its law's largest logit each token is, what the largest one is, and what rounding explains."""
    import torch

    with torch.no_grad():
        ids = torch.tensor([[*prompt, *tokens[:-1]]])
        logits: Tensor = model(input_ids=ids).logits[0, len(prompt) - 1 :].float()
    best, chosen = logits.max(dim=-1), logits.gather(1, torch.tensor(tokens).unsqueeze(1)).squeeze(1)
    bound = rounding * float(logits.abs().max())
    return (best.values - chosen).tolist(), best.indices.tolist(), bound
