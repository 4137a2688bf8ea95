"""Carry out a build plan: check the machine, run trtllm-build, complete the engine directory, put it in place.

Whatever goes wrong (a failing child, a missing rank, Ctrl-C) leaves no engine directory behind; the child's log stays
beside the output as NAME.build.log, since it says why.
"""

from __future__ import annotations

import re
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trtllm_redrafter.backends.engine_config import TENSORRT
from trtllm_redrafter.backends.tensorrt_llm.build_plan import TensorRTLLMBuildPlan
from trtllm_redrafter.backends.tensorrt_llm.child import run_logged
from trtllm_redrafter.backends.tensorrt_llm.engine_cache import BuildIdentity, EngineCache
from trtllm_redrafter.backends.tensorrt_llm.engine_dir import (
    ENGINE_FORMAT,
    NOTES_FILE,
    expectation_problems,
    rank_problems,
)
from trtllm_redrafter.backends.tensorrt_llm.failures import build_error
from trtllm_redrafter.backends.tensorrt_llm.machine import FoundGpu
from trtllm_redrafter.backends.tensorrt_llm.preflight import BuildHost, check_build_host
from trtllm_redrafter.backends.tokenizer import BuildText, build_text
from trtllm_redrafter.base_models.tokenizer import GENERATION_CONFIG, tokenizer_files
from trtllm_redrafter.checkpoint.manifest import Manifest, record_tree
from trtllm_redrafter.checkpoint.names import EOS_TOKEN_IDS, TOKENIZER_DIRECTORY
from trtllm_redrafter.checkpoint.reader import Checkpoint
from trtllm_redrafter.checkpoint.structure import require_sound
from trtllm_redrafter.errors import BackendError, OutputError
from trtllm_redrafter.fsio import as_output_error, atomic_directory, read_json, sha256_file, write_json
from trtllm_redrafter.progress import Progress
from trtllm_redrafter.version import __version__

LOG = "build.log"
TIMING_CACHE = "timing.cache"


def build_engine(
    plan: TensorRTLLMBuildPlan, progress: Progress, *, on_complete: Callable[[Path], None] | None = None
) -> Path:
    """Build, or take the same engine from the cache."""
    options = plan.options
    checkpoint = Checkpoint.open(options.checkpoint)
    require_sound(checkpoint)
    text = build_text(options.tokenizer, checkpoint)
    host = check_build_host(plan)
    identity = _identity(plan, checkpoint, host, progress)
    cache = EngineCache(plan.settings.cache_dir) if plan.settings.cache else None
    place = atomic_directory(options.output, overwrite=options.overwrite, on_complete=on_complete)
    with place as work, as_output_error(options.output):
        facts: dict[str, Any] = {"cache_key": identity.key}
        if cache is not None and cache.fetch(identity, work):
            progress("build: taken from the cache", 1, 1, "engines")
            facts["from_cache"] = True
        else:
            facts |= _compile(plan, host, identity, cache, work, progress)
        notes = _complete(plan, text, host.gpu, work)
        if cache is not None and "from_cache" not in facts:
            notes += _keep(cache, identity, work, float(facts["build_seconds"]), _model_name(plan, host))
        _manifest(plan, checkpoint, host, facts, notes, work).write(work)
    beside_log(options.output).unlink(missing_ok=True)
    return options.output


def _keep(cache: EngineCache, identity: BuildIdentity, work: Path, seconds: float, model: str) -> list[str]:
    """Fill the caches. One that cannot be written becomes a note: it must not cost an hour's build."""
    try:
        cache.remember_seconds(model, seconds)
        if (work / TIMING_CACHE).is_file():
            cache.keep_timing_cache(identity, work / TIMING_CACHE)
        cache.store(identity, work)
    except (OSError, OutputError) as error:
        return [f"the engine was not cached: {error}"]
    return []


def _model_name(plan: TensorRTLLMBuildPlan, host: BuildHost) -> str:
    """The name under which build times are remembered."""
    return f"{plan.config.parameters_hint} x {plan.config.tp_size} on {host.gpu.name}"


def beside_log(output: Path) -> Path:
    """Where the log of a failed build is kept."""
    return output.with_name(output.name + "." + LOG)


def _identity(plan: TensorRTLLMBuildPlan, checkpoint: Checkpoint, host: BuildHost, progress: Progress) -> BuildIdentity:
    names = ["config.json", *(file.path.name for file in checkpoint.ranks)]
    hashes = {}
    for done, name in enumerate(names):
        progress("hash the checkpoint", done, len(names), "files")
        known = checkpoint.manifest.files.get(name) if checkpoint.manifest is not None else None
        path = checkpoint.path / name
        hashes[name] = known.sha256 if known is not None and name != "config.json" else sha256_file(path)
    progress("hash the checkpoint", len(names), len(names), "files")
    arguments = tuple(argument for flag in plan.flags.flags for argument in flag.arguments)
    return BuildIdentity(hashes, arguments, host.versions, f"{host.gpu.name} {host.gpu.sm}")


def _compile(
    plan: TensorRTLLMBuildPlan, host: BuildHost, identity: BuildIdentity, cache: EngineCache | None, work: Path,
    progress: Progress,
) -> dict[str, Any]:  # fmt: skip
    """Run trtllm-build into `work`; what the manifest should know about it."""
    log = beside_log(plan.options.output)
    written = work / TIMING_CACHE
    known = cache.timing_cache(identity) if cache is not None else None
    used = known if known is not None and known.is_file() else None
    used_hash = None if used is None else sha256_file(used)
    arguments = plan.flags.arguments(
        checkpoint=plan.options.checkpoint, output=work, timing_cache_in=used, timing_cache_out=written
    )
    estimate = cache.last_seconds(_model_name(plan, host)) if cache is not None else None
    state = BuildProgress(plan.config.tp_size)

    def tick(seconds: float) -> None:
        total = None if estimate is None else max(int(estimate), int(seconds) + 1)
        progress(state.headline, int(seconds), total, "s")

    start = time.monotonic()
    code = run_logged([str(host.program), *arguments], log=log, on_line=state.line, on_tick=tick)
    seconds = time.monotonic() - start
    missing = rank_problems(work, plan.config.tp_size)
    if code != 0:
        raise build_error(code, log)
    if missing or not (work / "config.json").is_file():
        why = "; ".join(problem.what for problem in missing) or "config.json is missing"
        raise BackendError("trtllm-build ended without an error but the engine is incomplete", where=log, why=why,
                           remedy="read the log; a rank's process may have been killed")  # fmt: skip
    text = log.read_text(encoding="utf-8", errors="replace")
    shutil.copyfile(log, work / LOG)
    return {
        "build_seconds": round(seconds, 1),
        "builder_warnings": warnings_in(text),
        "timing_cache": {"used_sha256": used_hash, "written": TIMING_CACHE if written.is_file() else None},
    }


def _complete(plan: TensorRTLLMBuildPlan, text: BuildText, gpu: FoundGpu, work: Path) -> list[str]:
    """Add tokenizer and our own notes; returns remarks on what the builder did differently from the plan.

    `trtllm-serve` looks for the model's config.json beside the tokenizer, and for generation_config.json, which has the
    end tokens, beside the engine's own config.json.
    """
    config = read_json(work / "config.json")
    if plan.tokenizer is not None:
        (work / TOKENIZER_DIRECTORY).mkdir()
        for file in tokenizer_files(plan.tokenizer):
            shutil.copyfile(file, work / TOKENIZER_DIRECTORY / file.name)
        generation = plan.tokenizer / GENERATION_CONFIG
        if generation.is_file():
            shutil.copyfile(generation, work / GENERATION_CONFIG)
    values = {
        "format": ENGINE_FORMAT,
        "backend": TENSORRT,
        "version": __version__,
        "tensorrt_llm": str(config.get("version", "")),
        "gpu": {"name": gpu.name, "compute_capability": list(gpu.compute_capability)},
        "dtype": plan.config.dtype,
        EOS_TOKEN_IDS: list(text.end_token_ids),
        "runtime": plan.settings.runtime.as_dict(),
    }
    write_json(work / NOTES_FILE, values)
    return [*text.notes, *(problem.what for problem in expectation_problems(config, plan.flags.expected, work))]


def _manifest(
    plan: TensorRTLLMBuildPlan,
    checkpoint: Checkpoint,
    host: BuildHost,
    facts: dict[str, Any],
    notes: list[str],
    work: Path,
) -> Manifest:
    known = checkpoint.manifest
    origin = {"path": str(plan.options.checkpoint), "inputs": {} if known is None else dict(known.inputs)}
    return Manifest(
        kind="engine",
        inputs={"checkpoint": origin},
        options={flag.name: flag.value for flag in plan.flags.flags},
        derived={
            "backend": TENSORRT,
            "versions": dict(host.versions),
            "driver": host.gpu.driver,
            "gpu": host.gpu.name,
            "compute_capability": list(host.gpu.compute_capability),
            "changes": [change.render() for change in plan.flags.changes],
            "warnings": [warning.what for warning in plan.warnings],
            **facts,
        },
        files=record_tree(work),
        notes=tuple(notes),
    )


_PHASES: tuple[tuple[re.Pattern[str], str], ...] = tuple(
    (re.compile(pattern), phase)
    for pattern, phase in (
        (r"Set \w+ to ", "reading the configuration"),
        (r"Loading (weights|checkpoint|engine)|Reading weights|initialize the weights", "loading weights"),
        (r"Total time of constructing network|optimization profiles added", "building the network"),
        (r"Build TensorRT engine|timing cache in use|Compiler backend is used during engine build", "compiling"),
        (r"Engine generation completed", "engine compiled"),
        (r"Serializing engine to", "writing the engine"),
        (r"Engine serialized", "engine written"),
        (r"Total time of building all engines", "done"),
    )
)
"""Phrases of TensorRT-LLM's and TensorRT's logs. One that a release changes costs the progress display its detail."""


@dataclass
class BuildProgress:
    """What trtllm-build is doing, by the lines of its log; `headline` is what to show."""

    ranks: int
    phase: str = "starting"
    written: int = 0

    def line(self, text: str) -> None:
        for pattern, phase in _PHASES:
            if pattern.search(text):
                self.phase = phase
                self.written += phase == "engine written"
                return

    @property
    def headline(self) -> str:
        return f"build: {self.phase}" + (f", rank {min(self.written, self.ranks - 1)}" if self.ranks > 1 else "")


def warnings_in(log: str, limit: int = 20) -> list[str]:
    """TensorRT-LLM's own warnings, each once, without time stamps: they go into the manifest."""
    found = dict.fromkeys(
        match.group(1).strip() for match in re.finditer(r"\[TRT-LLM\] \[W\] (.*)", log) if match.group(1).strip()
    )
    return list(found)[:limit]
