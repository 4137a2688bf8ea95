"""Files of prompts and texts, line by line: what a command makes of each line, and which lines it cannot use.

for number, job in parse_lines(read_lines(path), path, parse): ...     # a job, or the error of that line alone
prompts = parse_all(read_lines(path), path, parse)                     # or one `InputError` with every bad line
"""

from __future__ import annotations

import difflib
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from trtllm_redrafter.errors import InputError, Problem, RequestError, brief
from trtllm_redrafter.prompts.jsonl import NumberedLine, raise_problems
from trtllm_redrafter.prompts.messages import KEYS

T = TypeVar("T")
Parse = Callable[[int, Mapping[str, Any]], T]
"""Line number, the line's object -> what a command needs of it; `InputError` or `RequestError` if it is unusable."""

_NOTED = 20

_log = logging.getLogger(__name__)


def parse_lines(
    lines: Iterable[NumberedLine], source: Path | str, parse: Parse[T]
) -> Iterator[tuple[int, T | InputError | RequestError]]:
    """Each line's number, and what `parse` makes of it or the error. Keys that no command reads are noted."""
    unknown = UnknownKeys(source)
    for number, values in lines:
        found: T | InputError | RequestError
        if isinstance(values, InputError):
            found = values
        else:
            unknown.note(values, number)
            try:
                found = parse(number, values)
            except (InputError, RequestError) as error:
                found = error
        yield number, found


def parse_all(lines: Iterable[NumberedLine], source: Path | str, parse: Parse[T]) -> list[T]:
    """What `parse` makes of all lines; `InputError` names every line that is unusable."""
    found: list[T] = []
    problems: list[Problem] = []
    for number, parsed in parse_lines(lines, source, parse):
        if isinstance(parsed, (InputError, RequestError)):
            p = parsed.problem
            problems.append(Problem(p.what, f"line {number}", p.why, p.remedy))
        else:
            found.append(parsed)
    raise_problems(problems, "some lines cannot be used", where=source, remedy="correct or remove them")
    if not found:
        raise InputError("the file has no lines", where=source, remedy="write one JSON object per line")
    return found


class UnknownKeys:
    """Warns once about each key that no command reads, since it may be misspelt; the line is used nevertheless."""

    def __init__(self, source: Path | str) -> None:
        self._source = source
        self._seen: set[str] = set()

    def note(self, values: Mapping[str, Any], number: int) -> None:
        for key in values:
            if key in KEYS or key in self._seen or len(self._seen) > _NOTED:
                continue
            self._seen.add(key)
            if len(self._seen) > _NOTED:
                _log.warning("%s: further unknown keys are not listed", self._source)
                return
            near = difflib.get_close_matches(key, KEYS, 1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            _log.warning("%s, line %d: the key %s is not known and not read%s", self._source, number, brief(key), hint)
