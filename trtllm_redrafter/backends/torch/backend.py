"""Build and load engines of the torch backend.

An engine is the checkpoint itself, hard-linked where the file system allows, beside the tokenizer and the limits it
was built for. Nothing in it depends on the machine; what does (the compiled kernels) is made in the user's cache.

    engine/
      config.json       backend, limits, rows of the draft head, end-of-text tokens
      manifest.json     what made it, from what, hashes
      tokenizer/        tokenizer, chat template, generation_config.json
      checkpoint/       config.json, rank{N}.safetensors, draft_vocab.safetensors
      draft_head_factor.safetensors   only where the drafter's LM head turned out to be of low rank
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from trtllm_redrafter.backends.base import BuildOptions, BuildPlan, EngineInfo
from trtllm_redrafter.backends.engine_config import (
    TORCH,
    EngineConfig,
    EngineLimits,
    read_engine_config,
)
from trtllm_redrafter.backends.tokenizer import engine_text
from trtllm_redrafter.backends.torch.build_plan import TorchBuildPlan, kv_cache_bytes, plan_build
from trtllm_redrafter.backends.torch.cuda.executor import CudaExecutor, cuda_unavailable
from trtllm_redrafter.backends.torch.cuda_graphs import GraphExecutor, GraphLimits
from trtllm_redrafter.backends.torch.drafting import device_steps, frequent_rows, load_drafter, make_search
from trtllm_redrafter.backends.torch.executor import ModelExecutor
from trtllm_redrafter.backends.torch.low_rank import find_factor, load_factor, save_factor
from trtllm_redrafter.backends.torch.native.compiled import NativeUnavailable
from trtllm_redrafter.backends.torch.native.executor import NativeExecutor
from trtllm_redrafter.backends.torch.runner import TorchRunner
from trtllm_redrafter.backends.torch.transformer import TorchExecutor
from trtllm_redrafter.backends.torch.weights import ModelWeights, load_weights
from trtllm_redrafter.base_models.tokenizer import tokenizer_files
from trtllm_redrafter.checkpoint.config import CheckpointConfig
from trtllm_redrafter.checkpoint.manifest import Manifest, record_tree
from trtllm_redrafter.checkpoint.names import DRAFT_VOCAB_FILE, ENGINE_CHECKPOINT, TOKENIZER_DIRECTORY, rank_file
from trtllm_redrafter.checkpoint.reader import Checkpoint
from trtllm_redrafter.checkpoint.structure import finite_problems, require_sound
from trtllm_redrafter.errors import BackendError, InputError, Problem, UsageError, limited, raise_together
from trtllm_redrafter.fsio import (
    as_output_error,
    atomic_directory,
    link_or_copy,
    write_json,
)
from trtllm_redrafter.memory import memory_for, physical_memory
from trtllm_redrafter.progress import Progress
from trtllm_redrafter.redrafter.config import DraftShape


class TorchBackend:
    """PyTorch on any machine, compiled kernels for bfloat16 on a CPU."""

    name = TORCH

    def plan(self, options: BuildOptions) -> TorchBuildPlan:
        """Check everything a build could fail on."""
        return plan_build(options)

    def build(self, plan: BuildPlan, progress: Progress, *, on_complete: Callable[[Path], None] | None = None) -> Path:
        """Write the engine directory; it appears complete or not at all."""
        assert isinstance(plan, TorchBuildPlan)
        options, source = plan.options, plan.options.checkpoint
        place = atomic_directory(options.output, overwrite=options.overwrite, on_complete=on_complete)
        with place as work, as_output_error(options.output):
            files = _checkpoint_files(plan.checkpoint)
            for done, name in enumerate(files):
                progress("build", done, len(files), "files")
                target = work / ENGINE_CHECKPOINT / name
                target.parent.mkdir(parents=True, exist_ok=True)
                link_or_copy(source / name, target)
            if plan.tokenizer is not None:
                _copy_tokenizer(plan.tokenizer, work / TOKENIZER_DIRECTORY)
            damaged = limited(list(finite_problems(plan.checkpoint)))
            raise_together(InputError, damaged, "the checkpoint cannot be used", where=source)
            factor = find_factor(plan.checkpoint) if plan.checkpoint.config.dtype == "bfloat16" else None
            if factor is not None:
                save_factor(factor, work)
            write_json(work / "config.json", plan.engine_config())
            manifest = _manifest(plan, work)
            _check_unchanged(plan.checkpoint, manifest)
            manifest.write(work)
            progress("build", len(files), len(files), "files")
        return options.output

    def load(
        self,
        engine: Path | EngineConfig,
        *,
        device: str,
        verify_hashes: bool,
        draft_shape: DraftShape | None = None,
        api: str | None = None,
        kv_cache_tokens: int | None = None,
    ) -> TorchRunner:
        """Load an engine on `device` ("cpu", "cuda", "cuda:1"). Sizes of all files are checked, hashes on request."""
        config = read_engine_config(engine, backend=TORCH)
        engine, limits = config.path, config.limits
        if api is not None:
            remedy = "leave --api out"
            raise UsageError("only TensorRT-LLM engines have a choice of interface", where=engine, remedy=remedy)
        del kv_cache_tokens  # the cache has the size the engine was built with
        _check_whole(engine, verify_hashes)
        checkpoint = Checkpoint.open(engine / ENGINE_CHECKPOINT)
        require_sound(checkpoint)
        _check_limits(limits, checkpoint, engine)
        shape = _draft_shape(checkpoint.config, draft_shape, engine)
        target = _device(device)
        tokenizer, ends = engine_text(
            engine,
            vocab_size=checkpoint.config.vocab_size,
            recorded=_recorded(checkpoint) if config.eos_token_ids is None else config.eos_token_ids,
        )
        with memory_for("the weights", why=str(target), remedy="use a device with more, or end what else runs on it"):
            weights = load_weights(checkpoint, target)
        executor, note = _make_executor(checkpoint.config, weights, limits, shape)
        drafting = None
        if shape is not None and checkpoint.config.drafter is not None:
            with memory_for("the drafter", why=str(target), remedy="build with a smaller --max-batch-size"):
                drafting = make_search(
                    load_drafter(checkpoint, checkpoint.config.drafter, target),
                    executor,
                    weights.embedding,
                    shape,
                    rows=frequent_rows(checkpoint.path, config.head_rows, checkpoint.config.vocab_size),
                    max_batch_size=limits.max_batch_size,
                    low_rank=load_factor(engine, weights.head, checkpoint.config.drafter.exit_dim),
                )
        info = EngineInfo(
            path=engine,
            backend=TORCH,
            device=f"{target} ({executor.name}: {executor.detail})",
            dtype=checkpoint.config.dtype,
            vocab_size=checkpoint.config.vocab_size,
            max_batch_size=limits.max_batch_size,
            max_input_len=limits.max_input_len,
            max_seq_len=limits.max_seq_len,
            draft_shape=shape,
        )
        notes = () if note is None else (note,)
        steps = device_steps(executor, drafting, limits.max_batch_size)
        return TorchRunner(info, executor, drafting, tokenizer, ends, notes, steps=steps)


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
        options=dict(config["build_config"]),
        derived={},
        files=record_tree(work),
    )


def _check_unchanged(checkpoint: Checkpoint, engine: Manifest) -> None:
    """The checkpoint's files are what its own manifest says: a damaged one must not get a fresh, matching hash."""
    if checkpoint.manifest is None:
        return
    problems = [
        Problem("the file's content has changed since the checkpoint was written", str(checkpoint.path / name))
        for name, record in checkpoint.manifest.files.items()
        if engine.files.get(f"{ENGINE_CHECKPOINT}/{name}", record).sha256 != record.sha256
    ]
    raise_together(InputError, problems, "the checkpoint is damaged", where=checkpoint.path, remedy="convert it again")


def _recorded(checkpoint: Checkpoint) -> object:
    """End tokens that the checkpoint's manifest keeps; engines of earlier versions have no list of their own."""
    return () if checkpoint.manifest is None else checkpoint.manifest.end_tokens


def _check_whole(engine: Path, verify_hashes: bool) -> None:
    """Are the engine's files those that were built?"""
    manifest = Manifest.read(engine)
    problems = manifest.check_files(engine, hashes=verify_hashes) or manifest.check_tokenizer(engine)
    raise_together(InputError, problems, "the engine's files have changed since it was built", where=engine)


def _check_limits(limits: EngineLimits, checkpoint: Checkpoint, engine: Path) -> None:
    """What `build` refuses, of an engine that was edited since."""
    positions = checkpoint.config.max_position_embeddings
    if limits.max_seq_len > positions or limits.max_input_len >= limits.max_seq_len:
        why = (
            f"max_input_len is {limits.max_input_len}, max_seq_len {limits.max_seq_len}; the model has "
            f"{positions} positions"
        )
        raise InputError("the engine's limits do not fit its model", where=engine, why=why, remedy="build it again")


def _draft_shape(config: CheckpointConfig, asked: DraftShape | None, where: Path) -> DraftShape | None:
    if config.draft_shape is None:
        if asked is not None:
            raise UsageError(
                "the engine has no drafter, so there is nothing to set beams or draft length for",
                where=where,
                remedy="leave --num-beams and --draft-len out, or convert with --drafter",
            )
        return None
    shape = asked or config.draft_shape
    shape.check()
    return shape


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UsageError(f"{name!r} is not a device", remedy='use "cpu", "cuda" or "cuda:N"') from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise BackendError("no CUDA device can be used here", remedy="run with --device cpu, or check the driver")
    if device.type == "cuda" and device.index is not None and device.index >= torch.cuda.device_count():
        known = ", ".join(f"cuda:{n}" for n in range(torch.cuda.device_count()))
        raise UsageError(f"there is no device {name!r}", remedy=f"use one of: {known}")
    return device


def _make_executor(
    config: CheckpointConfig, weights: ModelWeights, limits: EngineLimits, shape: DraftShape | None
) -> tuple[ModelExecutor, str | None]:
    """The kernels if they can be used, else PyTorch with the reason; and what to tell the user about it."""
    batch, tree = limits.max_batch_size, 1 if shape is None else shape.max_tree_tokens
    capacity = limits.max_seq_len + tree
    needed = kv_cache_bytes(config, batch, capacity)
    if not weights.embedding.is_cuda and needed > physical_memory():
        raise BackendError(
            "there is not enough memory for the KV cache",
            why=f"{batch} requests of {capacity} positions take {needed:,} bytes of {physical_memory():,} in all",
            remedy="build with a smaller --max-batch-size or --max-seq-len",
        )
    why = f"{batch} requests of {capacity} positions"
    with memory_for("the KV cache", why=why, remedy="build with a smaller --max-batch-size or --max-seq-len"):
        if weights.embedding.is_cuda:
            return _cuda_executor(config, weights, batch, capacity, shape), None
        try:
            native = NativeExecutor(config, weights, max_batch_size=batch, capacity=capacity, max_rows=batch * tree)
            return native, None
        except NativeUnavailable as unavailable:
            reason, note = str(unavailable), unavailable.note
        return TorchExecutor(config, weights, max_batch_size=batch, capacity=capacity, detail=reason), note


def _cuda_executor(
    config: CheckpointConfig, weights: ModelWeights, batch: int, capacity: int, shape: DraftShape | None
) -> ModelExecutor:
    """Our CUDA kernels; else graphs, with Triton kernels where the GPU has tensor cores for both 16-bit dtypes.

    float32 is for comparing, and computed as PyTorch does.
    """
    from torch.utils._triton import has_triton

    device = weights.embedding.device
    nodes, depth = (1, 0) if shape is None else (shape.max_tree_tokens, shape.draft_len)
    reason = cuda_unavailable(config, weights, nodes)
    if reason is None:
        return CudaExecutor(config, weights, max_batch_size=batch, capacity=capacity, max_nodes=nodes, detail="kernels")
    able = torch.cuda.get_device_capability(device) >= (8, 0)
    fused = config.dtype != "float32" and able and has_triton()
    limits = GraphLimits(batch, capacity, max_nodes=nodes, max_depth=depth)
    detail = f"{'Triton' if fused else 'PyTorch'} kernels, since {reason}"
    return GraphExecutor(config, weights, limits, fused=fused, detail=detail)
