"""Kill commands at every operation on files, run them again, and compare with an undisturbed run.

    python -m tests.kills.campaign --seed 1 --count 400

Each case copies the inputs, lets one command run into a fault (`faults.py`), and runs the same line again without one.
The second run must succeed by itself, leave what an undisturbed run leaves, and nothing besides. To take a fraction of
a second, commands run in forks of this process, which has imported everything. The last line is a JSON summary.
"""

from __future__ import annotations

import argparse
import faulthandler
import io
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path

from tests.kills.commands import COMMANDS, digest, write_inputs
from tests.kills.faults import FULL_DISK, Fault, Hook

KINDS = {signal.SIGKILL: 12, signal.SIGTERM: 3, signal.SIGINT: 2, signal.SIGHUP: 1, FULL_DISK: 2}
"""What happens, by how often it is drawn."""

LIMIT_SECONDS = 20.0
LOUD = ("Traceback", "internal error", "Exception ignored")


@dataclass(frozen=True)
class Ran:
    """How a command ended: its exit code (minus the signal that killed it), what it printed, operations counted."""

    code: int
    text: str
    operations: int
    seconds: float


@dataclass(frozen=True)
class Scene:
    """A command, whether an earlier output is there, and what an undisturbed run makes of it."""

    name: str
    start: Path
    expected: dict[str, str]
    operations: int
    seconds: float


def run_forked(line: str, folder: Path, fault: Fault | None, *, kill_after: float | None = None) -> Ran:
    """Run one command line in a fork of this process, with `folder` as its current directory."""
    logs = Path(tempfile.mkdtemp(prefix="kills-"))
    (logs / "text").touch()
    started = time.monotonic()
    child = os.fork()
    if child == 0:
        _become(line, folder, fault, logs)
    code = _wait(child, started, kill_after)
    count = logs / "count"
    ran = Ran(
        code, (logs / "text").read_text(errors="replace"), int(count.read_text()) if count.exists() else 0,
        time.monotonic() - started,
    )  # fmt: skip
    shutil.rmtree(logs)
    return ran


def _become(line: str, folder: Path, fault: Fault | None, logs: Path) -> None:
    """In the fork: be the program, and end."""
    from trtllm_redrafter.cli import main

    code, hook = 99, Hook(folder, fault)
    try:
        out = os.open(logs / "text", os.O_WRONLY)
        os.dup2(out, 1)
        os.dup2(out, 2)
        faulthandler.dump_traceback_later(0.9 * LIMIT_SECONDS, file=2)  # where it hangs, if it does
        os.chdir(folder)
        sys.argv = ["trtllm-redrafter", *line.split()]
        hook.install()
        main()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    finally:
        hook._fault = None
        (logs / "count").write_text(str(hook.count))
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _wait(child: int, started: float, kill_after: float | None) -> int:
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        passed = time.monotonic() - started
        if passed > LIMIT_SECONDS or (kill_after is not None and passed > kill_after):
            os.kill(child, signal.SIGKILL)
            return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        time.sleep(0.002)


def prepare(folder: Path, names: list[str]) -> list[Scene]:
    """Inputs, and an undisturbed run of every command, on nothing and on an earlier output."""
    from trtllm_redrafter.cli import run_app

    inputs = folder / "inputs"
    inputs.mkdir()
    write_inputs(inputs)
    scenes = []
    for name in names:
        command = COMMANDS[name]
        warm = shutil.copytree(inputs, folder / f"warm-{name}")
        os.chdir(warm)
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()) as said:
            code = run_app(command.line.split())  # imports what it needs, once
        assert code == 0, f"{name}: {said.getvalue()}"
        for earlier in (None, command.earlier) if command.earlier else (None,):
            place = shutil.copytree(inputs, folder / "place")  # always here: records know paths
            if earlier is not None:
                before = run_forked(earlier, place, None)
                assert before.code == 0, before.text
            start = shutil.copytree(place, folder / (f"{name} over an earlier output" if earlier else name))
            ran = run_forked(command.line, place, None)
            assert ran.code == 0 and not loud(ran), ran.text
            scenes.append(Scene(name, start, digest(place), ran.operations, ran.seconds))
            shutil.rmtree(place)
        os.chdir(folder)
    return scenes


def loud(ran: Ran) -> bool:
    return any(word in ran.text for word in LOUD)


def one_case(scene: Scene, folder: Path, rng: random.Random) -> tuple[str, list[str]]:
    """One fault and the run after it: what was done, and what is wrong with it."""
    line = COMMANDS[scene.name].line
    place = shutil.copytree(scene.start, folder / "place")
    kind = rng.choices(list(KINDS), list(KINDS.values()))[0]
    fault: Fault | None = Fault(rng.randint(1, scene.operations), kind, rng.random() < 0.5)
    after = None
    if kind == signal.SIGKILL and rng.random() < 0.25:  # at any moment, not only between operations
        fault, after = None, rng.uniform(0.0, scene.seconds)
    first = run_forked(line, place, fault, kill_after=after)
    wrong = _judge_first(first, kind, place)
    second = run_forked(line, place, None)
    if second.code != 0 or loud(second):
        wrong.append(f"the next run ends with {second.code}: {second.text[-600:]}")
    else:
        wrong += _differences(scene.expected, digest(place))
    shutil.rmtree(place)
    return f"{scene.start.name}: {fault if fault is not None else f'SIGKILL after {after:.2f} s'}", wrong


def _judge_first(ran: Ran, kind: int, place: Path) -> list[str]:
    """Exit code and manners of a run that ran into its fault."""
    if kind == signal.SIGKILL:
        return [] if ran.code in (0, -signal.SIGKILL) else [f"SIGKILL: exit code {ran.code}: {ran.text[-600:]}"]
    wrong = [f"it shows {ran.text[-1500:]}"] if loud(ran) else []
    wanted = (0, 5) if kind == FULL_DISK else (128 + kind, -kind)
    if ran.code not in wanted:
        wrong.append(f"exit code {ran.code}, not {wanted[-1 if kind == FULL_DISK else 0]}: {ran.text[-600:]}")
    return wrong


def _differences(expected: dict[str, str], found: dict[str, str]) -> list[str]:
    names = sorted(name for name in {*expected, *found} if expected.get(name) != found.get(name))
    states = {
        name: "left over" if name not in expected else "missing" if name not in found else "other" for name in names
    }
    return [f"{state}: {name}" for name, state in states.items()]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--count", type=int, default=400)
    parser.add_argument("--commands", default=",".join(COMMANDS))
    options = parser.parse_args()
    os.sched_setaffinity(0, {random.choice(sorted(os.sched_getaffinity(0)))})  # a fork of several threads can hang
    os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # a shell's background jobs inherit them ignored
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    import torch

    torch.set_num_threads(1)
    rng, done, failures = random.Random(options.seed), Counter[str](), []
    folder = Path(os.path.realpath(tempfile.mkdtemp(prefix="kills-")))
    try:
        scenes = prepare(folder, options.commands.split(","))
        rounds = [scenes[i % len(scenes)] for i in range(options.count)]
        for number, scene in enumerate(rounds):
            label, wrong = one_case(scene, folder, rng)
            done[scene.name] += 1
            if wrong:
                failures.append({"case": number, "what": label, "wrong": wrong})
                print(f"{number} {label}\n  " + "\n  ".join(wrong), file=sys.stderr, flush=True)
    finally:
        os.chdir("/")
        shutil.rmtree(folder, ignore_errors=True)
    operations = {scene.start.name: scene.operations for scene in scenes}
    print(json.dumps({"cases": dict(done), "operations": operations, "failures": failures}))
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
