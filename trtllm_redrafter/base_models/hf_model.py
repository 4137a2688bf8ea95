"""A Hugging Face model directory: its config and the places of its tensors, checked before anything is converted.

Only headers are read. All problems (missing shard, missing tensor, wrong shape, a tensor the family does not have) are
reported together:

    model = HFModel.open(Path("Llama-3.1-8B"))
    model.config.vocab_size, model.tensors["model.norm.weight"].path

`weights_sample` distinguishes models of equal sizes by their weights, without reading all of them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from trtllm_redrafter.base_models.hf_config import parse_hf_config, stated_dtype
from trtllm_redrafter.checkpoint.config import CheckpointConfig
from trtllm_redrafter.checkpoint.families import FAMILIES
from trtllm_redrafter.checkpoint.layout import DTYPE_NAMES, Split, TensorSpec, tensor_specs
from trtllm_redrafter.checkpoint.names import EMBEDDING, HF_IGNORED_SUFFIXES, LM_HEAD, hf_names
from trtllm_redrafter.checkpoint.safetensors_io import SafetensorsFile
from trtllm_redrafter.checkpoint.stored_tensor import StoredTensor
from trtllm_redrafter.errors import InputError, Problem, RedrafterError, limited, raise_together
from trtllm_redrafter.fsio import read_json, safe_join

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
FLOATING = tuple(DTYPE_NAMES.values())

SAMPLE_BYTES = 4096
"""Bytes per tensor in `weights_sample`: one page, about two thousand values."""


@dataclass(frozen=True)
class HFModel:
    """An open model. `config` is for one rank, in the model's own dtype; `files` are all files that were read."""

    path: Path
    config: CheckpointConfig
    tensors: Mapping[str, StoredTensor]
    files: tuple[Path, ...]
    notes: tuple[str, ...]

    @classmethod
    def open(cls, path: Path) -> HFModel:
        raw = read_json(path / "config.json")
        parsed = parse_hf_config(raw, where=path / "config.json")
        problems = list(parsed.problems)
        files: tuple[Path, ...]
        tensors: dict[str, StoredTensor] | None
        try:
            files, tensors = locate_tensors(path)
        except RedrafterError as e:
            problems += e.problems or (e.problem,)
            files, tensors = (), None
        config = parsed.config
        if config is not None and tensors is not None:
            config = _with_dtype(config, raw, tensors)
            problems += check_tensors(config, tensors, path)
        raise_together(InputError, problems, "the base model cannot be converted", where=path)
        assert config is not None and tensors is not None
        return cls(path, config, tensors, files, parsed.notes)


def _with_dtype(
    config: CheckpointConfig, raw: Mapping[str, Any], tensors: Mapping[str, StoredTensor]
) -> CheckpointConfig:
    """If the config names no dtype, take the embedding's."""
    embedding = tensors.get(hf_names(EMBEDDING)[0])
    if stated_dtype(raw) is not None or embedding is None:
        return config
    by_stored = {stored: name for name, stored in DTYPE_NAMES.items()}
    return replace(config, dtype=by_stored.get(embedding.dtype, config.dtype))


def locate_tensors(path: Path) -> tuple[tuple[Path, ...], dict[str, StoredTensor]]:
    """All files that were read, and the tensors in the weight files."""
    single, index = path / SINGLE_FILE, path / INDEX_FILE
    if single.exists():
        return (path / "config.json", single), dict(SafetensorsFile.open(single))
    if not index.exists():
        others = sorted(p.name for p in path.iterdir() if p.suffix in (".bin", ".pth", ".gguf"))
        raise InputError(
            f"the model has neither {SINGLE_FILE} nor {INDEX_FILE}",
            where=path,
            why=f"it has {', '.join(others)}; pickles and GGUF are not read" if others else None,
            remedy="save it with transformers' save_pretrained, which writes safetensors",
        )
    return _sharded(path, index)


def _sharded(path: Path, index: Path) -> tuple[tuple[Path, ...], dict[str, StoredTensor]]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(v, str) for v in weight_map.values()):
        raise InputError("the index has no weight_map", where=index, remedy="download it again")
    problems: list[Problem] = []
    tensors: dict[str, StoredTensor] = {}
    files = []
    for name in sorted(set(weight_map.values())):
        try:
            file = safe_join(path, name)
            tensors |= _shard(file)
            files.append(file)
        except RedrafterError as e:
            problems.append(e.problem)
    if not problems:
        problems = [
            Problem(f"tensor {name!r} is not in the file the index names", str(path / file), None, "download it again")
            for name, file in weight_map.items()
            if name not in tensors or tensors[name].path.name != Path(file).name
        ]
    raise_together(InputError, limited(problems), "the model's weight files are not complete", where=path)
    return (path / "config.json", index, *files), tensors


def _shard(file: Path) -> SafetensorsFile:
    if not file.exists():
        raise InputError("the weight file is missing", where=file, remedy="download it again")
    return SafetensorsFile.open(file)


def check_tensors(config: CheckpointConfig, tensors: Mapping[str, StoredTensor], path: Path) -> list[Problem]:
    """Missing tensors, wrong shapes and dtypes, and tensors the family does not have."""
    specs = tensor_specs(config)
    problems: list[Problem] = []
    expected = {*hf_names(LM_HEAD)}  # tied models may store a copy, which is not used
    for name, sources in tensor_sources(config).items():
        shapes = source_shapes(specs[name], config)
        for source, shape in zip(sources, shapes, strict=True):
            expected.add(source)
            problems += _check_one(source, shape, tensors.get(source), path)
    family = FAMILIES[config.base_architecture].name
    problems += [
        Problem(
            f"tensor {name!r} has no place in a {family} checkpoint",
            str(stored.path),
            "leaving it out would change what the model computes",
            "check config.json (attention_bias, mlp_bias, architectures)",
        )
        for name, stored in tensors.items()
        if name not in expected and not name.endswith(HF_IGNORED_SUFFIXES)
    ]
    return limited(problems)


def tensor_sources(config: CheckpointConfig) -> dict[str, tuple[str, ...]]:
    """Checkpoint name → the Hugging Face tensors it is made of, for a base model without drafter or quantization."""
    sources = {name: hf_names(name) for name in tensor_specs(config)}
    return sources | {LM_HEAD: hf_names(EMBEDDING)} if config.tie_word_embeddings else sources


def source_shapes(spec: TensorSpec, config: CheckpointConfig) -> list[tuple[int, ...]]:
    """Shapes of the Hugging Face tensors that form a joined one."""
    if spec.split is not Split.QKV:
        return [spec.shape]
    d, rest = config.head_size, spec.shape[1:]
    heads = (config.num_attention_heads, config.num_key_value_heads, config.num_key_value_heads)
    return [(n * d, *rest) for n in heads]


def _check_one(name: str, shape: tuple[int, ...], found: StoredTensor | None, path: Path) -> list[Problem]:
    if found is None:
        why = "only a model with tie_word_embeddings may leave it out" if name in hf_names(LM_HEAD) else None
        return [Problem(f"tensor {name!r} is missing", str(path), why, "download the model again")]
    if found.shape != shape:
        why = f"config.json implies {list(shape)}, the file has {list(found.shape)}"
        remedy = "use the config.json that belongs to these weights"
        return [Problem(f"tensor {name!r} has the wrong shape", str(found.path), why, remedy)]
    if found.dtype not in FLOATING:
        why = f"it is {found.dtype}; one of {', '.join(FLOATING)} is needed"
        return [Problem(f"tensor {name!r} is not a plain floating tensor", str(found.path), why, "use the original")]
    return []


def weights_sample(tensors: Mapping[str, StoredTensor]) -> str:
    """Hex SHA-256 over every tensor's name, dtype, shape and first `SAMPLE_BYTES` bytes.

    It does not depend on how the model is split into files. Training writes it into the drafter, and `convert` compares
    it with its base model's. It detects changes in the first rows of any tensor: every fine-tune, but not a single
    edited weight.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        first = bytearray(min(SAMPLE_BYTES, tensor.nbytes))
        tensor.read_into(memoryview(first))
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(first)
    return digest.hexdigest()


def sample_of(path: Path) -> str | None:
    """`weights_sample` of a model directory; None if its weights are not safetensors."""
    try:
        return weights_sample(locate_tensors(path)[1])
    except RedrafterError:
        return None
