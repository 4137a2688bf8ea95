"""What a request may ask of a TensorRT engine, and how it is passed on.

TensorRT-LLM's ReDrafter decoder silently ignores most sampling options: top-k, top-p, penalties, minimum lengths,
bad words; and a greedy engine ignores temperature as well. Ignored options are refused here, since a text that looks
sampled and is not is worse than an error.
"""

from __future__ import annotations

import secrets

from trtllm_redrafter.backends.base import EngineInfo, Request, SamplingParams
from trtllm_redrafter.backends.requests import ignored_options, limit_problems
from trtllm_redrafter.backends.tensorrt_llm.client import ClientRequest
from trtllm_redrafter.errors import Problem

_SUPPORTED = (
    "max_tokens", "temperature", "seed", "stop", "stop_token_ids", "ignore_eos", "skip_special_tokens"
)  # fmt: skip
"""Options that every engine supports."""

_FILTERS = ("top_k", "top_p")
"""Options that only an engine without a drafter supports. All others, new ones included, are refused."""


def request_problems(request: Request, info: EngineInfo, *, greedy: bool, has_tokenizer: bool) -> list[Problem]:
    """Why a request cannot run as it was meant, all reasons together."""
    found = limit_problems(request, info, has_tokenizer=has_tokenizer)
    if info.draft_shape is None:
        return found + ignored_options(
            request.sampling, (*_SUPPORTED, *_FILTERS), "it is not passed on to TensorRT-LLM"
        )
    found += _drafting_problems(request, greedy)
    return found + ignored_options(request.sampling, _SUPPORTED, "TensorRT-LLM's ReDrafter decoder ignores it")


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
    return found


def client_request(number: int, request: Request, info: EngineInfo, eos: frozenset[int]) -> ClientRequest:
    """The first end token is the executor's own, further ones and stop token ids are stop words of one token."""
    sampling = request.sampling
    ends = [] if sampling.ignore_eos else sorted(eos)
    stops = [*ends[1:], *(token for token in dict.fromkeys(sampling.stop_token_ids) if token not in ends)]
    return ClientRequest(
        number=number,
        token_ids=list(request.token_ids),
        max_tokens=sampling.max_tokens,
        end_id=ends[0] if ends else None,
        stop_words=[[token] for token in stops],
        sampling=_sampling(sampling, has_drafter=info.draft_shape is not None),
    )


def _sampling(asked: SamplingParams, *, has_drafter: bool) -> dict[str, float | int]:
    """TensorRT-LLM's names and values; what is not set is its own default."""
    if asked.greedy:
        return {} if has_drafter else {"top_k": 1}
    values = {"temperature": asked.temperature, "seed": secrets.randbits(63) if asked.seed is None else asked.seed}
    if has_drafter:  # which ignores the filters
        return values
    # TensorRT-LLM decodes greedily where neither top-k nor top-p is given, so top-p 1 has to be given explicitly
    return values | {"top_p": asked.top_p} | ({"top_k": asked.top_k} if asked.top_k else {})
