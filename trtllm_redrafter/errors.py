"""The one exception tree: every failure a user can cause says what, where, why, and the remedy.

The pure core raises, adapters raise, and `cli` alone turns an error into text and an exit code. A class
stands for a *kind* of failure with its own exit code, so that scripts can tell "your option is wrong" from
"the files do not fit each other" without reading prose.

    raise InputError("header is longer than the file", where=path, why="8 + 912 > 400 bytes",
                     remedy="download the shard again")
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

SomeError = TypeVar("SomeError", bound="RedrafterError")


def brief(value: Any) -> str:
    """A value for an error message, shortened if it is long."""
    try:
        text = repr(value)
    except ValueError:  # an integer with more digits than Python converts
        return "a number of thousands of digits"
    return text if len(text) <= 60 else f"{text[:40]}… ({len(text)} characters)"


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong. Validation collects these and reports them together."""

    what: str
    where: str | None = None
    why: str | None = None
    remedy: str | None = None

    def render(self) -> str:
        head = f"{self.where}: {self.what}" if self.where else self.what
        lines = [head]
        if self.why:
            lines.append(f"  why: {self.why}")
        if self.remedy:
            lines.append(f"  remedy: {self.remedy}")
        return "\n".join(lines)

    def bullet(self) -> str:
        """The same as an entry of a list."""
        return "- " + self.render().replace("\n", "\n  ")

    def as_dict(self) -> dict[str, str | None]:
        return {"what": self.what, "where": self.where, "why": self.why, "remedy": self.remedy}


class RedrafterError(Exception):
    """Base of every user-facing failure; carries one or more `Problem`s and an exit code."""

    exit_code = 1
    kind = "error"

    def __init__(
        self,
        what: str,
        *,
        where: str | Path | None = None,
        why: str | None = None,
        remedy: str | None = None,
        problems: Sequence[Problem] = (),
    ) -> None:
        self.problem = Problem(what, None if where is None else str(where), why, remedy)
        self.problems: tuple[Problem, ...] = tuple(problems)
        self.results: tuple[object, ...] = ()
        """Results of a batch in which this request failed, in the requests' order (`Runner.generate`)."""
        super().__init__(self.render())

    def render(self) -> str:
        return "\n".join([self.problem.render(), *(problem.bullet() for problem in self.problems)])

    def at(self: SomeError, where: str | Path) -> SomeError:
        """The same error with the place that only its caller knows."""
        p = self.problem
        return type(self)(p.what, where=where, why=p.why, remedy=p.remedy, problems=self.problems)

    def as_dict(self) -> dict[str, object]:
        """The `error` object of a `--json` document."""
        return {
            "kind": self.kind,
            "exit_code": self.exit_code,
            **self.problem.as_dict(),
            "problems": [p.as_dict() for p in self.problems],
        }


class UsageError(RedrafterError):
    """An option, a recipe key or a combination of them is not valid."""

    exit_code = 2
    kind = "usage"


class InputError(RedrafterError):
    """A file the user named is missing, unreadable, truncated or not what it should be."""

    exit_code = 3
    kind = "input"


class MismatchError(RedrafterError):
    """Inputs are valid one by one, but do not fit each other or the options."""

    exit_code = 4
    kind = "mismatch"


class OutputError(RedrafterError):
    """The result cannot be written: exists already, disk full, no permission."""

    exit_code = 5
    kind = "output"


class BackendError(RedrafterError):
    """This backend or this machine cannot do what was asked."""

    exit_code = 6
    kind = "backend"


class RequestError(RedrafterError):
    """A generation request is not valid for the engine (too long, negative temperature, ...)."""

    exit_code = 7
    kind = "request"


class VerificationError(RedrafterError):
    """`verify` or a parity gate found a difference."""

    exit_code = 8
    kind = "verification"


class NumericalError(RedrafterError):
    """A model computed NaN or infinity: damaged weights, or numbers beyond the dtype's range."""

    exit_code = 9
    kind = "numerical"


def not_finite(what: str, dtype: object, *, where: str | Path | None = None) -> NumericalError:
    """`what` ("the logits after 3 tokens") is NaN or infinite; the remedy depends on the dtype it was computed in.

    `dtype` is torch's, or its name.
    """
    dtype = str(dtype).removeprefix("torch.")
    if dtype == "float16":
        why = "float16 ends at 65504, which the activations of some models exceed; or weights are damaged"
        remedy = "use bfloat16 (convert with --dtype bfloat16); if that fails too, download the model again"
    else:
        why = f"{dtype} holds what models compute, so a weight is most likely NaN, infinite or far too large"
        remedy = "download and convert the model again (`verify CHECKPOINT --against BASE` compares the values)"
    return NumericalError(f"{what} are not finite numbers", where=where, why=why, remedy=remedy)


MAX_LISTED = 12
"""Problems of one kind that are listed; a wrong config.json makes every layer wrong in the same way."""


def limited(problems: list[Problem]) -> list[Problem]:
    """The first few, and how many more."""
    if len(problems) <= MAX_LISTED:
        return problems
    return [*problems[:MAX_LISTED], Problem(f"and {len(problems) - MAX_LISTED} more problems like these")]


def raise_together(
    error: type[RedrafterError],
    problems: Sequence[Problem],
    what: str,
    *,
    where: str | Path | None = None,
    remedy: str | None = None,
) -> None:
    """Raise `error` when there are problems: a single one as itself, several as a list under `what`."""
    if not problems:
        return
    if len(problems) == 1:
        p = problems[0]
        raise error(p.what, where=p.where or where, why=p.why, remedy=p.remedy or remedy)
    raise error(what, where=where, remedy=remedy, problems=problems)
