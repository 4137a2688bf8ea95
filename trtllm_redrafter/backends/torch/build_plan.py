"""What a build for the torch backend will do, and every reason why it cannot, before anything is written."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from trtllm_redrafter.backends.base import BuildOptions
from trtllm_redrafter.backends.engine_config import TORCH, TORCH_ENGINE_FORMAT
from trtllm_redrafter.backends.tokenizer import BuildText, build_text
from trtllm_redrafter.backends.torch.native.compiled import NativeUnavailable
from trtllm_redrafter.backends.torch.native.library import load_library
from trtllm_redrafter.backends.torch.rope import SUPPORTED_SCALINGS, scaling_kind
from trtllm_redrafter.checkpoint.config import CheckpointConfig
from trtllm_redrafter.checkpoint.names import EOS_TOKEN_IDS
from trtllm_redrafter.checkpoint.reader import Checkpoint
from trtllm_redrafter.checkpoint.structure import require_sound
from trtllm_redrafter.errors import MismatchError, Problem, raise_together
from trtllm_redrafter.fsio import check_replaceable
from trtllm_redrafter.paths import check_place, existing_parent
from trtllm_redrafter.version import __version__

LEAST_DRAFT_HEAD_ROWS = 8192


def draft_head_rows(vocab_size: int) -> int:
    """Rows of the drafter's LM head that are computed, where the checkpoint says which are the most frequent.

    A sixth of the vocabulary: 8,192 of 49,152 hold 99 % of what SmolLM2 writes, but only 97 % of what a model with
    151,936 tokens does, where every token that cannot be drafted ends a draft.
    """
    return max(LEAST_DRAFT_HEAD_ROWS, vocab_size // 6 // 1024 * 1024)


@dataclass(frozen=True)
class TorchBuildPlan:
    """What goes into an engine and what follows from its limits."""

    options: BuildOptions
    checkpoint: Checkpoint
    text: BuildText
    executor: str
    executor_reason: str | None
    executor_note: str | None
    """What to tell the user about it; None where nothing is to be changed."""

    @property
    def kv_cache_bytes(self) -> int:
        config = self.checkpoint.config
        tree = 1 if config.draft_shape is None else config.draft_shape.max_tree_tokens
        return kv_cache_bytes(config, self.options.max_batch_size, self.options.max_seq_len + tree)

    @property
    def head_rows(self) -> int:
        """0 without a drafter."""
        return 0 if self.checkpoint.config.draft_shape is None else draft_head_rows(self.checkpoint.config.vocab_size)

    @property
    def tokenizer(self) -> Path | None:
        """Where the tokenizer's files are copied from."""
        return self.text.source

    @property
    def weight_bytes(self) -> int:
        return sum(file.path.stat().st_size for file in self.checkpoint.ranks)

    def engine_config(self) -> dict[str, Any]:
        options = self.options
        return {
            "format": TORCH_ENGINE_FORMAT,
            "backend": TORCH,
            "version": __version__,
            "build_config": {
                "max_batch_size": options.max_batch_size,
                "max_input_len": options.max_input_len,
                "max_seq_len": options.max_seq_len,
            },
            "draft_head_rows": self.head_rows,
            EOS_TOKEN_IDS: list(self.text.end_token_ids),
        }

    def as_dict(self) -> dict[str, Any]:
        config, shape = self.checkpoint.config, self.checkpoint.config.draft_shape
        return {
            "backend": TORCH,
            "checkpoint": str(self.options.checkpoint),
            "output": str(self.options.output),
            "architecture": config.architecture,
            "dtype": config.dtype,
            "tp_size": config.tp_size,
            "tokenizer": None if self.tokenizer is None else str(self.tokenizer),
            "executor": self.executor,
            "executor_reason": self.executor_reason,
            "executor_note": self.executor_note,
            "weight_bytes": self.weight_bytes,
            "kv_cache_bytes": self.kv_cache_bytes,
            EOS_TOKEN_IDS: list(self.text.end_token_ids),
            "notes": list(self.text.notes),
            **self.engine_config()["build_config"],
            "draft": None if shape is None else {**asdict(shape), "head_rows": self.head_rows},
        }

    def render(self) -> str:
        values = self.as_dict()
        shape = self.checkpoint.config.draft_shape
        drafting = "none: autoregressive" if shape is None else f"{shape.num_beams} beams x {shape.draft_len} tokens"
        reason = f" ({self.executor_reason})" if self.executor_reason else ""
        lines = [
            f"build   {values['checkpoint']} -> {values['output']} for the torch backend",
            f"model   {values['architecture']}, {values['dtype']}, {values['tp_size']} rank(s), "
            f"{self.weight_bytes / 1e6:.0f} MB of weights, linked or copied",
            f"drafts  {drafting}",
            f"limits  {values['max_batch_size']} requests, {values['max_input_len']} prompt tokens, "
            f"{values['max_seq_len']} in all; KV cache {self.kv_cache_bytes / 1e6:.0f} MB when full",
            f"text    {self.text.render()}",
            f"runs    {self.executor} on this machine{reason}",
            *(f"note    {note}" for note in self.text.notes),
        ]
        return "\n".join(lines)


def kv_cache_bytes(config: CheckpointConfig, batch: int, capacity: int) -> int:
    """Bytes of a full KV cache: `batch` requests of `capacity` positions, the tree's nodes included."""
    element = 4 if config.dtype == "float32" else 2
    return 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_size * batch * capacity * element


def plan_build(options: BuildOptions) -> TorchBuildPlan:
    """Check everything a build could fail on."""
    checkpoint = Checkpoint.open(options.checkpoint)
    require_sound(checkpoint)
    raise_together(MismatchError, limit_and_model_problems(checkpoint, options), "the engine cannot be built")
    check_replaceable(options.output, overwrite=options.overwrite)
    check_place(options.output, _bytes_to_write(checkpoint, options.output))
    text = build_text(options.tokenizer, checkpoint)
    executor, reason, note = _executor(checkpoint.config)
    return TorchBuildPlan(options, checkpoint, text, executor, reason, note)


def _bytes_to_write(checkpoint: Checkpoint, output: Path) -> int:
    """Bytes to write for the weights: 0 on the checkpoint's own disk, where they are hard-linked."""
    if existing_parent(output).stat().st_dev == checkpoint.path.stat().st_dev:
        return 0
    return sum(file.size for file in checkpoint.ranks)


def _executor(config: CheckpointConfig) -> tuple[str, str | None, str | None]:
    """Which executor will be used on this machine, why not the faster one, and what to tell the user about it.

    Compiles the kernels if they are used.
    """
    if config.dtype != "bfloat16":
        return "PyTorch", f"the native kernels compute bfloat16, not {config.dtype}", None
    try:
        load_library()
    except NativeUnavailable as unavailable:
        return "PyTorch", str(unavailable), unavailable.note
    return "native kernels", None, None


def limit_and_model_problems(checkpoint: Checkpoint, options: BuildOptions) -> list[Problem]:
    """What neither this backend nor the tensorrt backend, which makes its network after it, can do."""
    config, found = checkpoint.config, []
    where = str(options.checkpoint)
    kind = scaling_kind(config.rotary_scaling)
    if kind not in SUPPORTED_SCALINGS:
        found.append(Problem(f"rotary scaling {kind!r} is not known to the torch backend", where))
    if config.hidden_act != "silu":
        found.append(Problem(f"activation {config.hidden_act!r} is not known to the torch backend", where))
    for name, value in (
        ("max_batch_size", options.max_batch_size),
        ("max_input_len", options.max_input_len),
        ("max_seq_len", options.max_seq_len),
    ):
        if value < 1:
            found.append(Problem(f"{name} is {value}", remedy="use a positive number"))
    if options.max_seq_len > config.max_position_embeddings:
        found.append(
            Problem(
                f"max_seq_len {options.max_seq_len} exceeds the model's {config.max_position_embeddings} positions",
                where,
                remedy=f"pass --max-seq-len {config.max_position_embeddings} or less",
            )
        )
    if options.max_input_len >= options.max_seq_len:
        found.append(
            Problem(
                f"max_input_len {options.max_input_len} leaves no room to write within max_seq_len "
                f"{options.max_seq_len}",
                remedy="pass a smaller --max-input-len or a larger --max-seq-len",
            )
        )
    return found
