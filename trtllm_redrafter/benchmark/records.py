"""What was measured: one record per request, grouped by side and batch size, and the JSON they are stored as.

A result file has raw records, so that two results can be compared prompt by prompt and figures can be recomputed.
Derived figures (`statistics.py`) are in the file too, for people, and are never read back.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from trtllm_redrafter.backends.requests import SpecDecodingStats
from trtllm_redrafter.errors import InputError
from trtllm_redrafter.fsio import read_json

SCHEMA = 1
DRAFTING, AUTOREGRESSION = "drafting", "autoregression"
SIDES = (DRAFTING, AUTOREGRESSION)


@dataclass(kw_only=True)
class Record(SpecDecodingStats):
    """One request. Times are in seconds since its submission; `decode_seconds` since the end of its prompt's pass.

    `first_token_seconds` is when a client sees it, which can be a step later: a runner may return both together.

    `step_seconds` is the runner's own time in decoding steps; the rest of `decode_seconds` went to other requests'
    prompts. `output` is a hash of the emitted token ids. `gaps` is how many of the side's gaps, which are in the order
    of its records, belong to this request; None in older results.
    """

    item: str
    category: str
    repeat: int
    tokens: int
    first_token_seconds: float
    seconds: float
    decode_seconds: float
    step_seconds: float
    output: str
    gaps: int | None = None


@dataclass
class SideRecords:
    """All requests of one side at one batch size. `gaps` are seconds between updates, as a client sees them."""

    records: list[Record] = field(default_factory=list)
    wall_seconds: float = 0.0
    gaps: list[float] = field(default_factory=list)

    @property
    def tokens(self) -> int:
        return sum(r.tokens for r in self.records)

    def of_category(self, name: str) -> SideRecords:
        """The category's requests and their gaps. There is no wall time, since rounds mix categories."""
        found, first = SideRecords(), 0
        for record in self.records:
            if record.category == name:
                found.records.append(record)
                found.gaps += self.gaps[first : first + (record.gaps or 0)]
            first += record.gaps or 0
        return found


TIE, FAULT, UNEXAMINED = "tie", "fault", "unexamined"


@dataclass(frozen=True)
class Difference:
    """Where drafting changed a text. `kind` is one of the three above; `gap` is in logits, None if not known."""

    item: str
    batch: int
    position: int
    kind: str
    gap: float | None
    bound: float | None


@dataclass
class BatchRecords:
    """Both sides at one batch size."""

    batch: int
    drafting: SideRecords = field(default_factory=SideRecords)
    autoregression: SideRecords = field(default_factory=SideRecords)
    differences: list[Difference] = field(default_factory=list)

    def side(self, name: str) -> SideRecords:
        return self.drafting if name == DRAFTING else self.autoregression


@dataclass
class BenchResult:
    """All measurements of one `bench`. `complete` is False if it was interrupted."""

    engine: Mapping[str, Any]
    settings: Mapping[str, Any]
    environment: Mapping[str, Any]
    batches: list[BatchRecords]
    complete: bool

    def as_dict(self) -> dict[str, Any]:
        return {
            "kind": "benchmark",
            "schema": SCHEMA,
            "complete": self.complete,
            "engine": dict(self.engine),
            "settings": dict(self.settings),
            "environment": dict(self.environment),
            "batches": [_batch_dict(b) for b in self.batches],
        }


def _batch_dict(batch: BatchRecords) -> dict[str, Any]:
    sides = {
        name: {
            "wall_seconds": batch.side(name).wall_seconds,
            "gaps_ms": [round(1e3 * gap, 3) for gap in batch.side(name).gaps],
            "records": [asdict(r) for r in batch.side(name).records],
        }
        for name in SIDES
    }
    return {"batch": batch.batch, **sides, "differences": [asdict(d) for d in batch.differences]}


def read_result(path: Path) -> BenchResult:
    """Read a result of `bench`, from the JSON file or the report directory that contains it."""
    file = path / "result.json" if path.is_dir() else path
    value = read_json(file)
    if value.get("kind") != "benchmark" or value.get("schema") != SCHEMA:
        raise InputError(
            "this is not a benchmark result that this version reads",
            where=file,
            why=f"kind {value.get('kind')!r}, schema {value.get('schema')!r}",
            remedy="pass the result.json that `bench --report` wrote",
        )
    try:
        batches = [_read_batch(b) for b in value["batches"]]
        return BenchResult(
            value["engine"], value["settings"], value["environment"], batches, complete=bool(value["complete"])
        )
    except (KeyError, TypeError) as error:
        remedy = "measure again; a result is not meant to be edited"
        raise InputError("the benchmark result is damaged", where=file, why=repr(error), remedy=remedy) from error


_FORMER_NAMES = {
    "drafted": "drafted_tokens", "accepted": "accepted_tokens", "accepted_at": "accepted_per_position",
}  # fmt: skip
"""Names of a record's fields in results of earlier versions."""


def _read_batch(value: Mapping[str, Any]) -> BatchRecords:
    sides = {name: _read_side(value[name]) for name in SIDES}
    differences = [Difference(**d) for d in value["differences"]]
    return BatchRecords(int(value["batch"]), sides[DRAFTING], sides[AUTOREGRESSION], differences)


def _read_side(value: Mapping[str, Any]) -> SideRecords:
    records = [Record(**{_FORMER_NAMES.get(name, name): v for name, v in r.items()}) for r in value["records"]]
    return SideRecords(records, float(value["wall_seconds"]), [float(gap) / 1e3 for gap in value["gaps_ms"]])
