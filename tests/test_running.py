"""Cells of a study: run in order, several at once, and not again once they are done."""

import dataclasses
import os
import re
import signal
import threading

import pytest

from sdpo_jax.reproduction import running
from sdpo_jax.reproduction.cells import Cell, Step


def copier(folder, name, needs=(), content="{}"):
    """A cell whose one command writes out.json, unless `content` is no JSON."""
    source = folder.parent / f"{name}.json"
    folder.mkdir(parents=True, exist_ok=True)
    source.write_text(content)
    command = ("json.tool", str(source), str(folder / "out.json"))
    return Cell(folder, (Step(command, ("out.json",)),), needs)


def test_what_is_done_is_not_run_again_and_what_was_killed_is(tmp_path, capsys):
    done, killed = copier(tmp_path / "done", "a"), copier(tmp_path / "killed", "b")
    second = Step(("json.tool", str(tmp_path / "b.json"), str(killed.folder / "2.json")), ("2.*",))
    killed = dataclasses.replace(killed, steps=(*killed.steps, second))
    assert running.run([done], tmp_path, dict) == {}
    (killed.folder / "out.json").write_text("the first step's")
    times = [path.stat().st_mtime_ns for path in sorted(tmp_path.glob("*/out.json"))]
    assert running.run([done, killed], tmp_path, dict) == {}
    assert [path.stat().st_mtime_ns for path in sorted(tmp_path.glob("*/out.json"))] == times
    assert (killed.folder / "2.json").exists()
    lines = capsys.readouterr().out.splitlines()
    assert lines[2] == "[1/2] done: done before" and lines[-1] == "[2/2] killed: done"


def test_a_failing_cell_is_told_and_the_others_go_on(tmp_path):
    broken = copier(tmp_path / "broken", "a", content="{")
    after, other = copier(tmp_path / "after", "b", (broken,)), copier(tmp_path / "other", "c")
    heard = []
    failed = running.run([broken, after, other], tmp_path, lambda now: heard.append(dict(now)))
    assert list(failed) == [broken.folder, after.folder] and not other.left()
    assert re.match(r"json\.tool: .*Expecting property name", failed[broken.folder])
    assert failed[after.folder] == "not run, as broken failed"
    assert [len(now) for now in heard] == [1, 2, 2]
    log = running.log_of(broken, broken.steps[0], tmp_path)
    assert log.read_text().splitlines()[0] == running.pasted(broken.steps[0].command)


def test_a_command_that_leaves_nothing_has_failed(tmp_path):
    cell = Cell(tmp_path / "cell", (Step(("json.tool", "--help"), ("out.json",)),))
    assert "json.tool" in running.run([cell], tmp_path, dict)[cell.folder]


def test_a_signal_ends_the_command_that_runs_and_then_this_one(tmp_path):
    sleep = Step(("timeit", "-n1", "-r1", "import time; time.sleep(60)"), ("never",))
    threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGTERM)).start()
    with pytest.raises(running.Stopped):
        running.run([Cell(tmp_path / "cell", (sleep,))], tmp_path, dict)


def test_the_wait_is_told_from_what_commands_of_each_kind_took(tmp_path):
    pace = running.Pace()
    cell = copier(tmp_path / "cell", "a")
    assert "left" not in pace.told([cell])
    pace.took(cell.steps[0], 90.0)
    pace.took(Step(("other",), ()), 10.0)
    assert pace.told([cell, cell]).endswith("about 0:03:00 left")
    assert running.clock(3661.2) == "1:01:01"


def waiter(root, name: str, other: str, needs=()) -> Cell:
    """A cell whose one command waits for the file `other`, and notes whether it came."""
    folder = root / name
    folder.mkdir()
    program = (
        "import os, time; from pathlib import Path; "
        f"Path({str(folder / 'begun')!r}).touch(); "
        f"[time.sleep(0.05) for _ in range(400) if not Path({other!r}).exists()]; "
        f"Path({str(folder / 'out')!r}).write_text(str(Path({other!r}).exists()))"
    )
    return Cell(folder, (Step(("timeit", "-n1", "-r1", program), ("out",)),), needs)


def test_cells_run_at_once_and_each_after_those_that_it_needs(tmp_path):
    """Two that wait for each other's file end only if both run; the third needs them."""

    first = waiter(tmp_path, "first", str(tmp_path / "second" / "begun"))
    second = waiter(tmp_path, "second", str(tmp_path / "first" / "begun"))
    third = waiter(tmp_path, "third", str(tmp_path / "first" / "out"), (first, second))
    assert running.run([third, first, second], tmp_path, dict, jobs=2) == {}
    assert {(cell.folder / "out").read_text() for cell in (first, second, third)} == {"True"}


def test_a_cell_starts_once_the_steps_that_it_needs_are_done(tmp_path):
    """The needed cell's last step ends only if the other runs beside it."""
    first = copier(tmp_path / "first", "a")
    last = waiter(tmp_path, "last", str(tmp_path / "after" / "out.json")).steps[0]
    last = dataclasses.replace(last, leaves=("../last/out",))
    first = dataclasses.replace(first, steps=(*first.steps, last), shared=1)
    after = copier(tmp_path / "after", "b", (first,))
    assert running.run([first, after], tmp_path, dict, jobs=2) == {}
    assert (tmp_path / "last" / "out").read_text() == "True"


def test_a_step_that_no_cell_needs_may_fail(tmp_path):
    first = copier(tmp_path / "first", "a")
    failing = Step(("json.tool", "missing.json"), ("never",))
    first = dataclasses.replace(first, steps=(*first.steps, failing), shared=1)
    after = copier(tmp_path / "after", "b", (first,))
    assert list(running.run([first, after], tmp_path, dict)) == [first.folder]
    assert not after.left()
