"""Keeps a worker's standard input through `trtllm-llmapi-launch`, and reports when the worker has ended.

Inside a Slurm job, the LLM API wants its ranks started by `srun` and that program. On the first rank it runs the
command it was given in the background of a shell, whose standard input is then /dev/null, and waits for a server
process that does not end when the command crashes. So this module runs both before and after it:

    srun --mpi=pmix --input=0 -n 4 python -m ...llmapi_launch outside ENGINE --api llm
      keeps the pipe under another number and becomes
    trtllm-llmapi-launch python -m ...llmapi_launch inside 5 ENGINE --api llm
      starts the worker with that pipe as its standard input, and reports its end
"""

from __future__ import annotations

import json
import os
import subprocess
import sys

LAUNCHER = "trtllm-llmapi-launch"
MODULE = "trtllm_redrafter.backends.tensorrt_llm.llmapi_launch"
WORKER = "trtllm_redrafter.backends.tensorrt_llm.worker"
OUTSIDE, INSIDE = "outside", "inside"


def outside(worker: list[str]) -> None:
    """Every rank's first process; does not return."""
    kept = os.dup(0)
    os.set_inheritable(kept, True)
    os.execvp(LAUNCHER, [LAUNCHER, sys.executable, "-m", MODULE, INSIDE, str(kept), *worker])


def inside(kept: int, worker: list[str]) -> int:
    """On the first rank only: the worker's exit code, which is also written to standard output."""
    child = subprocess.Popen([sys.executable, "-m", WORKER, *worker], stdin=kept)
    os.close(kept)
    code = child.wait()
    print(json.dumps({"ended": code}), flush=True)
    return code


def main(arguments: list[str]) -> int:
    role, *rest = arguments
    if role == INSIDE:
        return inside(int(rest[0]), rest[1:])
    outside(rest)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
