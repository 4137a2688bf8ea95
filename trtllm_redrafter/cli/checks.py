"""Commands that write nothing: `inspect` and `verify` a directory, `plan` a recipe, `doctor` for this machine."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from trtllm_redrafter.cli.console import emit, note, progress_bar, say, working
from trtllm_redrafter.cli.options import Json, flag, with_settings
from trtllm_redrafter.errors import BackendError, VerificationError
from trtllm_redrafter.settings import Layer, file_layers, resolve

if TYPE_CHECKING:
    from trtllm_redrafter.verify.files import VerifyReport


def inspect(
    path: Annotated[Path, typer.Argument(help="Base model, drafter, checkpoint, engine or .safetensors file.")],
    as_json: Json = False,
) -> None:
    """Say what PATH is: settings, table of tensors, provenance. Reads headers only."""
    from trtllm_redrafter.verify.inspect import inspect as look_at

    found = look_at(path)
    say(found.render())
    if as_json:
        emit("inspect", **found.as_dict())


@with_settings(flag("run.max_tokens"))
def verify(
    given: list[Layer],
    path: Annotated[Path, typer.Argument(help="Checkpoint or engine directory.")],
    against: Annotated[
        Path | None,
        typer.Option(
            "--against",
            help="Hugging Face directory to compare values, greedy tokens and logits with; or a checkpoint.",
        ),
    ] = None,
    drafter: Annotated[
        Path | None, typer.Option("--drafter", help="Drafter directory to compare the drafter's values with.")
    ] = None,
    reference: Annotated[
        Path | None,
        typer.Option(
            "--reference", help="Checkpoint whose tokens and acceptance the engine must reproduce (parity gate)."
        ),
    ] = None,
    prompt: Annotated[
        list[str] | None,
        typer.Option("--prompt", help="Text for --reference; repeatable. (default: four built-in)"),
    ] = None,
    min_acceptance: Annotated[
        float | None, typer.Option("--min-acceptance", help="With --reference: fail below this many tokens per step.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Check hashes, names, shapes and dtypes; with --against and --drafter, values and what is computed too.

    With --reference: run the engine and compare its config, weights, tokens, logits, drafter and acceptance with its
    checkpoint's, as far as the engine shows them.
    """
    if reference is not None:
        run = resolve(given).recipe.run
        _gate(path, reference, tuple(prompt or ()), run.max_tokens, min_acceptance, device=run.device, as_json=as_json)
        return
    from trtllm_redrafter.verify.weights import verify as run_checks

    with progress_bar() as progress:
        report = run_checks(path, against=against, drafter=drafter, hashes=True, progress=progress)
    if against is not None and report.ok:
        _compare_greedy_tokens(report, path, against)
    if report.ok:
        say(report.render())
    else:
        note(report.render())
    if as_json:
        error = None if report.ok else VerificationError(f"{len(report.problems)} problem(s)", where=path).as_dict()
        emit("verify", **report.as_dict(), error=error)
    if not report.ok:
        raise typer.Exit(VerificationError.exit_code)


def _gate(
    engine: Path, reference: Path, prompts: tuple[str, ...], max_tokens: int, floor: float | None, *, device: str,
    as_json: bool,
) -> None:  # fmt: skip
    from trtllm_redrafter.backends import torch_device
    from trtllm_redrafter.backends.engine_config import TORCH, engine_backend
    from trtllm_redrafter.verify.gate import PROMPTS, GateRequest, parity_gate

    device = torch_device() if engine_backend(engine) == TORCH else device
    with working("running the engine and its reference"):
        report = parity_gate(GateRequest(engine, reference, prompts or PROMPTS, max_tokens, floor, device))
    (say if report.ok else note)(report.render())
    if as_json:
        error = None if report.ok else VerificationError("the parity gate failed", where=engine).as_dict()
        emit("verify", **report.as_dict(), error=error)
    if not report.ok:
        raise typer.Exit(VerificationError.exit_code)


def _compare_greedy_tokens(report: VerifyReport, path: Path, against: Path) -> None:
    """Add what decoding a few prompts shows; only worth it when files and values are right."""
    from trtllm_redrafter.verify.tokens import can_compare, greedy_parity

    reason = can_compare(path, against)
    if reason is not None:
        report.notes.append(reason)
        return
    with working("comparing greedy tokens and logits with transformers"):
        parity = greedy_parity(path, against)
    report.checks += parity.checks()
    report.problems += parity.problems


@with_settings()
def plan(
    given: list[Layer],
    recipe: Annotated[Path, typer.Argument(help="YAML recipe, as configs/llama-3.1-8b.yaml.")],
    as_json: Json = False,
) -> None:
    """Show flags, memory and step times of a recipe on its GPU; needs no GPU and no weights."""
    from trtllm_redrafter.run.hardware_plan import plan_recipe

    resolved = resolve([*file_layers(recipe), *given])
    report = plan_recipe(resolved, name=recipe.stem)
    say(report.render())
    if as_json:
        emit("plan", recipe=recipe, **report.as_dict())


@with_settings()
def doctor(
    given: list[Layer],
    recipe: Annotated[Path | None, typer.Argument(help="Also check what this recipe needs.")] = None,
    as_json: Json = False,
) -> None:
    """Check versions, GPU, driver, MPI, disk and memory; exit code 6 when the backend asked for cannot be used."""
    from trtllm_redrafter.doctor import examine
    from trtllm_redrafter.run.hardware_plan import machine_needs

    resolved = resolve([*(file_layers(recipe) if recipe is not None else []), *given])
    needs = None if recipe is None else machine_needs(resolved, name=recipe.stem)
    report = examine(needs)
    say(report.render())
    able = report.serves(resolved.recipe.backend)
    if as_json:
        emit("doctor", backend=resolved.recipe.backend, able=able, **report.as_dict())
    if not able:
        raise typer.Exit(BackendError.exit_code)
