"""The command-line program: commands by name, errors by kind.

Commands are thin: they parse, call one function of a package and print. Whatever they raise ends here, as a message
that says what, where, why and the remedy, with the exit code of its kind; a traceback is shown with --debug only.
"""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Sequence
from typing import Annotated, Any

import typer

from trtllm_redrafter.cli import console, signals
from trtllm_redrafter.cli.bench import bench, tune
from trtllm_redrafter.cli.chat import chat
from trtllm_redrafter.cli.checks import doctor, inspect, plan, verify
from trtllm_redrafter.cli.run import run
from trtllm_redrafter.cli.stages import build, convert, pipeline
from trtllm_redrafter.cli.train import evaluate, train
from trtllm_redrafter.errors import BackendError, OutputError, RedrafterError, UsageError
from trtllm_redrafter.memory import address_space_limit, is_out_of_memory
from trtllm_redrafter.paths import explain_os_error
from trtllm_redrafter.version import __version__

PROGRAM = "trtllm-redrafter"

app = typer.Typer(
    name=PROGRAM,
    help="ReDrafter speculative decoding with TensorRT-LLM, and anywhere with PyTorch.",
    no_args_is_help=True,
    rich_markup_mode=None,  # its tables cut the names of flags off at 80 columns
    pretty_exceptions_enable=False,
    add_completion=False,
)
for command in (convert, build, run, chat, pipeline, inspect, verify, plan, doctor, train, evaluate, bench, tune):
    app.command(short_help=(command.__doc__ or "").partition("\n")[0])(command)


def _show_version(value: bool) -> None:
    if value:
        console.say(f"{PROGRAM} {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", help="Show the version.", callback=_show_version, is_eager=True)
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks; also accepted after any command.")] = False,
) -> None:
    pass


def run_app(arguments: Sequence[str]) -> int:
    """Run the program on `arguments` and return its exit code."""
    console.show_warnings()
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # spinning threads cost 10-40x on a busy machine
    args = [a for a in arguments if a != "--debug"]
    command = next((a for a in args if not a.startswith("-")), "")
    how: dict[str, Any] = {"as_json": "--json" in args, "debug": len(args) < len(arguments)}
    too_small = address_space_limit()
    if too_small is not None:
        return console.report_error(command, _not_enough_memory(f"`ulimit -v` allows {too_small:,} bytes"), **how)
    try:
        code = app(args, prog_name=PROGRAM, standalone_mode=False)
    except RedrafterError as error:
        if signals.caused(error):
            return console.report_interrupt(command, as_json=how["as_json"])
        return console.report_error(command, error, **how)
    except (KeyboardInterrupt, typer.Abort):
        return console.report_interrupt(command, as_json=how["as_json"])
    except BrokenPipeError:
        _silence_stdout()  # the reader closed the pipe
        return 1
    except Exception as error:  # noqa: BLE001 - the edge: a bug must end in a message and an exit code too
        if signals.exit_code() is not None:
            return console.report_interrupt(command, as_json=how["as_json"])
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:  # files say so themselves: this is stdout
            _silence_stdout()
            remedy = "free some space, or send the output elsewhere"
            return console.report_error(command, OutputError("the disk is full", why=str(error), remedy=remedy), **how)
        known = _explained(error)
        if known is not None:
            return console.report_error(command, known, **how)
        message = getattr(error, "format_message", None)  # typer's own, of an option it cannot parse
        if message is None:
            return console.report_crash(command, error, **how)
        remedy = f"`{PROGRAM} {command} --help` lists the options"
        return console.report_error(command, UsageError(str(message()), remedy=remedy), **how)
    if code == console.INTERRUPTED:  # typer returns this for Ctrl-C instead of raising
        return console.report_interrupt(command, as_json=how["as_json"])
    return code if isinstance(code, int) else 0


def _explained(error: Exception) -> RedrafterError | None:
    """Out of memory, or a path that cannot be used, as one of our errors; None for a bug."""
    if is_out_of_memory(error):
        return _not_enough_memory(f"{type(error).__name__}: {str(error)[:200]}")
    return explain_os_error(error) if isinstance(error, OSError) else None


def _not_enough_memory(why: str) -> BackendError:
    remedy = "end other programs, raise the limit (`ulimit -v`, container, job), or use a smaller model or batch"
    return BackendError("there is not enough memory", why=why, remedy=remedy)


def _silence_stdout() -> None:
    """Keep output that is still buffered from failing again when the program ends."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def main() -> None:
    """The console script."""
    signals.listen()
    console.accept_all_text()
    try:
        code = run_app(sys.argv[1:])
    except KeyboardInterrupt:  # while something else was being reported
        code = signals.exit_code() or console.INTERRUPTED
    signals.rest()
    sys.exit(code)
