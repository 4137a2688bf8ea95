"""Build and load engines of the torch backend.

An engine is the checkpoint itself, hard-linked where the file system allows, beside the tokenizer and the limits it
was built for. Nothing in it depends on the machine; what does (the compiled kernels) is made in the user's cache.

    engine/
      config.json       backend, limits, drafting settings, end-of-text tokens
      manifest.json     what made it, from what, hashes
      tokenizer/        tokenizer, chat template, generation_config.json
      checkpoint/       config.json, rank{N}.safetensors, draft_vocab.safetensors
"""

from __future__ import annotations

import platform
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from trtllm_redrafter import __version__
from trtllm_redrafter.backends.base import BuildOptions, BuildPlan, EngineInfo
from trtllm_redrafter.backends.torch.drafting import DRAFT_VOCAB_FILE, Drafting, frequent_rows, load_drafter
from trtllm_redrafter.backends.torch.executor import Executor
from trtllm_redrafter.backends.torch.native.executor import NativeExecutor, unsupported_reason
from trtllm_redrafter.backends.torch.native.library import NativeUnavailable, load_library
from trtllm_redrafter.backends.torch.rope import SUPPORTED_SCALINGS, scaling_kind
from trtllm_redrafter.backends.torch.runner import TorchRunner
from trtllm_redrafter.backends.torch.tokenizer import TOKENIZER_DIRECTORY, EngineTokenizer, eos_token_ids
from trtllm_redrafter.backends.torch.transformer import TorchExecutor
from trtllm_redrafter.backends.torch.weights import ModelWeights, load_weights
from trtllm_redrafter.base_models.tokenizer import tokenizer_files
from trtllm_redrafter.checkpoint.config import CheckpointConfig
from trtllm_redrafter.checkpoint.manifest import Manifest, record_tree
from trtllm_redrafter.checkpoint.reader import Checkpoint, rank_file
from trtllm_redrafter.errors import BackendError, InputError, MismatchError, Problem, UsageError, raise_together
from trtllm_redrafter.fsio import as_output_error, atomic_directory, check_replaceable, link_or_copy, read_json, write_json
from trtllm_redrafter.progress import Progress
from trtllm_redrafter.redrafter.config import DraftShape

BACKEND = "torch"
ENGINE_FORMAT = 1
CHECKPOINT_DIRECTORY = "checkpoint"

DRAFT_HEAD_ROWS = 8192
"""Rows of the drafter's LM head that are computed, where the checkpoint says which are the most frequent."""


@dataclass(frozen=True)
class TorchBuildPlan:
    """What goes into an engine and what follows from its limits."""

    options: BuildOptions
    checkpoint: Checkpoint
    tokenizer: Path | None
    executor: str
    executor_reason: str | None

    @property
    def kv_cache_bytes(self) -> int:
        config = self.checkpoint.config
        tree = 1 if config.draft_shape is None else config.draft_shape.max_tree_tokens
        positions = self.options.max_batch_size * (self.options.max_seq_len + tree)
        element = 4 if config.dtype == "float32" else 2
        return 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_size * positions * element

    @property
    def weight_bytes(self) -> int:
        return sum(file.path.stat().st_size for file in self.checkpoint.ranks)

    def engine_config(self) -> dict[str, Any]:
        config, options = self.checkpoint.config, self.options
        shape = config.draft_shape
        return {
            "format": ENGINE_FORMAT,
            "backend": BACKEND,
            "version": __version__,
            "build_config": {
                "max_batch_size": options.max_batch_size,
                "max_input_len": options.max_input_len,
                "max_seq_len": options.max_seq_len,
            },
            "draft": None
            if shape is None
            else {"num_beams": shape.num_beams, "draft_len": shape.draft_len, "head_rows": DRAFT_HEAD_ROWS},
            "built_on": {"machine": platform.machine(), "system": platform.system(), "torch": torch.__version__},
        }

    def as_dict(self) -> dict[str, Any]:
        config = self.checkpoint.config
        return {
            "backend": BACKEND,
            "checkpoint": str(self.options.checkpoint),
            "output": str(self.options.output),
            "architecture": config.architecture,
            "dtype": config.dtype,
            "tp_size": config.tp_size,
            "tokenizer": None if self.tokenizer is None else str(self.tokenizer),
            "executor": self.executor,
            "executor_reason": self.executor_reason,
            "weight_bytes": self.weight_bytes,
            "kv_cache_bytes": self.kv_cache_bytes,
            **self.engine_config()["build_config"],
            "draft": self.engine_config()["draft"],
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
            f"text    {values['tokenizer'] or 'no tokenizer: the engine will take token ids only'}",
            f"runs    {self.executor} on this machine{reason}",
        ]
        return "\n".join(lines)


class TorchBackend:
    """The embedded backend: PyTorch on any machine, compiled kernels for bfloat16 on a CPU."""

    name = BACKEND

    def plan(self, options: BuildOptions) -> TorchBuildPlan:
        """Check everything a build could fail on."""
        checkpoint = Checkpoint.open(options.checkpoint)
        raise_together(MismatchError, _problems(checkpoint, options), "the engine cannot be built")
        check_replaceable(options.output, overwrite=options.overwrite)
        executor, reason = "native kernels", None
        try:
            load_library()
        except NativeUnavailable as unavailable:
            executor, reason = "PyTorch", str(unavailable)
        if checkpoint.config.dtype != "bfloat16":
            executor, reason = "PyTorch", f"the native kernels compute bfloat16, not {checkpoint.config.dtype}"
        return TorchBuildPlan(options, checkpoint, _tokenizer_source(options), executor, reason)

    def build(self, plan: BuildPlan, progress: Progress) -> Path:
        """Write the engine directory; it appears complete or not at all."""
        assert isinstance(plan, TorchBuildPlan)
        options, source = plan.options, plan.options.checkpoint
        with atomic_directory(options.output, overwrite=options.overwrite) as work, as_output_error(options.output):
            files = _checkpoint_files(plan.checkpoint)
            for done, name in enumerate(files):
                progress("build", done, len(files), "files")
                target = work / CHECKPOINT_DIRECTORY / name
                target.parent.mkdir(parents=True, exist_ok=True)
                link_or_copy(source / name, target)
            if plan.tokenizer is not None:
                _copy_tokenizer(plan.tokenizer, work / TOKENIZER_DIRECTORY)
            write_json(work / "config.json", plan.engine_config())
            _manifest(plan, work).write(work)
            progress("build", len(files), len(files), "files")
        return options.output

    def load(
        self, engine: Path, *, device: str, verify_hashes: bool, draft_shape: DraftShape | None = None
    ) -> TorchRunner:
        """Load an engine on `device` ("cpu", "cuda", "cuda:1"). Sizes of all files are checked, hashes on request."""
        config = _read_engine(engine, verify_hashes)
        checkpoint = Checkpoint.open(engine / CHECKPOINT_DIRECTORY)
        shape = _draft_shape(checkpoint.config, config, draft_shape, engine)
        target = _device(device)
        weights = load_weights(checkpoint, target)
        limits = config["build_config"]
        executor = _make_executor(checkpoint.config, weights, limits, shape)
        drafting = None
        if shape is not None and checkpoint.config.drafter is not None:
            drafting = Drafting(
                load_drafter(checkpoint, checkpoint.config.drafter, target),
                executor,
                weights.embedding,
                shape,
                rows=frequent_rows(checkpoint.path, int(config["draft"]["head_rows"])),
                max_batch_size=int(limits["max_batch_size"]),
            )
        folder = engine / TOKENIZER_DIRECTORY
        tokenizer = EngineTokenizer(folder) if folder.is_dir() else None
        info = EngineInfo(
            path=engine,
            backend=BACKEND,
            device=f"{target} ({executor.name})",
            dtype=checkpoint.config.dtype,
            vocab_size=checkpoint.config.vocab_size,
            max_batch_size=int(limits["max_batch_size"]),
            max_input_len=int(limits["max_input_len"]),
            max_seq_len=int(limits["max_seq_len"]),
            draft_shape=shape,
        )
        return TorchRunner(info, executor, drafting, tokenizer, eos_token_ids(folder, tokenizer))


def _problems(checkpoint: Checkpoint, options: BuildOptions) -> list[Problem]:
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


def _tokenizer_source(options: BuildOptions) -> Path | None:
    """`--tokenizer`, or what `convert` put into the checkpoint."""
    if options.tokenizer is not None:
        if not options.tokenizer.is_dir() or not tokenizer_files(options.tokenizer):
            raise InputError(
                "there is no tokenizer here",
                where=options.tokenizer,
                remedy="pass the directory that holds tokenizer.json",
            )
        return options.tokenizer
    inside = options.checkpoint / TOKENIZER_DIRECTORY
    return inside if inside.is_dir() and tokenizer_files(inside) else None


def _checkpoint_files(checkpoint: Checkpoint) -> list[str]:
    names = ["config.json", *(rank_file(checkpoint.path, r).name for r in range(len(checkpoint.ranks)))]
    optional = ["manifest.json", DRAFT_VOCAB_FILE]
    return names + [name for name in optional if (checkpoint.path / name).exists()]


def _copy_tokenizer(source: Path, target: Path) -> None:
    target.mkdir()
    for file in tokenizer_files(source):
        (target / file.name).write_bytes(file.read_bytes())


def _manifest(plan: TorchBuildPlan, work: Path) -> Manifest:
    config = plan.engine_config()
    known = plan.checkpoint.manifest
    return Manifest(
        kind="engine",
        inputs={
            "checkpoint": {
                "path": str(plan.options.checkpoint),
                "inputs": {} if known is None else dict(known.inputs),
            }
        },
        options={k: v for k, v in config["build_config"].items()},
        derived={k: v for k, v in config.items() if k not in ("build_config", "format")},
        files=record_tree(work),
    )


def _read_engine(engine: Path, verify_hashes: bool) -> dict[str, Any]:
    """The engine's config, after a check of what it is and whether its files are whole."""
    from trtllm_redrafter.backends import engine_backend

    backend = engine_backend(engine)
    if backend != BACKEND:
        raise BackendError(
            f"the engine was built for the {backend} backend",
            where=engine,
            remedy="load it with that backend, or build the checkpoint again with --backend torch",
        )
    config = read_json(engine / "config.json")
    if config.get("format") != ENGINE_FORMAT:
        raise BackendError(
            f"the engine has format {config.get('format')!r}, this version reads {ENGINE_FORMAT}",
            where=engine,
            why=f"it was built by version {config.get('version')!r}, this is {__version__}",
            remedy="build it again",
        )
    problems = Manifest.read(engine).check_files(engine, hashes=verify_hashes)
    raise_together(InputError, problems, "the engine's files have changed since it was built", where=engine)
    return config


def _draft_shape(
    config: CheckpointConfig, engine: dict[str, Any], asked: DraftShape | None, where: Path
) -> DraftShape | None:
    if config.drafter is None or engine.get("draft") is None:
        if asked is not None:
            raise UsageError(
                "the engine has no drafter, so there is nothing to set beams or draft length for",
                where=where,
                remedy="leave --num-beams and --draft-len out, or convert with --drafter",
            )
        return None
    shape = asked or DraftShape(int(engine["draft"]["num_beams"]), int(engine["draft"]["draft_len"]))
    shape.check()
    return shape


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UsageError(f"{name!r} is not a device", remedy='use "cpu", "cuda" or "cuda:N"') from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise BackendError("no CUDA device can be used here", remedy="run with --device cpu, or check the driver")
    return device


def _make_executor(
    config: CheckpointConfig, weights: ModelWeights, limits: dict[str, Any], shape: DraftShape | None
) -> Executor:
    batch, tree = int(limits["max_batch_size"]), 1 if shape is None else shape.max_tree_tokens
    capacity = int(limits["max_seq_len"]) + tree
    config = replace(config, max_position_embeddings=max(config.max_position_embeddings, capacity))
    if unsupported_reason(config, weights) is None:
        try:
            return NativeExecutor(config, weights, max_batch_size=batch, capacity=capacity, max_rows=batch * tree)
        except NativeUnavailable:
            pass  # `build` and `run --stats` say which executor runs; the result is the same, only slower
    return TorchExecutor(config, weights, max_batch_size=batch, capacity=capacity)
