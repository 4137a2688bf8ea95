"""The base model in transformers: the only place where it is loaded and its `generate` is called.

train, evaluate, the comparison with transformers and the benchmarks all need the same model that `convert` writes. So
its config is parsed by our rules (see `hf_config`) and passed on in a form that every version of transformers reads in
the same way, no code in the model's directory is run, and the settings in its generation_config.json
(repetition_penalty, sampling, ...) are ignored: greedy means greedy.

    model = load_model(Path("base"), dtype=torch.float32)
    tokens = generate(model, prompt_ids, max_new_tokens=32, eos=(2,))       # [N, S] -> [N, S + at most 32]
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trtllm_redrafter.base_models.hf_config import find_family, one_form
from trtllm_redrafter.base_models.tokenizer import library_errors
from trtllm_redrafter.errors import InputError, raise_together
from trtllm_redrafter.fsio import read_json

_REMEDY = "check the directory; `inspect` and `convert --dry-run` say more about it"
_LEFT_OUT = ("model_type", "auto_map", "transformers_version", "_name_or_path")
"""Keys of config.json that are not passed on, since the class is chosen here."""


def load_model(path: Path, *, dtype: torch.dtype, file_head: bool = False) -> Any:
    """The model on the CPU, for inference. `file_head`: use the file's LM head although config.json ties it."""
    raw = read_json(path / "config.json")
    fields, contradictions = one_form(raw, where=path / "config.json")
    raise_together(InputError, contradictions, "config.json contradicts itself", where=path)
    if file_head:
        fields["tie_word_embeddings"] = False
    from transformers import AutoModelForCausalLM, GenerationConfig
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()  # the commands show their own
    with library_errors("transformers cannot load the model", where=path, remedy=_REMEDY):
        # A given generation_config keeps transformers from looking for custom_generate/generate.py, which it would run
        model, found = AutoModelForCausalLM.from_pretrained(
            path, config=_config(path, fields), dtype=dtype, local_files_only=True, trust_remote_code=False,
            generation_config=GenerationConfig(), output_loading_info=True,
        )  # fmt: skip
    missing = sorted(found.get("missing_keys") or ())
    if missing:
        what = f"{len(missing)} tensor(s) are missing, such as {missing[0]!r}"
        why = "transformers would initialize them randomly"
        raise InputError(what, where=path, why=why, remedy="download the model again")
    model.generation_config = GenerationConfig()
    if model.config.tie_word_embeddings:  # transformers 5 does not tie where the file has another head
        model.get_output_embeddings().weight = model.get_input_embeddings().weight
    return model.eval()


def _config(path: Path, fields: dict[str, Any]) -> Any:
    """transformers' config: from our parsed fields for supported families, else from the file."""
    from transformers import AutoConfig

    family = find_family(fields)
    if family is None:
        return AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    given = {key: value for key, value in fields.items() if key not in _LEFT_OUT}
    return AutoConfig.for_model(family.model_type, **given)


@torch.no_grad()
def generate(
    model: Any,
    tokens: Tensor,
    *,
    max_new_tokens: int,
    eos: Sequence[int],
    temperature: float = 0.0,
    watch: Callable[[Tensor, Tensor], Tensor] | None = None,
) -> Tensor:
    """Continue `tokens` [N, S] (no padding) greedily, or sampled from the whole distribution at `temperature`.

    `watch` sees the tokens and logits of each position, and returns the logits to choose by. Returns
    [N, S + at most max_new_tokens]; a row that ended is filled with its first end token, or 0.
    """
    from transformers import GenerationConfig, LogitsProcessorList

    sampling = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
    wanted = GenerationConfig(
        max_new_tokens=max_new_tokens,
        eos_token_id=list(eos) or None,
        pad_token_id=eos[0] if eos else 0,
        **(sampling if temperature > 0 else {"do_sample": False}),
    )
    model.generation_config = GenerationConfig()  # versions of transformers merge it into what is asked for
    written = model.generate(
        tokens,
        attention_mask=torch.ones_like(tokens),
        generation_config=wanted,
        logits_processor=LogitsProcessorList([] if watch is None else [watch]),
    )
    assert isinstance(written, Tensor)
    return written
