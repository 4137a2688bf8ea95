"""What keeps a request from running on an engine, whichever backend executes it: the engine's limits."""

from __future__ import annotations

from trtllm_redrafter.backends.base import EngineInfo, Request
from trtllm_redrafter.base_models.vocabulary import beyond_message, first_beyond
from trtllm_redrafter.errors import Problem
from trtllm_redrafter.prompts.messages import brief


def limit_problems(request: Request, info: EngineInfo, *, has_tokenizer: bool) -> list[Problem]:
    """Values out of range, and everything that exceeds the engine; found before any work."""
    count, sampling = len(request.token_ids), request.sampling
    found = sampling.problems()
    if count == 0:
        found.append(Problem("the prompt is empty", remedy="give at least one token"))
    beyond = first_beyond(request.token_ids, vocab_size=info.vocab_size)
    if beyond is not None:
        found.append(Problem(beyond_message(beyond, vocab_size=info.vocab_size), remedy="leave that token out"))
    if count > info.max_input_len:
        what = f"the prompt has {count} tokens, the engine takes {info.max_input_len}"
        found.append(Problem(what, remedy="shorten it, or build with a larger --max-input-len"))
    if isinstance(sampling.max_tokens, int) and count + sampling.max_tokens > info.max_seq_len:
        what = f"{count} prompt tokens and {brief(sampling.max_tokens)} to write exceed the engine's {info.max_seq_len}"
        left = max(0, info.max_seq_len - count)
        found.append(Problem(what, remedy=f"ask for at most {left} tokens, or build with a larger --max-seq-len"))
    unknown = [t for t in sampling.stop_token_ids if isinstance(t, int) and t >= info.vocab_size]
    if unknown:
        found.append(Problem(f"stop_token_ids has {brief(unknown[0])}, outside the vocabulary of {info.vocab_size}"))
    if sampling.stop and not has_tokenizer:
        found.append(Problem("stop strings need a tokenizer", remedy="build the engine with --tokenizer"))
    return found
