"""One workdir is one run: its config, its inputs' fingerprints, its finished stages."""

import contextlib
import dataclasses
import fcntl
import os
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from sdpo_jax.runs.config import RunConfig, keys
from sdpo_jax.system import files
from sdpo_jax.system.errors import InputError, brief

LOCK = ".lock"
RESULT = {
    "stage": files.TEXT,
    "steps": files.COUNT,
    "best_step": files.COUNT,
    "seconds": files.NUMBER,
    "examples": files.COUNT,
    "validation_loss": files.NUMBER,
}
RESTORE = "restore it or choose another --workdir"
PACKAGES = ("jax", "flax", "optax", "orbax-checkpoint", "grain", "transformers", "numpy")


@dataclasses.dataclass(frozen=True)
class Run:
    """A workdir's config.json.

    `fingerprints`: of the inputs, by kind. `wordings`: the prompts' templates before the model's
    chat format; `templates`: after it. A chat format may write the day's date, so the templates are
    stored at the start and read from then on.
    """

    path: Path
    config: RunConfig
    fingerprints: dict[str, str]
    wordings: tuple[str, ...]
    templates: tuple[str, ...]


def open_run(run: Run) -> None:
    """Starts a run in its folder, or checks that the run there is this one.

    Raises InputError as `check_run`, or if the folder cannot be written.
    """
    check_run(run)
    path = run.path / "config.json"
    if not os.path.lexists(path):
        content = {
            "config": run.config.to_dict(),
            "fingerprints": run.fingerprints,
            "versions": {name: version(name) for name in PACKAGES},
            "wordings": run.wordings,
            "templates": run.templates,
        }
        try:
            files.write_json(path, content)
        except OSError as error:
            raise _not_writable(run.path, error) from error


def check_run(run: Run) -> None:
    """Raises InputError if the folder has anything but this run in it, naming changed keys."""
    if not os.path.lexists(run.path / "config.json"):
        try:
            strange = set(os.listdir(run.path)) - {LOCK} if os.path.lexists(run.path) else ()
        except OSError as error:  # no folder, or one that cannot be read
            raise _not_writable(run.path, error) from error
        if strange:
            raise InputError(
                f"{run.path}: not empty and without config.json, so not a run: choose another "
                "--workdir"
            )
        return
    stored = read_run(run.path)
    old, new = stored.fingerprints, run.fingerprints
    before = {name: value for name, _, value in keys(stored.config)}
    changed = [
        f"{name} was {before[name]!r}, now {value!r}"
        for name, field, value in keys(run.config)
        if before[name] != value and not field.metadata["free"]
    ]
    changed += [
        f"fingerprint of {kind} was {old.get(kind)!r}, now {new.get(kind)!r}"
        for kind in sorted(old | new)
        if old.get(kind) != new.get(kind)
    ]
    changed += _changed_wordings(stored.wordings, run.wordings)
    if changed:
        raise InputError(
            f"{run.path}: holds a run with another config ({'; '.join(changed)}): give the old "
            "values to resume it, or another --workdir to start a new one"
        )


def _changed_wordings(before: Sequence[str], now: Sequence[str]) -> Iterator[str]:
    """The templates that differ, shown from the first character that does."""
    if len(before) != len(now):
        yield f"{len(before)} prompt templates, now {len(now)}"
        return
    for number, (old, new) in enumerate(zip(before, now, strict=True), 1):
        if old != new:
            start = max(0, _first_difference(old, new) - 10)
            yield (
                f"prompt template {number} was …{brief(old[start : start + 40])}, now "
                f"…{brief(new[start : start + 40])}"
            )


def _first_difference(a: str, b: str) -> int:
    pairs = enumerate(zip(a, b, strict=False))
    return next((place for place, (x, y) in pairs if x != y), min(len(a), len(b)))


@contextlib.contextmanager
def locked(workdir: Path) -> Iterator[None]:
    """Locks `workdir` against other trainers; the system releases it when the process ends.

    Raises InputError if another process holds it, or the folder cannot be written.
    """
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        file = open(workdir / LOCK, "w", encoding="utf-8")  # noqa: SIM115
    except OSError as error:
        raise _not_writable(workdir, error) from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise InputError(
                f"{workdir}: another process is training in it: wait for its end, or choose "
                "another --workdir"
            ) from error
        yield


def _not_writable(workdir: Path, error: OSError) -> InputError:
    return InputError(f"{workdir}: {error.strerror}: choose another --workdir")


def read_run(workdir: Path) -> Run:
    """The run in `workdir`. Raises InputError if there is none, or a broken one."""
    path = Path(workdir) / "config.json"
    if not os.path.lexists(path):
        raise InputError(
            f"{workdir}: found no config.json, expected a run: start one with python -m "
            "sdpo_jax.train --config=configs/quickstart.py --workdir=DIR"
        )
    stored = files.read_json(path, f"expected that of a run: {RESTORE}")
    kinds = {
        "config": files.OBJECT,
        "fingerprints": files.OBJECT,
        "wordings": files.list_of(files.TEXT),
        "templates": files.list_of(files.TEXT),
    }
    files.check_keys(path, stored, kinds, RESTORE)
    files.check_keys(
        path, stored["fingerprints"], dict.fromkeys(stored["fingerprints"], files.TEXT), RESTORE
    )
    return Run(
        Path(workdir),
        RunConfig.of(stored["config"], f"{path}: config.", f": {RESTORE}"),
        stored["fingerprints"],
        tuple(stored["wordings"]),
        tuple(stored["templates"]),
    )


def stored_templates(workdir: Path) -> tuple[str, ...] | None:
    """The templates stored when the run in `workdir` was started; None: no run is there."""
    return read_run(workdir).templates if os.path.lexists(workdir / "config.json") else None


def check_fingerprint(run: Run, kind: str, path: Path | str, found: str) -> None:
    """Raises InputError unless `found` is the run's fingerprint of that kind of input."""
    expected = run.fingerprints.get(kind, "none")
    if found != expected:
        raise InputError(
            f"{path}: found fingerprint {found[:12]}…, expected {expected[:12]}… as in "
            f"{run.path}/config.json: put back the {kind} that the run was trained with"
        )


def run_on(workdir: Path, dataset: Path | str, found: str) -> Run | None:
    """The run in `workdir`, if there is one. Raises InputError if its data set has not `found`."""
    if not os.path.lexists(workdir / "config.json"):
        return None
    run = read_run(workdir)
    check_fingerprint(run, "dataset", dataset, found)
    return run


def stage_result(workdir: Path, stage: str) -> dict[str, Any] | None:
    """The result of a finished stage (steps, best_step, seconds …), else None."""
    path = Path(workdir) / "stages" / f"{stage}.json"
    if not os.path.lexists(path):
        return None
    result = files.read_json(path, f"expected what a finished stage left: {RESTORE}")
    files.check_keys(path, result, RESULT, RESTORE)
    return result


def write_stage_result(workdir: Path, stage: str, result: dict[str, Any]) -> None:
    files.write_json(workdir / "stages" / f"{stage}.json", result)
