"""`plan`: what a recipe will need and cost on its GPU, before anything is downloaded, converted or rented.

report = plan_recipe(resolved, name="llama-3.1-8b")
print(report.render())        # values and origins, flags, memory, step times and break-even
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from trtllm_redrafter.backends.base import BuildOptions
from trtllm_redrafter.backends.engine_config import TENSORRT, TENSORRT_STEPS
from trtllm_redrafter.backends.tensorrt.compilers import choose_compiler, compile_bytes
from trtllm_redrafter.backends.tensorrt_llm.build_plan import TensorRTLLMBuildPlan, plan_for
from trtllm_redrafter.checkpoint.config import CheckpointConfig
from trtllm_redrafter.checkpoint.manifest import Manifest
from trtllm_redrafter.checkpoint.names import DRAFTER_WEIGHTS
from trtllm_redrafter.doctor import Needs
from trtllm_redrafter.errors import InputError, MismatchError, Problem, UsageError, raise_together
from trtllm_redrafter.planning.acceptance import MeasuredAcceptance, read_acceptance
from trtllm_redrafter.planning.gpus import gpu
from trtllm_redrafter.planning.latency import Assumptions, LatencyEstimate, estimate_latency
from trtllm_redrafter.planning.memory import weight_bytes
from trtllm_redrafter.planning.model import PlannedModel, checkpoint_model, planned_model
from trtllm_redrafter.run.options import (
    complete_build_options,
    convert_options,
    tensorrt_llm_options,
    with_directories,
    with_limits,
)
from trtllm_redrafter.settings.layers import Resolved
from trtllm_redrafter.settings.values import fill

SLIMMER_HELPS = 0.95
"""Break-even relative to now below which a slimmer drafter is worth naming."""


@dataclass(frozen=True)
class RecipePlan:
    """A resolved recipe and what follows from it."""

    resolved: Resolved
    model: PlannedModel
    build: TensorRTLLMBuildPlan
    latency: LatencyEstimate
    acceptance: MeasuredAcceptance | None
    """Where the latency plan's acceptance length was read from; None where a number or nothing was given."""

    def render(self) -> str:
        notes = [f"note: {note}" for note in self.model.notes]
        backend = self.resolved.recipe.backend
        if backend != TENSORRT:
            notes.append(f"note: the recipe's backend is {backend}; this plans the same checkpoint for tensorrt-llm")
        if backend == TENSORRT_STEPS:
            notes.append(f"note: {self._compiler_note()}")
        values = self.resolved.render("", "convert", "build", "tensorrt_llm", "plan")
        measured = [] if self.acceptance is None else ["  " + self.acceptance.render()]
        return "\n".join([values, "", *notes, "", self.build.render(), "", self.latency.render(), *measured])

    def _compiler_note(self) -> str:
        """What compiles the recipe's engine where its backend is tensorrt; `MismatchError` where nothing does."""
        recipe, config = self.resolved.recipe, self.model.config
        compiler = choose_compiler(gpu(recipe.tensorrt_llm.gpu), config.dtype, recipe.tensorrt.compiler)
        where = "on that GPU itself" if compiler.capabilities is None else "on any machine"
        size = compile_bytes(config.num_hidden_layers) / 1e9
        return f"{compiler.name} compiles it {where}, one network at a time, each with about {size:.1f} GB of memory"

    def as_dict(self) -> dict[str, Any]:
        return {
            "values": self.resolved.as_dict(),
            "notes": list(self.model.notes),
            "build": self.build.as_dict(),
            "latency": self.latency.as_dict(),
            "acceptance": None if self.acceptance is None else self.acceptance.as_dict(),
        }


def plan_recipe(resolved: Resolved, *, name: str) -> RecipePlan:
    """Plan the recipe for the GPU it names; raises every refusal a build would."""
    resolved = with_directories(resolved, name=name)
    model = recipe_model(resolved)
    resolved = with_limits(resolved, model.config.max_position_embeddings)
    build = plan_for(model.config, tensorrt_llm_build_options(resolved))
    accepted, measured, notes = _acceptance(resolved, model)
    limits = build.flags.limits
    latency = estimate_latency(
        model.config,
        build.target,
        assumptions(resolved, limits.max_seq_len),
        max_batch_size=limits.max_batch_size,
        acceptance_length=accepted,
    )
    model = replace(model, notes=(*model.notes, *notes))
    return RecipePlan(resolved, model, build, latency, measured)


def dear_search(resolved: Resolved, config: CheckpointConfig) -> str | None:
    """What to say of a drafter whose search would take much of a step of TensorRT-LLM; None where it would not."""
    if config.drafter is None:
        return None
    target = gpu(resolved.recipe.tensorrt_llm.gpu)
    taken = assumptions(resolved, min(2048, config.max_position_embeddings))
    latency = estimate_latency(config, target, taken, max_batch_size=1, acceptance_length=None)
    row, slimmer = latency.rows[0], latency.slimmer
    if not row.dear:
        return None
    text = (
        f"warning: planned for TensorRT-LLM on one {target.title}, the drafter's search takes {row.draft_ms:.2f} ms "
        f"beside a plain step of {row.plain_ms:.2f} ms, so drafting pays from {row.break_even:.2f} tokens per step"
    )
    best = slimmer[min(1, len(slimmer) - 1)] if slimmer else None
    if best is not None and best.row.break_even < SLIMMER_HELPS * row.break_even:
        text += (
            f"; with an exit_dim of {best.exit_dim} instead of {config.drafter.exit_dim} (another training) it would "
            f"pay from {best.row.break_even:.2f}"
        )
    return text


def _acceptance(
    resolved: Resolved, model: PlannedModel
) -> tuple[float | None, MeasuredAcceptance | None, tuple[str, ...]]:
    """The acceptance length, the report it is from, and how its measurement differs from what is planned."""
    given, shape = resolved.recipe.plan.acceptance_length, model.config.draft_shape
    if given is None or shape is None:
        return None, None, ()
    if isinstance(given, Path):
        found = read_acceptance(given, shape)
        return found.acceptance_length, found, _check_measured(found, resolved, model)
    if given > shape.draft_len + 1:
        why = f"a step emits at most {shape.draft_len} drafted tokens and the guaranteed one"
        remedy = "use the acceptance length that `evaluate` reports for this draft length"
        raise UsageError(f"plan.acceptance_length is {given}", why=why, remedy=remedy)
    return given, None, ()


def _check_measured(found: MeasuredAcceptance, resolved: Resolved, model: PlannedModel) -> tuple[str, ...]:
    """Check that the report is of this base model and drafter, by content if known, else by name; returns notes."""
    problems, notes, config = [], [], model.config
    same = _same_drafter(found.drafter_sha256, resolved.recipe.drafter)
    if same is False:
        problems.append(Problem("the drafter has changed since it was evaluated", str(resolved.recipe.drafter)))
    for key, theirs, mine in (
        ("base", found.base, resolved.recipe.base),
        ("drafter", found.drafter, resolved.recipe.drafter),
    ):
        if theirs is None or mine is None or theirs.lower() == mine.name.lower():
            continue
        if key == "drafter" and same is not None:
            continue
        if key == "base" and config.quant_algo and mine.name.lower().startswith(theirs.lower()):
            notes.append(f"the acceptance length was measured on {theirs}, before quantization")
            continue
        problems.append(Problem(f"the report's {key} is {theirs}, the recipe's is {mine.name}"))
    raise_together(
        MismatchError, problems, "the acceptance length was measured on another model", where=found.path,
        remedy="run `evaluate` on this one; where a directory was only renamed, give the number itself",
    )  # fmt: skip
    if found.drafted_from is not None and found.drafted_from < config.vocab_size:
        notes.append(
            f"the acceptance length was measured drafting from {found.drafted_from} of {config.vocab_size} tokens; "
            "TensorRT-LLM drafts from all"
        )
    return tuple(notes)


def _same_drafter(measured: str | None, drafter: Path | None) -> bool | None:
    """Are these the weights that were measured, by the drafter's manifest? None: not known. Nothing is hashed here."""
    manifest = None if measured is None or drafter is None else Manifest.find(drafter)
    record = None if manifest is None else manifest.files.get(DRAFTER_WEIGHTS)
    return None if record is None else record.sha256 == measured


def recipe_model(resolved: Resolved) -> PlannedModel:
    """What converting the recipe's base and drafter would write; without a base, the recipe's checkpoint."""
    recipe = resolved.recipe
    if recipe.base is not None:
        return planned_model(convert_options(resolved, overwrite=False))
    if recipe.checkpoint is None or not (recipe.checkpoint / "config.json").is_file():
        raise InputError("there is nothing to plan for", why="neither base nor checkpoint", remedy="set `base`")
    return checkpoint_model(recipe.checkpoint)


def assumptions(resolved: Resolved, max_seq_len: int) -> Assumptions:
    """What the latency plan takes as given; `max_seq_len` is the engine's, in tokens."""
    section = resolved.recipe.plan
    return fill(Assumptions, section, context_len=section.context_len or max(1, max_seq_len // 2))


def tensorrt_llm_build_options(resolved: Resolved) -> BuildOptions:
    """For TensorRT-LLM, whatever backend the recipe names."""
    return complete_build_options(resolved, TENSORRT, tensorrt_llm_options(resolved), overwrite=False)


def machine_needs(resolved: Resolved, *, name: str) -> Needs:
    """What the recipe asks of the host that builds it, for `doctor`."""
    resolved = with_directories(resolved, name=name)
    model = recipe_model(resolved)
    weights = weight_bytes(model.config).total
    recipe = resolved.recipe
    assert recipe.engine is not None
    workers = min(recipe.tensorrt_llm.workers, model.config.tp_size)
    return Needs(
        version=recipe.tensorrt_llm.version,
        gpu=recipe.tensorrt_llm.gpu,
        ranks=model.config.tp_size,
        output=recipe.engine,
        disk_bytes=2 * weights * model.config.tp_size,
        workers=workers,
        host_bytes=2 * weights * workers,
    )
