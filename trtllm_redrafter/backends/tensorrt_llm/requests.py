"""What a request may ask of a TensorRT engine, and how it is passed on.

TensorRT-LLM's ReDrafter decoder silently ignores most sampling options: top-k, top-p, penalties, minimum lengths,
bad words; and a greedy engine ignores temperature as well. Ignored options are refused here, since a text that looks
sampled and is not is worse than an error.
"""

from __future__ import annotations

import secrets

from trtllm_redrafter.backends.base import EngineInfo, Request
from trtllm_redrafter.backends.requests import limit_problems
from trtllm_redrafter.backends.tensorrt_llm.client import ClientRequest
from trtllm_redrafter.errors import Problem

_IGNORES = "TensorRT-LLM's ReDrafter decoder ignores it"


def request_problems(request: Request, info: EngineInfo, *, greedy: bool, has_tokenizer: bool) -> list[Problem]:
    """Everything that keeps a request from running as it was meant."""
    found = limit_problems(request, info, has_tokenizer=has_tokenizer)
    return found + (_drafting_problems(request, greedy) if info.draft_shape is not None else [])


def _drafting_problems(request: Request, greedy: bool) -> list[Problem]:
    sampling, found = request.sampling, []
    if not request.draft:
        why = "drafting is compiled into the engine"
        remedy = "build the checkpoint of the base alone (convert without --drafter) as the baseline"
        found.append(Problem("this engine cannot decode without drafting", None, why, remedy))
    if greedy and not sampling.greedy:
        remedy = "use temperature 0; or convert with --sampling and build with tensorrt_llm.allow_sampling: true"
        found.append(Problem(f"temperature is {sampling.temperature}", None, "the engine is greedy", remedy))
    if not greedy and sampling.greedy:
        why = "the engine samples, and its decoder divides by the temperature"
        found.append(Problem("temperature is 0", None, why, "convert with --greedy for greedy texts"))
    if sampling.top_k:
        found.append(Problem(f"top_k is {sampling.top_k}", None, _IGNORES, "leave it out"))
    if sampling.top_p < 1.0:
        found.append(Problem(f"top_p is {sampling.top_p}", None, _IGNORES, "leave it out"))
    return found


def client_request(number: int, request: Request, info: EngineInfo, eos: frozenset[int]) -> ClientRequest:
    """The first end token is the executor's own, further ones and stop token ids are stop words of one token."""
    sampling = request.sampling
    ends = [] if sampling.ignore_eos else sorted(eos)
    stops = [*ends[1:], *(token for token in dict.fromkeys(sampling.stop_token_ids) if token not in ends)]
    plain_greedy = info.draft_shape is None and sampling.greedy
    sampled = not sampling.greedy
    return ClientRequest(
        number=number,
        token_ids=list(request.token_ids),
        max_tokens=sampling.max_tokens,
        end_id=ends[0] if ends else None,
        stop_words=[[token] for token in stops],
        temperature=sampling.temperature if sampled else None,
        top_k=1 if plain_greedy else (sampling.top_k or None),
        # TensorRT-LLM decodes greedily where neither top-k nor top-p is given, so "all of the mass" must be said
        top_p=sampling.top_p if sampled and info.draft_shape is None else None,
        seed=(secrets.randbits(63) if sampling.seed is None else sampling.seed) if sampled else None,  # its own is 0
    )
