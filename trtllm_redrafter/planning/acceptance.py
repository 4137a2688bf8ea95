"""Read the acceptance length for a plan from a report of `evaluate`.

A figure typed by hand may be of another drafter or another shape. A report names its base model, its drafter and the
shape of each row, so that the row of the planned shape is used and a report without it is refused.

    found = read_acceptance(Path("report.json"), DraftShape(5, 5))
    found.acceptance_length, found.low, found.high        # 2.87, 2.71, 3.03
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trtllm_redrafter.errors import InputError, MismatchError
from trtllm_redrafter.paths import read_regular
from trtllm_redrafter.redrafter.config import DraftShape

REPORT_FILE = "report.json"
_MAX_BYTES = 2**24
_MAKE_ONE = "pass what `evaluate --report DIR` or `evaluate --json` writes, or the number itself"


@dataclass(frozen=True)
class MeasuredAcceptance:
    """One row of a report. `low` and `high` bound a 95 % interval."""

    path: Path
    setting: str
    acceptance_length: float
    low: float | None
    high: float | None
    prompts: int | None
    tokens: int | None
    base: str | None
    drafter: str | None
    drafter_sha256: str | None
    """Hash of the measured weights; None in older reports."""
    drafted_from: int | None
    """Number of token ids drafted from; less than the vocabulary if `evaluate.draft_vocab` was on."""

    def render(self) -> str:
        parts = []
        if self.prompts is not None:
            over = "" if self.tokens is None else f" and {self.tokens} tokens"
            parts.append(f"{self.prompts} prompts{over}")
        if self.low is not None and self.high is not None:
            parts.append(f"95 % interval {self.low:.2f} to {self.high:.2f}")
        row = f"acceptance: {self.acceptance_length:.2f} tokens per step, the {self.setting} row of {self.path}"
        return ": ".join([row, ", ".join(parts)]) if parts else row

    def as_dict(self) -> dict[str, Any]:
        return {**vars(self), "path": str(self.path)}


def read_acceptance(path: Path, shape: DraftShape) -> MeasuredAcceptance:
    """The row of `shape`. `InputError`: no report of `evaluate`; `MismatchError`: no such row."""
    file = path / REPORT_FILE if path.is_dir() else path
    report = _document(file)
    rows = {row["setting"]: row for row in _rows(report, file)}
    wanted = shape.name
    if wanted not in rows:
        raise MismatchError(
            f"the report has no row for {wanted}", where=file, why=f"it has {', '.join(rows)}",
            remedy=f"run `evaluate --grid {wanted}`, or plan one of its shapes with convert.num_beams and "
            "convert.draft_len",
        )  # fmt: skip
    row = rows[wanted]
    value = _length(row)
    if not 1.0 <= value <= shape.draft_len + 1:
        why = f"a step of {wanted} emits 1 to {shape.draft_len + 1} tokens"
        raise InputError(f"the {wanted} row has {value:g} tokens per step", where=file, why=why, remedy=_MAKE_ONE)
    low, high = _interval(row.get("interval_95", row.get("walk_95")))
    return MeasuredAcceptance(
        path=file,
        setting=wanted,
        acceptance_length=float(value),
        low=low,
        high=high,
        prompts=_optional(report, "prompts", int),
        tokens=_optional(report, "tokens", int),
        base=_optional(report, "base", str),
        drafter=_optional(report, "drafter", str),
        drafter_sha256=_optional(report, "drafter_sha256", str),
        drafted_from=_optional(report, "drafted_from_tokens", int),
    )


def _document(file: Path) -> dict[str, Any]:
    """The JSON object in `file`: the whole file, or its last line, as in the output of `evaluate --json`."""
    try:
        text = read_regular(file, _MAX_BYTES).decode("utf-8")
    except (InputError, ValueError) as e:
        why = (e.problem.why or e.problem.what) if isinstance(e, InputError) else str(e)
        raise InputError("cannot read the acceptance length's report", where=file, why=why, remedy=_MAKE_ONE) from e
    for part in (text, text.rstrip().rpartition("\n")[2]):
        try:
            found = json.loads(part)
        except (ValueError, RecursionError):
            continue
        if isinstance(found, dict):
            return found
    raise _not_a_report(file, "neither the file nor its last line is a JSON object")


def _rows(report: dict[str, Any], file: Path) -> list[dict[str, Any]]:
    rows = report.get("acceptance")
    if not isinstance(rows, list) or not rows:
        raise _not_a_report(file, "it has no list `acceptance`")
    for row in rows:
        if not isinstance(row, dict) or not isinstance(row.get("setting"), str) or not _is_number(_length(row)):
            raise _not_a_report(file, "an entry of `acceptance` lacks `setting` or `acceptance_length`")
    return rows


def _length(row: dict[str, Any]) -> Any:
    """The acceptance length, which earlier versions called `walk`."""
    return row.get("acceptance_length", row.get("walk"))


def _interval(bounds: Any) -> tuple[float | None, float | None]:
    if isinstance(bounds, list) and len(bounds) == 2 and all(map(_is_number, bounds)):
        return float(bounds[0]), float(bounds[1])
    return None, None


def _not_a_report(file: Path, why: str) -> InputError:
    return InputError("the file is not a report of `evaluate`", where=file, why=why, remedy=_MAKE_ONE)


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) <= sys.float_info.max


def _optional(report: dict[str, Any], key: str, kind: type) -> Any:
    value = report.get(key)
    return value if isinstance(value, kind) and not isinstance(value, bool) else None
