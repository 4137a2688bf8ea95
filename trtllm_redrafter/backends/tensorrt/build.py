"""Compile an engine's networks, one process after the other, and check what came of each.

engine/
  config.json            backend, limits, GPU, compiler, and what each network was compiled to
  manifest.json          what made it, from what, hashes
  tokenizer/             tokenizer, chat template, generation_config.json
  checkpoint/            config.json of the checkpoint that the networks are for; its weights stay where they are
  draft-greedy.plan.gz   one per network
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import onnx
import torch

from trtllm_redrafter.backends.tensorrt.build_plan import TensorRTBuildPlan, check_compiler, checkpoint_files
from trtllm_redrafter.backends.tensorrt.compile_worker import CompileJob, CompileOutcome
from trtllm_redrafter.backends.tensorrt.inside import WeightFile
from trtllm_redrafter.backends.tensorrt.networks import Network, make_network, network_sha256, profile
from trtllm_redrafter.backends.tensorrt.weights import draft_rows, load_inputs
from trtllm_redrafter.base_models.tokenizer import tokenizer_files
from trtllm_redrafter.checkpoint.manifest import FileRecord, Manifest, record_tree
from trtllm_redrafter.checkpoint.names import ENGINE_CHECKPOINT, TOKENIZER_DIRECTORY
from trtllm_redrafter.checkpoint.structure import finite_problems
from trtllm_redrafter.errors import BackendError, InputError, limited, raise_together
from trtllm_redrafter.fsio import as_output_error, atomic_directory, write_json
from trtllm_redrafter.memory import memory_for, physical_memory
from trtllm_redrafter.progress import Progress

PLAN_SUFFIX = ".plan.gz"

_TIMEOUT = 1800.0
"""Seconds after which a compiler is taken to hang; the largest measured build took a minute."""

_COMMAND = ["-m", "trtllm_redrafter.backends.tensorrt.compile_worker"]

_TYPES: Mapping[str, str] = {"float32": "FLOAT", "float16": "HALF", "bfloat16": "BF16"}
"""TensorRT's names of the checkpoint's dtypes."""

_ELEMENTS: Mapping[int, str] = {1: "FLOAT", 6: "INT32", 7: "INT64", 9: "BOOL", 10: "HALF", 16: "BF16", 17: "FP8"}
"""TensorRT's names of ONNX's element types."""


def build_engine(
    plan: TensorRTBuildPlan, progress: Progress, *, on_complete: Callable[[Path], None] | None = None
) -> Path:
    """Write the engine directory; it appears complete or not at all."""
    version = check_compiler(plan)
    options, source = plan.options, plan.checkpoint.path
    place = atomic_directory(options.output, overwrite=options.overwrite, on_complete=on_complete)
    with place as work, as_output_error(options.output):
        damaged = limited(list(finite_problems(plan.checkpoint)))
        raise_together(InputError, damaged, "the checkpoint cannot be used", where=source)
        compiled = {}
        with tempfile.TemporaryDirectory() as scratch:
            weights = _weight_file(plan, Path(scratch)) if plan.weights_inside else None
            for done, network in enumerate(plan.networks):
                progress("build", done, len(plan.networks), "networks")
                compiled[network.name] = _compile(plan, network, work, Path(scratch), weights)
        (work / ENGINE_CHECKPOINT).mkdir()
        (work / ENGINE_CHECKPOINT / "config.json").write_bytes((source / "config.json").read_bytes())
        if plan.text.source is not None:
            (work / TOKENIZER_DIRECTORY).mkdir()
            for file in tokenizer_files(plan.text.source):
                (work / TOKENIZER_DIRECTORY / file.name).write_bytes(file.read_bytes())
        config = plan.engine_config()
        config["weights"] = "inside" if plan.weights_inside else "inputs"
        config["compiler"] = {"name": plan.compiler.name, "version": version}
        config["checkpoint"]["files"] = _records(plan)
        config["networks"] = compiled
        write_json(work / "config.json", config)
        _manifest(plan, config, work).write(work)
        progress("build", len(plan.networks), len(plan.networks), "networks")
    return options.output


def _weight_file(plan: TensorRTBuildPlan, folder: Path) -> WeightFile:
    rows = draft_rows(plan.checkpoint, plan.sizes.draft_rows or 0)
    with memory_for("the weights", remedy="build with the weights as inputs (tensorrt.weights)"):
        return WeightFile(folder, load_inputs(plan.checkpoint, rows, torch.device("cpu")))


def _compile(
    plan: TensorRTBuildPlan, network: Network, work: Path, folder: Path, weights: WeightFile | None
) -> dict[str, Any]:
    """Compile one network to `work`, with files in `folder`; what config.json says of it."""
    model = make_network(plan.sizes, network)
    given = model if weights is None else weights.put_into(model)
    limits = {"max_batch_size": plan.options.max_batch_size, "max_input_len": plan.options.max_input_len}
    fixed = plan.compiler.capabilities is None
    (folder / "result.json").unlink(missing_ok=True)
    onnx.save(given, str(folder / "network.onnx"))
    job = CompileJob(
        compiler=plan.compiler.name,
        model=str(folder / "network.onnx"),
        output=str(work / (network.name + PLAN_SUFFIX)),
        result=str(folder / "result.json"),
        capability=None if fixed else list(plan.gpu.compute_capability),
        shapes=profile(given, **limits),
        memory_bytes=max(physical_memory(), 4 * 10**9),
    )
    outcome = run_job(job, folder, what=f"{network.name} for {plan.gpu.title}")
    check_outcome(outcome, given, dtype=plan.checkpoint.config.dtype, network=network.name)
    return {
        "file": network.name + PLAN_SUFFIX,
        "onnx_sha256": network_sha256(model),
        "plan_bytes": outcome.plan_bytes,
        "seconds": round(outcome.seconds, 2),
        "peak_bytes": outcome.peak_bytes,
        "layers": outcome.layers,
        "product_types": outcome.product_types,
    }


def run_job(job: CompileJob, folder: Path, *, what: str) -> CompileOutcome:
    """Run a compiler in its own process; `BackendError` says what it refused, or how it ended."""
    (folder / "job.json").write_text(json.dumps(asdict(job)))
    command = [sys.executable, *_COMMAND, str(folder / "job.json")]
    remedy = "please report it with the model's config.json"
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT, env=dict(os.environ))
    except subprocess.TimeoutExpired as error:
        why = f"it had not finished {what} after {_TIMEOUT:.0f} s"
        raise BackendError(f"{job.compiler} does not finish", why=why, remedy=remedy) from error
    if done.returncode == -signal.SIGKILL:
        remedy = "build on a machine with more memory, or end what else runs on it"
        raise BackendError(f"{job.compiler} was killed while compiling {what}", why="out of memory", remedy=remedy)
    if done.returncode != 0 or not Path(job.result).exists():
        code = done.returncode
        how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        why = f"its process ended with {how}: {done.stderr.strip()[-400:]}"
        raise BackendError(f"{job.compiler} crashed while compiling {what}", why=why, remedy=remedy)
    outcome = CompileOutcome(**json.loads(Path(job.result).read_text()))
    if outcome.unsupported:
        operators = ", ".join(outcome.unsupported)
        raise BackendError(
            f"{job.compiler} {outcome.version} does not take {operators}",
            why=outcome.errors[0] if outcome.errors else None,
            remedy="use the version in constraints.txt",
        )
    if not outcome.plan_bytes:
        why = "; ".join(outcome.errors) or "it gives no reason"
        raise BackendError(f"{job.compiler} cannot compile {what}", why=why[:800], remedy=remedy)
    return outcome


def check_outcome(outcome: CompileOutcome, model: onnx.ModelProto, *, dtype: str, network: str) -> None:
    """Is what was compiled what was asked for? Names and types of inputs and outputs, and of matrix products."""
    asked = [
        {value.name: _ELEMENTS[value.type.tensor_type.elem_type] for value in side}
        for side in (model.graph.input, model.graph.output)
    ]
    wrong = []
    for title, wanted, found in zip(("input", "output"), asked, (outcome.inputs, outcome.outputs), strict=True):
        names = sorted(name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name))
        wrong += [f"{title} {name} is {found.get(name)}, not {wanted.get(name)}" for name in names]
    others = set(outcome.product_types) - {_TYPES[dtype]}
    if others:
        wrong.append(f"products are computed in {', '.join(sorted(others))}, not {_TYPES[dtype]}")
    if wrong:
        raise BackendError(f"{network} was compiled to something else", why="; ".join(wrong[:4]), remedy="report it")


def _records(plan: TensorRTBuildPlan) -> dict[str, Any]:
    """Size and hashes of the checkpoint's files, from its own manifest where it has one."""
    folder, known = plan.checkpoint.path, plan.checkpoint.manifest
    found = {}
    for name in checkpoint_files(folder, len(plan.checkpoint.ranks)):
        record = None if known is None else known.files.get(name)
        record = record or FileRecord.of(folder / name)
        found[name] = record.with_sample(folder / name).as_dict()
    return found


def _manifest(plan: TensorRTBuildPlan, config: Mapping[str, Any], work: Path) -> Manifest:
    known = plan.checkpoint.manifest
    inputs = {"path": str(plan.options.checkpoint), "inputs": {} if known is None else dict(known.inputs)}
    options = dict(config["build_config"]) | {"gpu": plan.gpu.name, "compiler": plan.compiler.name}
    return Manifest("engine", {"checkpoint": inputs}, options, {}, record_tree(work))
