"""Run mutations: each in a forked copy of this process, watched for crashes, hangs, tracebacks and leftovers.

Every mutation is drawn from `SEED/INDEX` alone, so that a finding is run again by its index:

    .venv/bin/python -m tests.fuzz.campaign --seed 1 --mutations 3000
    .venv/bin/python -m tests.fuzz.campaign --seed 1 --only 312 --show

`--intact` runs every command on inputs that are not broken first: a campaign behind a refusal that is always the same
would show nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from tests.fuzz.inputs import make_inputs
from tests.fuzz.mutations import mutate
from tests.fuzz.targets import ARGUMENTS, TARGETS, VALUES, Target, files_of, repair_manifest
from trtllm_redrafter.errors import RedrafterError

LIMIT_SECONDS = 60.0
MAX_RESIDENT = 3 * 2**30
KNOWN_CODES = {0, 1, *(kind.exit_code for kind in RedrafterError.__subclasses__())}
NEED_A_GPU = {"run --engine trt --prompt hi": 6, "bench trt --batch 1": 2}
SHARE_OF_ARGUMENTS = 0.15
SHARE_OF_JSON = 0.2


@dataclass(frozen=True)
class Case:
    """One mutation and what ran on it. `fault` None: it ended as it should."""

    index: int
    what: str
    commands: tuple[str, ...]
    codes: tuple[int, ...]
    seconds: float
    fault: str | None
    output: str = ""

    def render(self) -> str:
        ran = "\n    ".join(self.commands)
        return f"mutation {self.index}: {self.what}\n    {ran}\n  {self.fault}\n{self.output[-1500:]}"


@dataclass
class Totals:
    """Figures of a campaign."""

    cases: int = 0
    codes: Counter[int] = field(default_factory=Counter)
    commands: Counter[str] = field(default_factory=Counter)
    faults: list[Case] = field(default_factory=list)
    slowest: float = 0.0

    def add(self, case: Case) -> None:
        self.cases += 1
        self.codes.update(case.codes[-1:])
        self.commands.update(command.split()[0] for command in case.commands[: len(case.codes)])
        self.slowest = max(self.slowest, case.seconds)
        if case.fault is not None:
            self.faults.append(case)

    def render(self) -> str:
        codes = ", ".join(f"{code}: {n}" for code, n in sorted(self.codes.items()))
        ran = ", ".join(f"{name} {n}" for name, n in sorted(self.commands.items()))
        return (
            f"{self.cases} mutations, {len(self.faults)} faults; slowest {self.slowest:.1f} s\n"
            f"exit codes of the last command: {codes}\ncommands: {ran}"
        )


def run_case(inputs: Path, seed: int, index: int) -> Case:
    """Copy the inputs, break one, run a chain of commands on it."""
    rng = random.Random(f"{seed}/{index}")
    with tempfile.TemporaryDirectory(prefix="redrafter-fuzz-") as name:
        folder = Path(name) / "w"
        shutil.copytree(inputs, folder, copy_function=os.link)
        if rng.random() < SHARE_OF_ARGUMENTS:
            what, chain = "arguments", (_with_values(rng.choice(ARGUMENTS), rng),)
        else:
            target = rng.choice([t for t in TARGETS for _ in range(t.weight)])
            what, chain = _break(target, folder, rng), split(rng.choice(target.chains))
        if rng.random() < SHARE_OF_JSON:
            chain = tuple(arguments if "--json" in arguments else (*arguments, "--json") for arguments in chain)
        return run_chain(chain, folder, index, what)


def _with_values(line: str, rng: random.Random) -> tuple[str, ...]:
    return tuple(part.replace("{out}", "out").replace("{v}", rng.choice(VALUES)) for part in line.split())


def _break(target: Target, folder: Path, rng: random.Random) -> str:
    what = f"{target.name}/{mutate(rng.choice(files_of(target, folder)), rng)}"
    if target.manifest is not None:
        what += f" (manifest {repair_manifest(folder / target.manifest, rng)})"
    return what


def split(lines: Iterable[str]) -> tuple[tuple[str, ...], ...]:
    """The commands of a chain as arguments."""
    return tuple(tuple(line.format(out="out").split()) for line in lines)


def run_chain(chain: Iterable[tuple[str, ...]], folder: Path, index: int, what: str) -> Case:
    ran: list[str] = []
    codes: list[int] = []
    started, fault, output = time.monotonic(), None, ""
    before = {p.name for p in folder.iterdir()}
    for arguments in chain:
        ran.append(" ".join(a if len(a) < 80 else a[:77] + "..." for a in map(ascii_, arguments)))
        code, fault, output = _run(arguments, folder)
        codes.append(code)
        if code == 0:
            before = {p.name for p in folder.iterdir()}
            continue
        left = {p.name for p in folder.iterdir()} - before - {"work", "runs", "out.jsonl"}
        if fault is None and left:
            fault = f"exit code {code}, and {sorted(left)} left behind"
        break
    return Case(index, what, tuple(ran), tuple(codes), time.monotonic() - started, fault, output)


def ascii_(text: str) -> str:
    return ascii(text)[1:-1]


def _run(arguments: tuple[str, ...], folder: Path) -> tuple[int, str | None, str]:
    """Exit code, what was wrong about it, and what was printed."""
    with tempfile.TemporaryFile() as log:
        pid = os.fork()
        if pid == 0:
            _child(arguments, folder, log.fileno())
        status, resident, timed_out = _wait(pid)
        log.seek(0)
        output = log.read().decode("utf-8", "replace")
    code = os.waitstatus_to_exitcode(status)
    if timed_out:
        return code, f"still running after {LIMIT_SECONDS:.0f} s", output
    if code < 0:
        return code, f"ended by signal {signal.Signals(-code).name}", output
    if code not in KNOWN_CODES or "Traceback (most recent call last)" in output or "internal error" in output:
        return code, f"exit code {code}, or a traceback", output
    if code == 1 and "error:" not in output:
        return code, "exit code 1 without a message", output
    if "\x1b[31mred" in output:
        return code, "an escape sequence of a file was printed raw", output
    if "--json" in arguments and not _ends_with_json(output):
        return code, "--json, and the last line is no JSON document", output
    if resident > MAX_RESIDENT:
        return code, f"{resident / 2**30:.1f} GiB of memory", output
    return code, None, output


def _ends_with_json(output: str) -> bool:
    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is not JSON")

    try:
        document = json.loads(output.rstrip("\n").rpartition("\n")[2], parse_constant=refuse)
    except (ValueError, RecursionError):
        return False
    return isinstance(document, dict) and isinstance(document.get("ok"), bool)


def _child(arguments: tuple[str, ...], folder: Path, log: int) -> None:
    """The program in this copy of the process; never returns."""
    code = 99
    try:
        os.setsid()
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(log, 1)
        os.dup2(log, 2)
        sys.stdin, sys.stdout, sys.stderr = open(0), open(1, "w"), open(2, "w", errors="backslashreplace")  # noqa: SIM115
        os.chdir(folder)
        os.environ["NO_COLOR"] = "1"
        from trtllm_redrafter.cli import run_app

        code = run_app(arguments)
    except BaseException:  # noqa: BLE001 - whatever it is, it is the finding
        traceback.print_exc()
    finally:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os._exit(code)


def _wait(pid: int) -> tuple[int, int, bool]:
    """Wait status, peak resident bytes, and whether the limit ended it."""
    deadline, pause = time.monotonic() + LIMIT_SECONDS, 0.001
    while True:
        done, status, usage = os.wait4(pid, os.WNOHANG)
        if done:
            return status, usage.ru_maxrss * 1024, False
        if time.monotonic() > deadline:
            os.killpg(pid, signal.SIGKILL)
            _, status, usage = os.wait4(pid, 0)
            return status, usage.ru_maxrss * 1024, True
        time.sleep(pause)
        pause = min(pause * 1.5, 0.05)


def warm_up() -> None:
    """Import once what every child needs, with one thread: threads do not survive a fork."""
    os.environ |= {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    import torch
    import transformers

    torch.set_num_threads(1)
    assert transformers.AutoTokenizer and transformers.AutoModelForCausalLM
    import trtllm_redrafter.benchmark.bench
    import trtllm_redrafter.benchmark.tuning
    import trtllm_redrafter.cli
    import trtllm_redrafter.training  # noqa: F401


def campaign(inputs: Path, seed: int, indices: Iterable[int], *, show: bool = False) -> Totals:
    totals = Totals()
    for index in indices:
        case = run_case(inputs, seed, index)
        totals.add(case)
        if case.fault is not None or show:
            print(case.render(), flush=True)
        if totals.cases % 250 == 0:
            print(f"-- {totals.render()}", flush=True)
    return totals


def intact_faults(inputs: Path) -> list[Case]:
    """Chains that do not end as they should on inputs that nobody has broken."""
    found = []
    for number, lines in enumerate(dict.fromkeys(chain for target in TARGETS for chain in target.chains)):
        with tempfile.TemporaryDirectory(prefix="redrafter-fuzz-") as name:
            shutil.copytree(inputs, Path(name) / "w", copy_function=os.link)
            case = run_chain(split(lines), Path(name) / "w", number, "nothing")
        if case.fault is not None or case.codes[-1] != NEED_A_GPU.get(lines[-1], 0):
            found.append(case)
            print(case.render(), flush=True)
    return found


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--mutations", type=int, default=3000)
    parser.add_argument("--start", type=int, default=0)
    parser.add_argument("--only", type=int, action="append")
    parser.add_argument("--intact", action="store_true", help="run every command on intact inputs first")
    parser.add_argument("--show", action="store_true", help="show cases that ended well too")
    args = parser.parse_args()
    warm_up()
    with tempfile.TemporaryDirectory(prefix="redrafter-fuzz-inputs-") as folder:
        inputs = make_inputs(Path(folder) / "inputs")
        if args.intact and intact_faults(inputs):
            return 1
        indices = args.only or range(args.start, args.start + args.mutations)
        totals = campaign(inputs, args.seed, indices, show=args.show)
    print(totals.render())
    return 1 if totals.faults else 0


if __name__ == "__main__":
    sys.exit(main())
