"""`chat`: a conversation with an engine on the terminal, or line by line from a pipe."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from typing import Annotated

import typer

from trtllm_redrafter.backends.base import Runner
from trtllm_redrafter.cli import signals
from trtllm_redrafter.cli.console import note, say, say_generated, working
from trtllm_redrafter.cli.options import flag, flags, with_settings
from trtllm_redrafter.cli.run import RunReport, stats_table
from trtllm_redrafter.errors import UsageError
from trtllm_redrafter.prompts.messages import Message
from trtllm_redrafter.run.jobs import Job, RunSummary
from trtllm_redrafter.run.session import defaults_for, open_runner, run_jobs
from trtllm_redrafter.settings import Layer, resolve
from trtllm_redrafter.settings.schema import RunSection

_NOT_HERE = ("prompts", "input", "output", "chat")
HELP = """\
/stats    speed and acceptance so far
/reset    forget the conversation
/undo     forget the last question and its answer
/quit     end; so does the end of input
Ctrl-C    stop an answer; between answers, end"""


@with_settings(
    flag("engine", required=True),
    *flags(
        "run",
        *(name for name in RunSection.model_fields if name not in _NOT_HERE),
        stop_token_ids="--stop-token-id",
        skip_special_tokens="--skip-special-tokens/--keep-special-tokens",
    ),
    flag("chat_template_kwargs"),
    flag("tensorrt_llm.api"),
    flag("tensorrt.executor"),
)
def chat(
    given: list[Layer],
    system: Annotated[
        str | None, typer.Option("--system", help="A system message before the first question.", show_default=False)
    ] = None,
    stats: Annotated[bool, typer.Option("--stats", help="Show speed and acceptance after each answer.")] = False,
) -> None:
    """Talk to an engine, turn by turn."""
    resolved = resolve(given)
    with working("loading the engine"):
        runner = open_runner(resolved, verify_hashes=False)
    try:
        if not runner.has_chat_template:
            remedy = "use `run` with --prompt for a model that continues texts"
            raise UsageError("the engine has no chat template", where=runner.info.path, remedy=remedy)
        for text in runner.notes:
            note(f"note: {text}")
        conversation = Conversation(runner, defaults_for(resolved, runner), system)
        if sys.stdin.isatty():
            note(HELP)
        for line in _lines():
            if line.startswith("/"):
                if not conversation.obey(line):
                    break
            elif line.strip():
                conversation.ask(line)
                if stats:
                    note(conversation.stats())
    finally:
        runner.close()


class Conversation:
    """What was said so far, and what it took."""

    def __init__(self, runner: Runner, defaults: Job, system: str | None) -> None:
        self._runner, self._defaults = runner, defaults
        self._before: list[Message] = [] if system is None else [{"role": "system", "content": system}]
        self._said: list[Message] = []
        self._report = RunReport(runner.info, RunSummary(), None)

    def ask(self, question: str) -> None:
        """Stream the answer; a question that gets none, or whose answer is interrupted, is forgotten."""
        messages: tuple[Message, ...] = (*self._before, *self._said, {"role": "user", "content": question})
        turn = len(self._said) // 2 + 1
        job = replace(
            self._defaults, job_id=f"turn-{turn}", where=f"turn {turn}",
            prompt=replace(self._defaults.prompt, content=messages, chat=True),
        )  # fmt: skip
        try:
            (done,) = run_jobs(
                self._runner, [job], one_by_one=True,
                on_update=lambda _, update: say_generated(update.text, end=update.result is not None),
            )  # fmt: skip
        except KeyboardInterrupt:
            if not sys.stdin.isatty():
                raise
            signals.forget()
            say()
            note("interrupted; the question is forgotten")
            return
        self._report.summary.add_job(done)
        if done.error is not None or done.result is None:
            if done.error is not None:
                note(done.error.render())
            return
        self._said += [messages[-1], {"role": "assistant", "content": done.result.text}]

    def obey(self, command: str) -> bool:
        """Carry out a command; False if it ends the conversation."""
        word = command.split()[0]
        if word == "/quit":
            return False
        if word == "/stats":
            note(self.stats())
        elif word == "/reset":
            self._said.clear()
        elif word == "/undo":
            del self._said[-2:]
        else:
            note(HELP if word == "/help" else f"{word} is none of the commands\n{HELP}")
        return True

    def stats(self) -> str:
        return stats_table(self._report)


def _lines() -> Iterator[str]:
    """Questions and commands, one a line; on a terminal with a prompt and what readline brings."""
    if not sys.stdin.isatty():
        for line in sys.stdin:
            yield line.rstrip("\n")
        return
    with suppress(ImportError):
        import readline  # noqa: F401  (line editing and history for input)
    while True:
        try:
            yield input("> ")
        except EOFError:
            say()
            return
