"""What the parity gate asks of a loaded engine: texts, and logits and drafts where available.

decoded = decode(GateRequest(...), sampled=False)
decoded.results, decoded.logits, decoded.drafted
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
from torch import Tensor

from trtllm_redrafter.backends import load_backend
from trtllm_redrafter.backends.base import Request, Result, Runner, SamplingParams, TeacherForced
from trtllm_redrafter.backends.engine_config import TENSORRT
from trtllm_redrafter.errors import BackendError
from trtllm_redrafter.redrafter.beam_search import Beams
from trtllm_redrafter.redrafter.config import DraftShape
from trtllm_redrafter.verify.gate_drafter import pick_contexts
from trtllm_redrafter.verify.gate_report import GateRequest
from trtllm_redrafter.verify.reference import Text

LOGITS = 64
"""Tokens of each text whose distributions are compared; a row takes four bytes per vocabulary entry."""

PROMPT_LOGITS = 16
"""Tokens of each text for which a TensorRT-LLM engine is asked for logits, each with a separate prompt."""

PROBES = 4
PROBE_PROMPT, PROBE_TOKENS = 8, 48
"""Texts of random tokens, which reach embedding rows and states that no greedy text does."""


@dataclass(frozen=True)
class Decoded:
    """`texts`: the `own` results that have tokens, then the probes.

    `logits` [n, V] belong to the first n tokens of each text; empty if the engine does not return them. `drafted` are
    beams and the states [B, H] they were drafted from.
    """

    prompts: tuple[tuple[int, ...], ...]
    results: tuple[Result, ...]
    accepted: tuple[tuple[int, ...] | None, ...]
    """Drafts accepted in each step, per prompt; None where the engine does not report single steps."""
    shape: DraftShape | None
    texts: tuple[Text, ...]
    own: int
    logits: tuple[Tensor, ...]
    drafted: tuple[Beams, Tensor] | None
    refusal: str | None
    """Why there are no logits, if the engine said so."""


def decode(request: GateRequest, *, sampled: bool) -> Decoded:
    """Load the engine, decode the prompts, ask for logits and drafts along the texts, close it."""
    runner = load_backend(request.config.backend).load(request.config, device=request.device, verify_hashes=False)
    refusal = None
    try:
        prompts = [_encode(runner, text, request.max_tokens) for text in request.prompts]
        sampling = SamplingParams(request.max_tokens, temperature=float(sampled), seed=1 if sampled else None)
        results, accepted = _generate(runner, [Request(prompt, sampling) for prompt in prompts])
        pairs = zip(prompts, results, strict=True)
        own = [Text(prompt, tuple(result.token_ids)) for prompt, result in pairs if result.token_ids]
        probes = probe_texts(runner.info.vocab_size, runner.info.max_input_len, runner.info.max_seq_len)
        texts = (*own, *probes)
        found = [runner.teacher_forced(text.prompt, text.tokens[:LOGITS]) for text in texts]
        along = [one for one in found if one is not None]
        drafted = _draft(runner, along, texts) if along else None
    finally:
        runner.close()
    logits = [one.logits.cpu() for one in along]
    if not along and request.config.backend == TENSORRT:
        logits, refusal = _compiled_logits(request, texts, runner.info.max_input_len)
    return Decoded(
        tuple(prompts), tuple(results), tuple(accepted), runner.info.draft_shape,
        texts if logits else tuple(own), len(own), tuple(logits), drafted, refusal,
    )  # fmt: skip


def _compiled_logits(request: GateRequest, texts: Sequence[Text], longest: int) -> tuple[list[Tensor], str | None]:
    """Logits for the first tokens of each text, or why there are none."""
    from trtllm_redrafter.backends.tensorrt_llm.prompt_logits import prompt_logits

    asked = [
        [(*text.prompt, *text.tokens[:at]) for at in range(min(PROMPT_LOGITS, len(text.tokens)))] for text in texts
    ]
    asked = [[prompt for prompt in prompts if len(prompt) <= longest] for prompts in asked]
    if not all(asked):
        return [], "the prompts fill the engine's max_input_len"
    try:
        rows = prompt_logits(request.engine, [prompt for prompts in asked for prompt in prompts])
    except BackendError as error:
        return [], error.problem.why or error.problem.what
    ends = list(accumulate(map(len, asked)))
    return [rows[end - len(prompts) : end] for prompts, end in zip(asked, ends, strict=True)], None


def _generate(
    runner: Runner, requests: Sequence[Request]
) -> tuple[list[Result], list[tuple[int, ...] | None]]:  # fmt: skip
    """Run requests to the end. Each update is a decoding step, except the first, which is the prompt's pass."""
    ids = [runner.submit(request) for request in requests]
    written: dict[str, list[int]] = {i: [] for i in ids}
    results: dict[str, Result] = {}
    while len(results) < len(ids):
        for update in runner.step():
            if update.token_ids:
                written[update.request_id].append(len(update.token_ids))
            if update.result is not None:
                results[update.request_id] = update.result
    steps = {i: tuple(count - 1 for count in counts[1:]) for i, counts in written.items()}
    ordered = [results[i] for i in ids]
    return ordered, [steps[i] if len(steps[i]) == results[i].steps else None for i in ids]


def probe_texts(vocab_size: int, max_input_len: int, max_seq_len: int) -> tuple[Text, ...]:
    """Random tokens, the same each time, shortened to what the engine takes; none if that leaves no token."""
    prompt = min(PROBE_PROMPT, max_input_len)
    length = min(PROBE_TOKENS, max_seq_len - prompt)
    if length < 1:
        return ()
    random = np.random.default_rng(7)
    drawn = [[int(t) for t in random.integers(0, vocab_size, prompt + length)] for _ in range(PROBES)]
    return tuple(Text(tuple(tokens[:prompt]), tuple(tokens[prompt:])) for tokens in drawn)


def _draft(runner: Runner, along: Sequence[TeacherForced], texts: Sequence[Text]) -> tuple[Beams, Tensor] | None:
    """Drafts of the engine from its own states, spread evenly over the texts."""
    states = [found.states for found in along if found.states is not None]
    if not states or len(states) < len(along):
        return None
    contexts, roots = pick_contexts(states, texts)
    beams = runner.drafts(contexts, roots)
    return None if beams is None else (beams, contexts)


def _encode(runner: Runner, text: str, max_tokens: int) -> tuple[int, ...]:
    longest = min(runner.info.max_input_len, runner.info.max_seq_len - max_tokens)
    return runner.encode_prompt(text, chat=runner.has_chat_template)[-longest:]
