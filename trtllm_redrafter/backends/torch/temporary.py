"""Temporary engines of the torch backend, to check a checkpoint or to write text with a model.

    with temporary_runner(checkpoint, max_batch_size=4, ...) as runner:
        runner.generate(requests)

They lie beside what they are made from, where weights are linked and not copied. What a killed process leaves is
removed by the next one (see `scratch.py`).
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path

from trtllm_redrafter.backends.base import BuildOptions
from trtllm_redrafter.backends.torch.backend import TorchBackend
from trtllm_redrafter.backends.torch.runner import TorchRunner
from trtllm_redrafter.progress import Progress, no_progress
from trtllm_redrafter.scratch import new_directory

STEM = ".redrafter-engine"


def temporary_directory(*, beside: Path) -> AbstractContextManager[Path]:
    """A directory on the disk of `beside`, or the system's for temporary files where nothing may be written there."""
    parent = beside.resolve().parent
    place = parent if os.access(parent, os.W_OK) else Path(tempfile.gettempdir())
    return new_directory(place, STEM, mode=0o700)


@contextmanager
def temporary_runner(
    checkpoint: Path, *, folder: Path | None = None, max_batch_size: int, max_input_len: int, max_seq_len: int,
    device: str, tokenizer: Path | None = None, progress: Progress = no_progress,
) -> Iterator[TorchRunner]:  # fmt: skip
    """A loaded engine of `checkpoint`, in `folder` or in a temporary directory beside it; closed with the block."""
    with ExitStack() as stack:
        place = folder or stack.enter_context(temporary_directory(beside=checkpoint))
        backend = TorchBackend()
        options = BuildOptions(
            checkpoint=checkpoint, output=place / "engine", backend=backend.name, tokenizer=tokenizer,
            max_batch_size=max_batch_size, max_input_len=max_input_len, max_seq_len=max_seq_len, overwrite=False,
        )  # fmt: skip
        backend.build(backend.plan(options), progress)
        runner = backend.load(options.output, device=device, verify_hashes=False)
        stack.callback(runner.close)
        yield runner
