"""Describe a directory or file: base model, drafter, checkpoint or engine; its tensors; where it came from.

Only the headers of weight files are read, so this is fast at any size. A base model's tokenizer is loaded as well:

    print(inspect(Path("checkpoint")).render())
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trtllm_redrafter.backends.engine_config import read_engine_config
from trtllm_redrafter.backends.tensorrt_llm.engine_dir import NOTES_FILE
from trtllm_redrafter.checkpoint.kinds import ENGINES, Kind, kind_of, wrong_kind
from trtllm_redrafter.checkpoint.manifest import Manifest
from trtllm_redrafter.checkpoint.names import ENGINE_CHECKPOINT, EOS_TOKEN_IDS, MANIFEST
from trtllm_redrafter.checkpoint.safetensors_io import SafetensorsFile
from trtllm_redrafter.errors import InputError, RedrafterError
from trtllm_redrafter.fsio import read_json

_BASE_FACTS = (
    "model_type", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "vocab_size", "max_position_embeddings", "rope_theta", "rope_scaling",
    "rope_parameters", "sliding_window", "tie_word_embeddings", "torch_dtype", "dtype", "transformers_version",
)  # fmt: skip
_DRAFTER_FACTS = (
    "hidden_size", "exit_dim", "num_draft_layers", "rnn", "vocab_size", "draft_len", "tie_lm_head", "base_model",
)  # fmt: skip
_CHECKPOINT_FACTS = (
    "architecture", "base_model_architecture", "qwen_type", "dtype", "hidden_size", "intermediate_size",
    "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_size", "vocab_size",
    "max_position_embeddings", "rotary_base", "rotary_scaling", "tie_word_embeddings", "use_parallel_embedding",
    "mapping", "quantization", "redrafter_num_layers", "redrafter_exit_dim", "redrafter_is_rnn",
    "redrafter_num_beams", "redrafter_draft_len_per_beam", "redrafter_greedy_search",
)  # fmt: skip
_KINDS: Mapping[Kind, tuple[str, tuple[str, ...]]] = {
    Kind.BASE_MODEL: ("Hugging Face model", ("architectures", *_BASE_FACTS)),
    Kind.DRAFTER: ("drafter", _DRAFTER_FACTS),
    Kind.CHECKPOINT: ("TensorRT-LLM checkpoint", _CHECKPOINT_FACTS),
    Kind.TORCH_ENGINE: (
        "engine of the torch backend",
        ("backend", "version", "build_config", "draft_head_rows", "eos_token_ids"),
    ),
    Kind.STEP_ENGINE: (
        "engine of the tensorrt backend",
        ("version", "build_config", "gpu", "compiler", "weights", "draft_head_rows", "eos_token_ids"),
    ),
    Kind.TENSORRT_ENGINE: ("TensorRT-LLM engine", ("version", "build_config")),
}
"""Each kind's name, and the keys of its config.json to show."""


@dataclass(frozen=True)
class TensorRow:
    """One tensor of one file."""

    file: str
    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int

    def as_dict(self) -> dict[str, Any]:
        return {
            "file": self.file, "name": self.name, "dtype": self.dtype,
            "shape": list(self.shape), "bytes": self.nbytes,
        }  # fmt: skip


@dataclass(frozen=True)
class Inspection:
    """What was found. `facts` are the settings that matter for its kind, in display order."""

    path: Path
    kind: str
    facts: Mapping[str, Any]
    tensors: tuple[TensorRow, ...]
    provenance: Mapping[str, Any]
    notes: tuple[str, ...]

    @property
    def total_bytes(self) -> int:
        return sum(row.nbytes for row in self.tensors)

    def render(self) -> str:
        """Facts, then tensors with equal layers folded into one line, then provenance."""
        lines = [f"{self.path}: {self.kind}"]
        width = max((len(key) for key in self.facts), default=0)
        lines += [f"  {key:<{width}}  {value}" for key, value in self.facts.items()]
        if self.tensors:
            lines.append(f"  {len(self.tensors)} tensors, {self.total_bytes:,} bytes")
            lines += [f"    {line}" for line in _folded(self.tensors)]
        if self.provenance:
            lines.append("  made")
            lines += [f"    {key}: {value}" for key, value in self.provenance.items()]
        return "\n".join(lines + [f"  note: {note}" for note in self.notes])

    def as_dict(self) -> dict[str, Any]:
        return {
            "path": str(self.path),
            "kind": self.kind,
            "facts": dict(self.facts),
            "tensors": [row.as_dict() for row in self.tensors],
            "total_bytes": self.total_bytes,
            "provenance": dict(self.provenance),
            "notes": list(self.notes),
        }


def inspect(path: Path) -> Inspection:
    """Recognise and describe `path`; `InputError` if it is of no known kind."""
    if path.is_file() and path.suffix == ".safetensors":
        file = SafetensorsFile.open(path)
        return Inspection(path, "safetensors file", file.metadata, tuple(_rows(file, path.name)), {}, ())
    if not path.is_dir():
        raise InputError("there is no such directory or safetensors file", where=path, remedy="check the path")
    config = read_json(path / "config.json")
    kind = kind_of(config)
    if kind is None:
        raise wrong_kind(path, config, None)
    name, keys = _KINDS[kind]
    if kind is Kind.CHECKPOINT and "redrafter_num_beams" in config:
        name += " with drafter"
    facts = {key: config[key] for key in keys if config.get(key) is not None}
    manifest = Manifest.find(path)
    facts |= _draft(path, kind) | _end_tokens(path, kind, config, manifest)
    own = manifest is not None or kind is Kind.BASE_MODEL
    notes = [] if own else [f"no {MANIFEST}: another program wrote this"]
    weights = path / ENGINE_CHECKPOINT if kind is Kind.TORCH_ENGINE else path
    files = sorted(weights.glob("*.safetensors"))
    if kind is Kind.DRAFTER and not files:
        notes.append("its weights are a pickle, which is not read here; `convert` reads it with weights_only")
    rows = tuple(row for file in files for row in _rows(SafetensorsFile.open(file), file.relative_to(path).as_posix()))
    return Inspection(path, name, facts, rows, _provenance(manifest, config), tuple(notes))


def _draft(path: Path, kind: Kind) -> dict[str, Any]:
    """What an engine drafts, which the config of the checkpoint in it says."""
    if kind not in ENGINES:
        return {}
    try:
        shape = read_engine_config(path).draft_shape
    except RedrafterError as error:
        return {"draft": f"not known: {error.problem.what}"}
    return {} if shape is None else {"draft": {"num_beams": shape.num_beams, "draft_len": shape.draft_len}}


def _end_tokens(path: Path, kind: Kind, config: Mapping[str, Any], manifest: Manifest | None) -> dict[str, Any]:
    """The end tokens of a model, checkpoint or engine, which keep them elsewhere than in config.json."""
    if kind is Kind.TENSORRT_ENGINE and (path / NOTES_FILE).is_file():
        return {EOS_TOKEN_IDS: read_json(path / NOTES_FILE).get(EOS_TOKEN_IDS, [])}
    if kind is Kind.CHECKPOINT and manifest is not None:
        return {EOS_TOKEN_IDS: manifest.end_tokens}
    if kind is not Kind.BASE_MODEL or type(config.get("vocab_size")) is not int:
        return {}
    from trtllm_redrafter.base_models.tokenizer_setup import tokenizer_setup

    try:
        text = tokenizer_setup(path, vocab_size=config["vocab_size"], remedy="download the tokenizer again")
    except RedrafterError as error:
        return {EOS_TOKEN_IDS: f"not known: {error.problem.what}"}
    return {EOS_TOKEN_IDS: list(text.end_token_ids)}


def _rows(file: SafetensorsFile, name: str) -> Iterator[TensorRow]:
    for tensor in file.values():
        yield TensorRow(name, tensor.name, tensor.dtype, tensor.shape, tensor.nbytes)


def _provenance(manifest: Manifest | None, config: Mapping[str, Any]) -> dict[str, Any]:
    if manifest is None:
        made = config.get("producer") or config.get("provenance")
        return {"by": made} if made else {}
    return {
        "by": " ".join(str(manifest.creator.get(key, "")) for key in ("name", "version")),
        "at": manifest.created,
        "from": {role: _origin(source) for role, source in manifest.inputs.items()},
        "options": dict(manifest.options),
        "derived": dict(manifest.derived),
    }


def _origin(source: Any) -> Any:
    return source.get("path", source) if isinstance(source, dict) else source


def _folded(rows: tuple[TensorRow, ...]) -> list[str]:
    """One line for all tensors that differ only in their layer's number or their file."""
    groups: dict[tuple[str, str, tuple[int, ...]], list[TensorRow]] = {}
    for row in rows:
        pattern = re.sub(r"\.\d+\.", ".*.", row.name, count=1)
        groups.setdefault((pattern, row.dtype, row.shape), []).append(row)
    lines = []
    for (pattern, dtype, shape), members in groups.items():
        layers, files = len({m.name for m in members}), len({m.file for m in members})
        name = pattern if layers > 1 else members[0].name
        times = f" x {layers} layers" if layers > 1 else ""
        times += f" in {files} files" if files > 1 else ""
        lines.append(f"{name}  {dtype} {list(shape)}{times}  {sum(m.nbytes for m in members):,} bytes")
    return lines
