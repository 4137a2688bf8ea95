"""The command-line program: commands by name, errors by kind.

Commands are thin: they parse, call one function of a room and print. Whatever they raise ends here, as a message
that says what, where, why and the remedy, with the exit code of its kind; a traceback is shown with --debug only.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Annotated, Any

import typer

from trtllm_redrafter import __version__
from trtllm_redrafter.cli import console, signals
from trtllm_redrafter.cli.bench import bench
from trtllm_redrafter.cli.build import build
from trtllm_redrafter.cli.convert import convert
from trtllm_redrafter.cli.doctor import doctor
from trtllm_redrafter.cli.evaluate import evaluate
from trtllm_redrafter.cli.inspect import inspect
from trtllm_redrafter.cli.pipeline import pipeline
from trtllm_redrafter.cli.plan import plan
from trtllm_redrafter.cli.run import run
from trtllm_redrafter.cli.train import train
from trtllm_redrafter.cli.tune import tune
from trtllm_redrafter.cli.verify import verify
from trtllm_redrafter.errors import RedrafterError, UsageError

PROGRAM = "trtllm-redrafter"

app = typer.Typer(
    name=PROGRAM,
    help="ReDrafter speculative decoding with TensorRT-LLM, and anywhere with PyTorch.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
for command in (convert, build, run, pipeline, inspect, verify, plan, doctor, train, evaluate, bench, tune):
    app.command()(command)


def _show_version(value: bool) -> None:
    if value:
        console.say(f"{PROGRAM} {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", help="Show the version.", callback=_show_version, is_eager=True)
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks; works behind any command too.")] = False,
) -> None:
    pass


def run_app(arguments: Sequence[str]) -> int:
    """Run the program on `arguments` and return its exit code."""
    console.show_warnings()
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # spinning threads cost 10-40x on a busy machine
    args = [a for a in arguments if a != "--debug"]
    command = next((a for a in args if not a.startswith("-")), "")
    how: dict[str, Any] = {"as_json": "--json" in args, "debug": len(args) < len(arguments)}
    try:
        code = app(args, prog_name=PROGRAM, standalone_mode=False)
    except RedrafterError as error:
        return console.report_error(command, error, **how)
    except (KeyboardInterrupt, typer.Abort):
        return console.report_interrupt(command, as_json=how["as_json"])
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the reader left: nothing more to say
        return 1
    except Exception as error:  # noqa: BLE001 - the edge: a bug must end in a message and an exit code too
        if signals.exit_code() is not None:
            return console.report_interrupt(command, as_json=how["as_json"])
        message = getattr(error, "format_message", None)  # typer's own, of an option it cannot parse
        if message is None:
            return console.report_crash(command, error, **how)
        remedy = f"`{PROGRAM} {command} --help` lists the options"
        return console.report_error(command, UsageError(str(message()), remedy=remedy), **how)
    if code == console.INTERRUPTED:  # typer returns this for Ctrl-C instead of raising
        return console.report_interrupt(command, as_json=how["as_json"])
    return code if isinstance(code, int) else 0


def main() -> None:
    """The console script."""
    signals.listen()
    console.accept_all_text()
    sys.exit(run_app(sys.argv[1:]))
