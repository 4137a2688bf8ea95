"""Drafter directories: written with Apple's names and config keys, and read from any trainer for evaluation.

    config.json                sizes, horizon, base model's identity, provenance
    model.safetensors          input_proj.*, lm_head.{i}.linear.*, rnn_u.*, rnn_w.weight, and the head
    draft_vocab.safetensors    token_ids: the answer tokens by frequency, for runtimes that draft from a part of them

The head is `lm_head.{K}.weight` [V, E] when it was trained in full; with `tie_lm_head` it is left out, and is the base
model's head [V, H], times `lm_head_factor.weight` [H, E] where that exists.

Names, `.pt` files and config.json of other trainers are read as `convert` reads them (`DrafterFiles`); here the tensors
go to their places in a `TrainableDrafter`.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trtllm_redrafter.checkpoint.manifest import Manifest, record_tree
from trtllm_redrafter.checkpoint.names import DRAFT_VOCAB_FILE
from trtllm_redrafter.checkpoint.safetensors_io import save_tensors
from trtllm_redrafter.conversion.drafter import DrafterFiles
from trtllm_redrafter.conversion.sources import Source
from trtllm_redrafter.errors import InputError, raise_together
from trtllm_redrafter.fsio import atomic_directory, write_json
from trtllm_redrafter.training.model import DrafterSpec, HeadKind, TrainableDrafter

MODEL_TYPE = "recurrent_drafting_drafter"
FACTOR_NAME = "lm_head_factor.weight"


@dataclass(frozen=True)
class BaseIdentity:
    """Enough about the base model to notice a wrong one."""

    name: str
    hidden_size: int
    vocab_size: int
    tokenizer_sha256: str | None
    weights_sample: str | None = None
    """See `base_models.hf_model.weights_sample`; None where the weights are not safetensors."""


def weight_names(spec: DrafterSpec) -> dict[str, str]:
    """Apple's name → `TrainableDrafter` attribute path of every tensor in the file."""
    config = spec.config
    names: dict[str, str] = {}
    if config.has_input_proj:
        names |= {f"input_proj.{part}": f"core.input_proj.{part}" for part in ("weight", "bias")}
    for i in range(config.num_layers):
        names |= {f"lm_head.{i}.linear.{part}": f"core.layers.{i}.linear.{part}" for part in ("weight", "bias")}
    if spec.head is HeadKind.FULL:
        names[f"lm_head.{config.num_layers}.weight"] = "full_head.weight"
    if spec.head is HeadKind.FACTOR:
        names[FACTOR_NAME] = "factor.weight"
    if config.rnn:
        names |= {f"rnn_u.{part}": f"core.rnn_u.{part}" for part in ("weight", "bias")}
        names["rnn_w.weight"] = "core.rnn_w.weight"
    return names


def _attribute(model: torch.nn.Module, path: str) -> Tensor:
    module, _, leaf = path.rpartition(".")
    value = getattr(model.get_submodule(module), leaf)
    assert isinstance(value, Tensor)
    return value


def export_weights(model: TrainableDrafter, dtype: torch.dtype) -> dict[str, Tensor]:
    """The tensors of the file; input scales are folded in, since the weights in use are read."""
    with torch.no_grad():
        names = weight_names(model.spec)
        return {name: _attribute(model, path).detach().to("cpu", dtype).contiguous() for name, path in names.items()}


def load_weights(spec: DrafterSpec, weights: dict[str, Tensor]) -> TrainableDrafter:
    """A drafter with exactly these weights, for evaluation or for training on."""
    model = TrainableDrafter(spec, seed=0)
    with torch.no_grad():
        for name, path in weight_names(spec).items():
            _attribute(model, path).copy_(weights[name])
    return model


def drafter_config(spec: DrafterSpec, base: BaseIdentity, provenance: dict[str, Any]) -> dict[str, Any]:
    return {
        "model_type": MODEL_TYPE,
        "vocab_size": spec.config.vocab_size,
        "hidden_size": spec.config.hidden_size,
        "exit_dim": spec.config.exit_dim,
        "num_draft_layers": spec.config.num_layers,
        "rnn": spec.config.rnn,
        "draft_len": spec.draft_len,
        "tie_lm_head": spec.head is not HeadKind.FULL,
        "base_model": asdict(base),
        "provenance": provenance,
    }


def frequent_tokens(tokens: Tensor, vocab_size: int, count: int) -> Tensor:
    """The `count` most frequent token ids, most frequent first; equal counts by ascending id. int32."""
    counts = torch.bincount(tokens.flatten().long().cpu(), minlength=vocab_size)
    return counts.sort(descending=True, stable=True).indices[:count].to(torch.int32)


def write_drafter(
    output: Path,
    model: TrainableDrafter,
    base: BaseIdentity,
    *,
    dtype: torch.dtype,
    provenance: dict[str, Any],
    metrics: dict[str, Any],
    draft_vocab: Tensor | None,
    overwrite: bool,
) -> None:
    """Write the directory, whole or not at all."""
    with atomic_directory(output, overwrite=overwrite) as work:
        write_json(work / "config.json", drafter_config(model.spec, base, provenance))
        write_json(work / "metrics.json", metrics)
        save_tensors(work / "model.safetensors", export_weights(model, dtype), {"format": "pt"})
        if draft_vocab is not None:
            save_tensors(work / DRAFT_VOCAB_FILE, {"token_ids": draft_vocab}, {"format": "pt"})
        inputs, files = {"base": asdict(base)}, record_tree(work)
        Manifest("drafter", inputs=inputs, options=provenance, derived={}, files=files).write(work)


HEADS = {"lm_head.weight": "full_head.weight", "lm_head_factor.weight": "factor.weight"}
"""TensorRT-LLM's name → where it lies in `TrainableDrafter`; all others are below `core`."""


def read_drafter(folder: Path, longest: int) -> TrainableDrafter:
    """The drafter in float32. One that does not say how far ahead it was trained is assumed to reach `longest`."""
    drafter = DrafterFiles.open(folder)
    raise_together(InputError, drafter.problems, "the drafter cannot be evaluated", where=folder)
    sources = dict(drafter.tensors)
    if drafter.factor is not None:
        sources["lm_head_factor.weight"] = drafter.factor
    found = {HEADS.get(name, f"core.{name}"): _read(source) for name, source in sources.items()}
    spec = DrafterSpec(drafter.config, _head(drafter), drafter.trained_draft_len or longest)
    return load_weights(spec, {name: found[path] for name, path in weight_names(spec).items()})


def _head(drafter: DrafterFiles) -> HeadKind:
    if not drafter.tie_lm_head:
        return HeadKind.FULL
    return HeadKind.TIED if drafter.factor is None else HeadKind.FACTOR


def _read(source: Source) -> Tensor:
    return source.read(0, source.shape[0] if source.shape else 1).to(torch.float32)
