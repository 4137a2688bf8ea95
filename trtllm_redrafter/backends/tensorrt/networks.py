"""Which networks an engine has, and what each is made and compiled for.

A step drafts or does not, and draws its tokens or takes the likeliest: four networks, which share weights, state and KV
cache. Each is made from the checkpoint's config alone, in milliseconds, so an engine need not keep them.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace

import onnx

from trtllm_redrafter.backends.tensorrt.compilers import fuses_attention
from trtllm_redrafter.backends.tensorrt.decoder import PROMPT_CHUNK
from trtllm_redrafter.backends.tensorrt.network import Sizes
from trtllm_redrafter.backends.tensorrt.step import chain_network, draft_network
from trtllm_redrafter.backends.tensorrt.weights import draft_rows
from trtllm_redrafter.checkpoint.reader import Checkpoint
from trtllm_redrafter.redrafter.config import DraftShape

_CAPACITY_STEP = 64
_USUAL_PROMPT = 64
"""Prompt tokens that kernels are tuned for."""


@dataclass(frozen=True)
class Network:
    """One of an engine's networks."""

    drafted: bool
    sampled: bool

    @property
    def name(self) -> str:
        return f"{'draft' if self.drafted else 'chain'}-{'sampled' if self.sampled else 'greedy'}"


def networks_of(shape: DraftShape | None) -> list[Network]:
    return [Network(drafted, sampled) for drafted in (False, *([True] if shape else [])) for sampled in (False, True)]


def engine_sizes(checkpoint: Checkpoint, shape: DraftShape | None, *, max_seq_len: int, head_rows: int) -> Sizes:
    """What all networks of an engine have in common. `shape` None: no drafting."""
    config = checkpoint.config
    rows = None if shape is None else draft_rows(checkpoint, head_rows)
    moved, nodes = (0, 1) if shape is None else (shape.draft_len, shape.max_tree_tokens)
    return Sizes(
        config=config,
        names=frozenset(checkpoint.names()),
        capacity=-(-(moved + max_seq_len + nodes) // _CAPACITY_STEP) * _CAPACITY_STEP,
        moved=moved,
        draft=shape,
        draft_rows=None if rows is None else len(rows),
        fused_attention=fuses_attention(config.dtype, config.head_size),
        sampled=False,
        float8=float8_weights(checkpoint),
    )


def float8_weights(checkpoint: Checkpoint) -> frozenset[str]:
    """Names of the weights that are stored as FP8."""
    return frozenset(name for name in checkpoint.ranks[0] if checkpoint.ranks[0][name].dtype == "F8_E4M3")


def make_network(sizes: Sizes, network: Network) -> onnx.ModelProto:
    """The network as ONNX. Equal sizes give equal bytes."""
    own = replace(sizes, draft=sizes.draft if network.drafted else None, sampled=network.sampled)
    return draft_network(own) if network.drafted else chain_network(own)


def network_sha256(model: onnx.ModelProto) -> str:
    return hashlib.sha256(model.SerializeToString(deterministic=True)).hexdigest()


def profile(model: onnx.ModelProto, *, max_batch_size: int, max_input_len: int) -> dict[str, list[list[int]]]:
    """Smallest, usual and largest shape of every input whose size is known at run time only."""
    longest = min(PROMPT_CHUNK, max_input_len)
    usual = {"batch": max_batch_size, "tokens": min(_USUAL_PROMPT, longest)}
    ranges = [{"batch": 1, "tokens": 1}, usual, {"batch": max_batch_size, "tokens": longest}]
    found = {}
    for value in model.graph.input:
        dims = [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]
        if any(isinstance(dim, str) for dim in dims):
            found[value.name] = [[sizes[d] if isinstance(d, str) else d for d in dims] for sizes in ranges]
    return found
