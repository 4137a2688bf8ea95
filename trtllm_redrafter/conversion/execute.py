"""Carry out a conversion plan: rank files concurrently, then config and manifest, then the rename.

    checkpoint = convert(plan_conversion(options), progress)

A failure or an interrupt anywhere stops every thread at its next block and leaves no trace of the output.
"""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

from trtllm_redrafter.checkpoint.config_writer import config_dict
from trtllm_redrafter.checkpoint.manifest import FileRecord, Manifest
from trtllm_redrafter.checkpoint.names import rank_file
from trtllm_redrafter.conversion.planned import ConversionPlan
from trtllm_redrafter.conversion.writer import Cancelled, Meter, hash_inputs, write_rank
from trtllm_redrafter.fsio import atomic_directory, write_json
from trtllm_redrafter.progress import Progress


def convert(plan: ConversionPlan, progress: Progress, *, on_complete: Callable[[Path], None] | None = None) -> Path:
    """Write the checkpoint; returns its path. All or nothing. `on_complete`: see `atomic_directory`."""
    output = plan.options.output
    with atomic_directory(output, overwrite=plan.options.overwrite, on_complete=on_complete) as work:
        ranks, inputs = _write_ranks(plan, work, progress)
        records = {rank_file(work, rank).name: record for rank, record in ranks.items()}
        write_json(work / "config.json", config_dict(plan.config))
        records["config.json"] = FileRecord.of(work / "config.json")
        for source, name in plan.copies:
            (work / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(source, work / name)
            records[name] = FileRecord.of(work / name)
        _manifest(plan, records, inputs).write(work)
    return output


def _write_ranks(
    plan: ConversionPlan, work: Path, progress: Progress
) -> tuple[dict[int, FileRecord], dict[Path, FileRecord]]:
    """All rank files, and the hashes of the inputs computed beside them."""
    lock = threading.Lock()
    written = Meter(progress, "convert", plan.weight_bytes, lock)
    hashed = Meter(progress, "hash inputs", sum(path.stat().st_size for path in plan.inputs), lock)
    workers = min(plan.options.workers, len(plan.ranks))
    with ThreadPoolExecutor(workers + 1, thread_name_prefix="convert") as pool:
        inputs = pool.submit(hash_inputs, plan.inputs, hashed)
        ranks = {rank.rank: pool.submit(write_rank, rank, rank_file(work, rank.rank), written) for rank in plan.ranks}
        try:
            _wait_for([inputs, *ranks.values()])
        except BaseException:
            written.stop()
            hashed.stop()
            pool.shutdown(wait=True, cancel_futures=True)
            raise
        return {rank: future.result() for rank, future in ranks.items()}, inputs.result()


def _wait_for(futures: list[Future[Any]]) -> None:
    """Return when all are done, or raise the first failure at once."""
    done, _ = wait(futures, return_when=FIRST_EXCEPTION)
    for future in done:
        error = future.exception()
        if error is not None and not isinstance(error, Cancelled):
            raise error


def _manifest(plan: ConversionPlan, records: dict[str, FileRecord], inputs: dict[Path, FileRecord]) -> Manifest:
    sections: dict[str, Any] = {
        "base": {
            "path": str(plan.options.base),
            "kind": plan.base.kind,
            "tokenizer_sha256": plan.base.tokenizer_sha256,
            "weights_sample": plan.base.weights_sample,
            "files": _relative(plan.options.base, plan.base.files, inputs),
        }
    }
    if plan.drafter is not None:
        sections["drafter"] = {
            "path": str(plan.drafter.path),
            "trained_for": dict(plan.drafter.base_identity),
            "files": _relative(plan.drafter.path, plan.drafter.files, inputs),
        }
    return Manifest(
        kind="checkpoint",
        inputs=sections,
        options=plan.options.as_dict(),
        derived=plan.derived,
        files=dict(sorted(records.items())),
        notes=plan.notes,
    )


def _relative(directory: Path, files: tuple[Path, ...], records: dict[Path, FileRecord]) -> dict[str, Any]:
    return {path.relative_to(directory).as_posix(): records[path].as_dict() for path in files}
