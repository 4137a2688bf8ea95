"""Logits of an engine of TensorRT-LLM, at the ends of prompts: all that an engine with a drafter exposes.

With ReDrafter, context logits cannot be built in and generation logits are refused while drafts are verified. The
prompt's pass however hands its last row on as the first of the generation logits, whatever the decoding mode (read in
the source of 1.2: handleContextLogits and handleGenerationLogits). So each position is asked for as a prompt of its own
that ends there, with one token to write. Not run on a GPU yet: callers treat a refusal as "not shown".

    prompt_logits(Path("engine"), [(1, 5, 9), (1, 5, 9, 7)])      # [2, V] float32

It opens an executor of its own, because gathering logits takes memory that serving should not spend.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trtllm_redrafter.backends.tensorrt_llm.engine_dir import read_engine
from trtllm_redrafter.backends.tensorrt_llm.executor_client import BINDINGS
from trtllm_redrafter.backends.tensorrt_llm.failures import import_library, run_error
from trtllm_redrafter.errors import BackendError

if TYPE_CHECKING:
    from torch import Tensor

MEMORY_SHARE = 0.2
"""Of the free memory, for the KV cache: prompts of a few hundred tokens and nothing else."""

SILENCE_SECONDS = 300.0


def prompt_logits(engine: Path, prompts: Sequence[Sequence[int]]) -> Tensor:
    """What follows each prompt: [len(prompts), V] float32. `BackendError` where the executor refuses or fails."""
    found = read_engine(engine, verify_hashes=False)
    if found.world_size > 1:
        why = f"the engine takes {found.world_size} GPUs, and logits are only asked for in one process"
        raise BackendError("logits are not shown", where=engine, why=why, remedy=None)
    bindings = import_library(BINDINGS)
    decoding: dict[str, Any] = {}
    if found.draft_shape is not None:
        decoding["decoding_config"] = bindings.DecodingConfig(decoding_mode=bindings.DecodingMode.ExplicitDraftTokens())
    config = bindings.ExecutorConfig(
        max_beam_width=1, gather_generation_logits=True,
        kv_cache_config=bindings.KvCacheConfig(enable_block_reuse=False, free_gpu_memory_fraction=MEMORY_SHARE),
        **decoding,
    )  # fmt: skip
    try:
        executor = bindings.Executor(str(engine), bindings.ModelType.DECODER_ONLY, config)
    except Exception as error:  # C++ raises RuntimeError and others
        raise run_error(error) from error
    try:
        return _ask(bindings, executor, prompts)[:, : found.config.model.vocab_size]
    except BackendError:
        raise
    except Exception as error:  # as above
        raise run_error(error) from error
    finally:
        executor.shutdown()
        del executor  # shutting down keeps the model; memory goes with the object


def _ask(bindings: Any, executor: Any, prompts: Sequence[Sequence[int]]) -> Tensor:
    import torch

    output = bindings.OutputConfig(exclude_input_from_output=True, return_generation_logits=True)
    places = {}
    for place, prompt in enumerate(prompts):
        request = bindings.Request(
            input_token_ids=list(prompt), max_tokens=1, streaming=False,
            sampling_config=bindings.SamplingConfig(beam_width=1), output_config=output,
        )  # fmt: skip
        places[int(executor.enqueue_request(request))] = place
    rows: dict[int, Tensor] = {}
    heard = time.monotonic()
    while len(rows) < len(prompts):
        for response in executor.await_responses(timedelta(seconds=1)) or ():
            heard = time.monotonic()
            if response.has_error():
                raise BackendError("TensorRT-LLM does not return logits", why=str(response.error_msg)[:500])
            found = response.result.generation_logits
            if found is None:
                raise BackendError("TensorRT-LLM returned no logits")
            rows[places[int(response.request_id)]] = torch.as_tensor(found)[0, 0].float().cpu()
        if time.monotonic() - heard > SILENCE_SECONDS:
            raise BackendError(f"the engine has not answered for {SILENCE_SECONDS:.0f} seconds")
    return torch.stack([rows[place] for place in range(len(prompts))])
