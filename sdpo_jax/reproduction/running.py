"""Runs cells, several at once, each command as a child process.

A failed cell does not stop the others.
"""

import collections
import contextlib
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from sdpo_jax.reproduction.cells import Cell, Step

POLL = 0.05  # seconds between two looks at the children


class Stopped(Exception):
    """SIGINT or SIGTERM arrived, and the running commands have ended."""


def pasted(command: Sequence[str]) -> str:
    """The command as a line for a shell."""
    return shlex.join(["python", "-m", *command])


def run(
    cells: Sequence[Cell],
    root: Path,
    settled: Callable[[dict[Path, str]], object],
    jobs: int = 1,
) -> dict[Path, str]:
    """Runs the remaining steps of each cell; returns folder -> why its cell failed.

    Up to `jobs` cells run at once, each once the cells that it needs are usable. `settled` is
    called with the failures so far after each cell not done before. Raises Stopped after a signal.
    """
    failed: dict[Path, str] = {}
    pace = Pace()
    waiting, active = list(cells), list[_Active]()
    with _noted_signals() as signals, _children(active):
        while waiting or active:
            if signals:
                raise Stopped
            for one in [one for one in active if one.ended(pace)]:
                active.remove(one)
                failed |= one.failed
                found = failed.get(one.cell.folder, "done")
                print(f"{_where(one.cell, cells, root)}: {found}", flush=True)
                settled(failed)
            for cell in _ready(waiting, active)[: jobs - len(active)]:
                waiting.remove(cell)
                where = _where(cell, cells, root)
                if not cell.left():
                    print(f"{where}: done before", flush=True)
                elif broken := [need for need in cell.needs if not need.usable(need.left())]:
                    where_broken = broken[0].folder.relative_to(root)
                    failed[cell.folder] = f"not run, as {where_broken} failed"
                    print(f"{where}: {failed[cell.folder]}", flush=True)
                    settled(failed)
                else:
                    of_active = [one.cell for one in active]
                    print(f"{where}: {pace.told([*of_active, cell, *waiting], jobs)}", flush=True)
                    active.append(_Active(cell, root, shared=jobs > 1))
            if active:
                time.sleep(POLL)
    return failed


def _ready(waiting: Sequence[Cell], active: Sequence["_Active"]) -> list[Cell]:
    """The cells whose needed cells are usable or have ended."""
    missing = {cell.folder for cell in waiting} | {one.cell.folder for one in active if one.held}
    return [cell for cell in waiting if not missing & {need.folder for need in cell.needs}]


def _where(cell: Cell, cells: Sequence[Cell], root: Path) -> str:
    return f"[{cells.index(cell) + 1}/{len(cells)}] {cell.folder.relative_to(root)}"


class _Active:
    """A cell whose remaining steps run one after the other, each as a child process."""

    def __init__(self, cell: Cell, root: Path, shared: bool):
        self.cell, self.failed = cell, dict[Path, str]()
        self._root, self._steps = root, cell.left()
        # Several processes on one device: none may take most of its memory first.
        self._environment = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"} if shared else {}
        self._begin()

    @property
    def held(self) -> bool:
        """Whether the cells that need this one must wait."""
        return not self.cell.usable(self._steps)

    def ended(self, pace: "Pace") -> bool:
        """Whether the cell has ended; starts its next step where one has."""
        status = self.child.poll()
        if status is None:
            return False
        step = self._steps.pop(0)
        pace.took(step, time.monotonic() - self._started)
        if status or step in self.cell.left():
            log = log_of(self.cell, step, self._root)
            self.failed[self.cell.folder] = (
                f"{step.command[0]}: {_reason(log, status)} (log: {log})"
            )
        if self.failed or not self._steps:
            return True
        self._begin()
        return False

    def _begin(self) -> None:
        command = self._steps[0].command
        log = log_of(self.cell, self._steps[0], self._root)
        log.parent.mkdir(parents=True, exist_ok=True)
        self._started = time.monotonic()
        with log.open("w", encoding="utf-8") as file:
            print(pasted(command), file=file, flush=True)
            self.child = subprocess.Popen(
                [sys.executable, "-m", *command],
                stdout=file,
                stderr=subprocess.STDOUT,
                env=self._environment | os.environ,
            )


@contextlib.contextmanager
def _children(active: Sequence[_Active]) -> Iterator[None]:
    """Ends what is left of them, however this ends; training saves its state first."""
    try:
        yield
    finally:
        for one in active:
            one.child.terminate()
        for one in active:
            one.child.wait()


@contextlib.contextmanager
def _noted_signals() -> Iterator[list[int]]:
    """The numbers of the SIGINTs and SIGTERMs that arrive, in place of their effect."""
    found: list[int] = []
    before = {
        number: signal.signal(number, lambda number, frame: found.append(number))
        for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield found
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def log_of(cell: Cell, step: Step, root: Path) -> Path:
    same = [one for one in cell.steps if one.command[0] == step.command[0]]
    number = f"-{same.index(step) + 1}" if len(same) > 1 else ""
    name = "-".join((*cell.folder.relative_to(root).parts, step.command[0].rpartition(".")[2]))
    return root / "logs" / f"{name}{number}.log"


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

    def told(self, cells: Sequence[Cell], jobs: int = 1) -> str:
        """The line of progress when `cells` are left, `jobs` at once."""
        elapsed = f"{clock(time.monotonic() - self._start)} elapsed"
        if not self._seconds:
            return elapsed
        return f"{elapsed}, about {clock(self._expected(cells) / jobs)} left"

    def _expected(self, cells: Sequence[Cell]) -> float:
        every = [seconds for kind in self._seconds.values() for seconds in kind]
        kinds = [step.command[0] for cell in cells for step in cell.left()]
        known = [self._seconds.get(kind) or every for kind in kinds]
        return sum(sum(seconds) / len(seconds) for seconds in known)


def clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{seconds:02}"
