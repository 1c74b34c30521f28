"""Runs cells, each command as a child process; a failed cell does not stop the others."""

import collections
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from sdpo_jax.reproduction.cells import Cell, Step


class Stopped(Exception):
    """SIGINT or SIGTERM arrived, and the running command has ended."""


def pasted(command: Sequence[str]) -> str:
    """The command as a line for a shell."""
    return shlex.join(["python", "-m", *command])


def run(
    cells: Sequence[Cell], root: Path, settled: Callable[[dict[Path, str]], object]
) -> dict[Path, str]:
    """Runs the remaining steps of each cell, in order; returns folder -> why its cell failed.

    `settled` is called with the failures so far after each cell not done before. Raises Stopped
    after a signal.
    """
    failed: dict[Path, str] = {}
    pace = Pace()
    for number, cell in enumerate(cells, 1):
        where = f"[{number}/{len(cells)}] {cell.folder.relative_to(root)}"
        if not (left := cell.left()):
            print(f"{where}: done before", flush=True)
            continue
        if broken := [needed.folder for needed in cell.needs if needed.folder in failed]:
            failed[cell.folder] = f"not run, as {broken[0].relative_to(root)} failed"
        else:
            print(f"{where}: {pace.told(cells[number - 1 :])}", flush=True)
            failed |= _cell(cell, left, root, pace)
        print(f"{where}: {failed.get(cell.folder, 'done')}", flush=True)
        settled(failed)
    return failed


def _cell(cell: Cell, steps: Sequence[Step], root: Path, pace: "Pace") -> dict[Path, str]:
    for step in steps:
        log = log_of(cell, step, root)
        started = time.monotonic()
        status = _child(step.command, log)
        pace.took(step, time.monotonic() - started)
        if status or step in cell.left():
            return {cell.folder: f"{step.command[0]}: {_reason(log, status)} (log: {log})"}
    return {}


def log_of(cell: Cell, step: Step, root: Path) -> Path:
    name = "-".join((*cell.folder.relative_to(root).parts, step.command[0].rpartition(".")[2]))
    return root / "logs" / f"{name}.log"


def _child(command: Sequence[str], log: Path) -> int:
    """Runs a command with its output in `log`; returns its exit status. A signal ends it too."""
    log.parent.mkdir(parents=True, exist_ok=True)

    def stop(number, frame):
        raise Stopped

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        with open(log, "w", encoding="utf-8") as file:
            print(pasted(command), file=file, flush=True)
            child = subprocess.Popen(
                [sys.executable, "-m", *command], stdout=file, stderr=subprocess.STDOUT
            )
            try:
                return child.wait()
            except Stopped:
                child.terminate()  # training saves its state first
                child.wait()
                raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _reason(log: Path, status: int) -> str:
    """The last error line of a command's output, else its last line."""
    output = log.read_text(encoding="utf-8", errors="replace").splitlines()[1:]
    lines = [line.strip() for line in output if line.strip()]
    errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    return (errors or lines or [f"exit status {status}"])[-1]


class Pace:
    """Elapsed and remaining time, estimated from the seconds of each kind of command."""

    def __init__(self):
        self._start = time.monotonic()
        self._seconds: dict[str, list[float]] = collections.defaultdict(list)

    def took(self, step: Step, seconds: float) -> None:
        self._seconds[step.command[0]].append(seconds)

    def told(self, cells: Sequence[Cell]) -> str:
        elapsed = f"{clock(time.monotonic() - self._start)} elapsed"
        if not self._seconds:
            return elapsed
        return f"{elapsed}, about {clock(self._expected(cells))} left"

    def _expected(self, cells: Sequence[Cell]) -> float:
        every = [seconds for kind in self._seconds.values() for seconds in kind]
        kinds = [step.command[0] for cell in cells for step in cell.left()]
        known = [self._seconds.get(kind) or every for kind in kinds]
        return sum(sum(seconds) / len(seconds) for seconds in known)


def clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{seconds:02}"
