"""Open an engine as a recipe's `run` section asks for, and give prompts their defaults from it."""

from __future__ import annotations

from pathlib import Path

from trtllm_redrafter.backends import load_backend, torch_device
from trtllm_redrafter.backends.base import Runner
from trtllm_redrafter.backends.engine_config import TORCH, read_engine_config
from trtllm_redrafter.checkpoint.manifest import Manifest
from trtllm_redrafter.checkpoint.names import ENGINE_CHECKPOINT
from trtllm_redrafter.errors import UsageError
from trtllm_redrafter.prompts.messages import Prompt
from trtllm_redrafter.redrafter.config import DraftShape
from trtllm_redrafter.run.jobs import Job
from trtllm_redrafter.run.options import draft_shape, require, sampling_params
from trtllm_redrafter.settings.layers import Resolved


def open_runner(resolved: Resolved, *, verify_hashes: bool) -> Runner:
    """Load the recipe's engine with the backend it was built for."""
    require(resolved, {"engine": "--engine"}, "a run")
    engine, run = resolved.recipe.engine, resolved.recipe.run
    assert engine is not None
    config = read_engine_config(engine)
    backend = config.backend
    if not resolved.is_default("backend") and resolved.recipe.backend != backend:
        raise UsageError(
            f"the engine was built for the {backend} backend",
            where=engine,
            why=f"{resolved.recipe.backend} was asked for ({resolved.origins['backend'].render()})",
            remedy=f"use --backend {backend}, or build an engine for {resolved.recipe.backend}",
        )
    shape = draft_shape(resolved, config.draft_shape)
    if shape is not None:
        _check_horizon(engine, shape)
    device = torch_device(run.device) if backend == TORCH else run.device  # a TensorRT engine finds its GPUs itself
    return load_backend(backend).load(
        config, device=device, verify_hashes=verify_hashes, draft_shape=shape, api=_chosen_api(resolved, backend)
    )


def _chosen_api(resolved: Resolved, backend: str) -> str | None:
    """None: as the engine was built. A recipe's section for the other backend is no mistake, a flag is."""
    is_flag = resolved.origins["tensorrt_llm.api"].kind == "flag"
    return resolved.recipe.tensorrt_llm.api if is_flag or backend != TORCH else None


def defaults_for(resolved: Resolved, runner: Runner) -> Job:
    """A job without a text: what the recipe says for all. Chat follows the engine's template when nobody chose."""
    run = resolved.recipe.run
    chat = runner.has_chat_template if run.chat is None else run.chat
    prompt = Prompt("", chat=chat, template_kwargs=resolved.recipe.chat_template_kwargs)
    return Job("", "", prompt, sampling_params(resolved), run.draft)


def _check_horizon(engine: Path, shape: DraftShape) -> None:
    """A drafter is not asked to look further ahead than it was trained for; the checkpoint's manifest says how far."""
    manifest = Manifest.find(engine / ENGINE_CHECKPOINT)
    trained = None if manifest is None else manifest.trained_draft_len
    if trained is not None and shape.draft_len > trained:
        raise UsageError(
            f"draft_len is {shape.draft_len}",
            where="--draft-len",
            why=f"the drafter was trained for {trained}",
            remedy=f"use at most {trained}",
        )
