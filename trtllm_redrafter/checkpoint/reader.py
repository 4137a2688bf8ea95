"""Read a TensorRT-LLM checkpoint as if it had never been split over ranks.

The torch backend gets its weights this way, and `verify` compares a checkpoint with its origin: by the checkpoint's own
names, with tensor-parallel shards joined and vocabulary padding removed.

    checkpoint = Checkpoint.open(Path("checkpoint"))
    checkpoint.config.num_hidden_layers                        # 32
    checkpoint.load("transformer.layers.0.attention.qkv.weight")   # [q all; k all; v all], on the CPU

With one rank, tensors are views of the memory-mapped file: nothing is read before it is used, and writing into a tensor
would change what other callers see (never the file). Copy before modifying.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from trtllm_redrafter.checkpoint.config import CheckpointConfig, read_raw_config
from trtllm_redrafter.checkpoint.layout import TensorSpec, rank_slice, tensor_specs
from trtllm_redrafter.checkpoint.manifest import Manifest
from trtllm_redrafter.checkpoint.names import EMBEDDING, LM_HEAD, rank_file
from trtllm_redrafter.checkpoint.safetensors_io import SafetensorsFile
from trtllm_redrafter.checkpoint.stored_tensor import StoredTensor
from trtllm_redrafter.errors import BackendError, InputError

FP8_SCALE = "weights_scaling_factor"
_FLOATING = ("F16", "BF16", "F32")


class Checkpoint:
    """An open checkpoint directory: headers are checked, weights are not yet in memory."""

    def __init__(
        self, path: Path, config: CheckpointConfig, ranks: list[SafetensorsFile], manifest: Manifest | None
    ) -> None:
        self.path = path
        self.config = config
        self.ranks = ranks
        self.manifest = manifest
        self.specs: Mapping[str, TensorSpec] = tensor_specs(config)

    @classmethod
    def open(cls, path: Path) -> Checkpoint:
        """Open a directory with config.json and rank{N}.safetensors; `InputError` says what is missing."""
        path = Path(path)
        raw = read_raw_config(path)
        mapping = raw.get("mapping")
        world_size = mapping.get("world_size", 1) if isinstance(mapping, dict) else 1
        count = world_size if type(world_size) is int and world_size >= 1 else 1
        ranks = [SafetensorsFile.open(rank_file(path, rank)) for rank in range(count)]
        names = {name for rank in ranks for name in rank}
        config = CheckpointConfig.from_dict(raw, where=path / "config.json", tensor_names=names)
        if config.pp_size != 1 or config.tp_size != count:
            raise InputError(
                f"the checkpoint has {config.tp_size} tensor- and {config.pp_size} pipeline-parallel ranks of {count}",
                where=path / "config.json",
                why="only tensor parallelism is supported: the drafter needs embedding and LM head on every rank",
                remedy="export the checkpoint again with pp_size 1",
            )
        return cls(path, config, ranks, Manifest.find(path))

    def names(self) -> list[str]:
        """Names of all tensors, sorted; a tied LM head is listed even if it is not stored."""
        names = set(self.ranks[0])
        if self.config.tie_word_embeddings:
            names.add(LM_HEAD)
        return sorted(names)

    def load(self, name: str) -> Tensor:
        """The whole tensor on the CPU. Weights and biases are in the config's dtype, FP8 weights dequantized.

        `BackendError` for other quantized weights: they need TensorRT-LLM's kernels.
        """
        name = self._stored(name)
        info = self._info(name)
        tensor = self.load_stored(name)
        if not name.endswith((".weight", ".bias")):
            return tensor
        dtype: torch.dtype = getattr(torch, self.config.dtype)
        if info.dtype in _FLOATING:
            self._refuse_if(self._sibling(name, "prequant_scaling_factor") in self.ranks[0], name)
            return tensor.to(dtype)
        scale_name = self._sibling(name, FP8_SCALE)
        scale = self.load_stored(scale_name) if scale_name in self.ranks[0] else None
        self._refuse_if(info.dtype != "F8_E4M3" or scale is None or scale.numel() != 1, name)
        assert scale is not None
        return (tensor.to(torch.float32) * scale.to(torch.float32).reshape(())).to(dtype)

    def load_stored(self, name: str) -> Tensor:
        """The whole tensor in the dtype it is stored in, ranks joined."""
        if len(self.ranks) == 1:
            return self._info(name).load()
        spec = self._spec(name)
        info = self._info(name)
        joined = torch.empty(spec.shape, dtype=info.torch_dtype)
        for rank, file in enumerate(self.ranks):
            self._copy_part(joined, spec, rank, file)
        return joined

    def _copy_part(self, joined: Tensor, spec: TensorSpec, rank: int, file: SafetensorsFile) -> None:
        part = rank_slice(spec, self.config, rank)
        expected = part.shape(spec.shape)
        info = file.get(spec.name)
        if info is None or info.shape != expected or info.torch_dtype != joined.dtype:
            found = "missing" if info is None else f"{info.dtype} {list(info.shape)}"
            raise InputError(
                f"tensor {spec.name!r} does not fit the other ranks",
                where=file.path,
                why=f"it is {found}, {list(expected)} is needed",
                remedy="write the checkpoint again",
            )
        source = info.load()
        if not spec.shape:
            joined.copy_(source)
            return
        at = 0
        for start, stop in part.rows:
            target = joined[start:stop] if part.cols is None else joined[start:stop, part.cols[0] : part.cols[1]]
            target.copy_(source[at : at + stop - start])
            at += stop - start

    def _stored(self, name: str) -> str:
        """A tied LM head may be left out of the file; like TensorRT-LLM, we then use the embedding."""
        header = self.ranks[0]
        if name == LM_HEAD and name not in header and self.config.tie_word_embeddings and EMBEDDING in header:
            return EMBEDDING
        return name

    def _info(self, name: str) -> StoredTensor:
        info = self.ranks[0].get(name)
        if info is None:
            raise InputError(
                f"the checkpoint has no tensor {name!r}",
                where=self.ranks[0].path,
                remedy="convert it again; `verify` lists everything that is missing",
            )
        return info

    def _spec(self, name: str) -> TensorSpec:
        spec = self.specs.get(name)
        if spec is None or not spec.checked:
            raise BackendError(
                f"tensor {name!r} cannot be joined over {len(self.ranks)} ranks",
                where=self.path,
                why=f"how quantization {self.config.quant_algo!r} splits it is not known here",
                remedy="use a checkpoint with one rank, or the tensorrt-llm backend",
            )
        return spec

    def _sibling(self, name: str, suffix: str) -> str:
        return name.rsplit(".", 1)[0] + "." + suffix

    def _refuse_if(self, refuse: bool, name: str) -> None:
        if refuse:
            raise BackendError(
                f"the weights are quantized as {self.config.quant_algo}",
                where=self.path,
                why=f"{name!r} needs TensorRT-LLM's kernels; only FP8 with one scale per tensor is read as numbers",
                remedy="build with --backend tensorrt-llm, or convert the unquantized base model",
            )
