"""One workdir is one run: its config, what it was made from, and which stages are finished."""

import contextlib
import fcntl
import json
import os
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from flax.traverse_util import unflatten_dict

from sdpo_jax.config import KINDS
from sdpo_jax.errors import InputError, shown
from sdpo_jax.files import COUNT, NUMBER, OBJECT, TEXT, check_keys, list_of, read_json

# Keys that may change when a run goes on: the numbers that it computes do not depend on them.
FREE = ("mesh.", "distributed.", "profile_steps")
LOCK = ".lock"
# Keys of a stored config without which a run cannot be evaluated, reported or exported.
READ = (
    "dataset", "model", "seed", "stages", "prompt", "history", "prompt_file", "chat_template",
    "max_length", "negatives", "redraw", "best_by", "tune",
    "batch_size", "num_negatives", "objective", "beta", "validation_split", "dtype", "base_dtype",
    "lora.rank", "lora.alpha", "lora.dropout", "lora.targets", "lora.init_from", "item_vectors",
    "mesh.fsdp", "mesh.tensor",
)  # fmt: skip
RESULT = {
    "stage": TEXT, "steps": COUNT, "best_step": COUNT, "seconds": NUMBER, "examples": COUNT,
    "validation_loss": NUMBER,
}  # fmt: skip
RESTORE = "restore it or choose another --workdir"
PACKAGES = ("jax", "flax", "optax", "orbax-checkpoint", "grain", "transformers", "numpy")


def write_json(path: Path, content: Any) -> None:
    """Writes JSON whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    partial.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    os.replace(partial, path)


def open_run(workdir: Path, config: dict[str, Any], fingerprints: dict[str, str],
             wordings: Sequence[str], templates: Sequence[str]) -> None:  # fmt: skip
    """Starts a run in `workdir`, or checks that what is there is this very run.

    `wordings`: its templates before the model's chat format; `templates`: after it. A chat format
    may write the day's date, so what the run was started with is kept, and read ever after.

    Raises:
      InputError: what `check_run` raises, or the folder cannot be written.
    """
    check_run(workdir, config, fingerprints, wordings)
    path = workdir / "config.json"
    if not os.path.lexists(path):
        versions = {name: version(name) for name in PACKAGES}
        content = {
            "config": config, "fingerprints": fingerprints, "versions": versions,
            "wordings": [*wordings], "templates": [*templates],
        }  # fmt: skip
        try:
            write_json(path, content)
        except OSError as error:
            raise _not_writable(workdir, error) from error


def check_run(workdir: Path, config: dict[str, Any], fingerprints: dict[str, str],
              wordings: Sequence[str]) -> None:  # fmt: skip
    """Raises InputError where `workdir` holds anything but this run, naming the keys."""
    path = workdir / "config.json"
    if not os.path.lexists(path):
        try:
            strange = set(os.listdir(workdir)) - {LOCK} if os.path.lexists(workdir) else ()
        except OSError as error:  # no folder, or one that cannot be read
            raise _not_writable(workdir, error) from error
        if strange:
            raise InputError(
                f"{workdir}: not empty and without config.json, so not a run: choose another "
                "--workdir"
            )
        return
    config = json.loads(json.dumps(config))  # tuples become lists, as they are when read back
    stored = _read(path)
    before = _flat(stored["config"]) | _flat(stored["fingerprints"], "fingerprint of ")
    now = _flat(config) | _flat(fingerprints, "fingerprint of ")
    changed = [
        f"{key} was {before.get(key)!r}, now {now.get(key)!r}"
        for key in sorted(before | now)
        if before.get(key) != now.get(key) and not key.startswith(FREE)
    ]
    changed += _changed_wordings(stored["wordings"], wordings)
    if changed:
        raise InputError(
            f"{workdir}: holds a run with another config ({'; '.join(changed)}): give the old "
            "values to go on, or another --workdir to start anew"
        )


def _changed_wordings(before: Sequence[str], now: Sequence[str]) -> Iterator[str]:
    """Which templates are others, from the first character that is."""
    if len(before) != len(now):
        yield f"{len(before)} prompt templates, now {len(now)}"
        return
    for number, (old, new) in enumerate(zip(before, now, strict=True), 1):
        if old != new:
            start = max(0, _first_difference(old, new) - 10)
            yield (
                f"prompt template {number} was …{shown(old[start : start + 40])}, now "
                f"…{shown(new[start : start + 40])}"
            )


def _first_difference(a: str, b: str) -> int:
    pairs = enumerate(zip(a, b, strict=False))
    return next((place for place, (x, y) in pairs if x != y), min(len(a), len(b)))


@contextlib.contextmanager
def locked(workdir: Path) -> Iterator[None]:
    """Keeps other trainers out of `workdir`; the system ends the lock with the process.

    Raises InputError where another holds it, or the folder cannot be written.
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


def read_run(workdir: Path) -> SimpleNamespace:
    """`.path`, `.config` (attributes all the way down), `.fingerprints`, `.templates` of a run.

    Raises InputError when `workdir` holds no run.
    """
    path = Path(workdir) / "config.json"
    if not os.path.lexists(path):
        raise InputError(
            f"{workdir}: found no config.json, expected a run: start one with python -m "
            "sdpo_jax.train --config=configs/quickstart.py --workdir=DIR"
        )
    stored = _read(path)
    flat = _flat(stored["config"])
    check_keys(path, flat, {k if k in READ else f"{k}?": KINDS[k] for k in KINDS}, RESTORE)
    check_keys(path, stored["fingerprints"], dict.fromkeys(stored["fingerprints"], TEXT), RESTORE)
    try:
        config = _namespace(unflatten_dict(flat, sep="."))
    except TypeError as error:  # of a key that is both a value and an object
        raise InputError(f"{path}: config: found {error}, expected keys: {RESTORE}") from error
    return SimpleNamespace(
        path=Path(workdir),
        config=config,
        fingerprints=stored["fingerprints"],
        templates=tuple(stored["templates"]),
    )


def kept_templates(workdir: Path) -> tuple[str, ...] | None:
    """The templates of the run in `workdir`, as they were when it was started; None: none is."""
    path = workdir / "config.json"
    return tuple(_read(path)["templates"]) if os.path.lexists(path) else None


def same(run: SimpleNamespace, kind: str, path: Path | str, found: str) -> None:
    """Raises InputError unless `found` is the run's fingerprint of a dataset or model."""
    expected = run.fingerprints.get(kind, "none")
    if found != expected:
        raise InputError(
            f"{path}: found fingerprint {found[:12]}…, expected {expected[:12]}… as in "
            f"{run.path}/config.json: put back the {kind} that the run was trained with"
        )


def same_dataset(workdir: Path, dataset: Path | str, found: str) -> None:
    """Raises InputError where `workdir` is a run of another data set than `dataset`."""
    if os.path.lexists(workdir / "config.json"):
        same(read_run(workdir), "dataset", dataset, found)


def stage_result(workdir: Path, stage: str) -> dict[str, Any] | None:
    """What a finished stage left (steps, best_step, validation_loss, seconds …), else None."""
    path = Path(workdir) / "stages" / f"{stage}.json"
    if not os.path.lexists(path):
        return None
    result = read_json(path, f"expected what a finished stage left: {RESTORE}")
    check_keys(path, result, RESULT, RESTORE)
    return result


def write_stage_result(workdir: Path, stage: str, result: dict[str, Any]) -> None:
    write_json(workdir / "stages" / f"{stage}.json", result)


def _read(path: Path) -> dict[str, Any]:
    """The config.json of a run."""
    stored = read_json(path, f"expected that of a run: {RESTORE}")
    kinds = {"config": OBJECT, "fingerprints": OBJECT,
             "wordings": list_of(TEXT), "templates": list_of(TEXT)}  # fmt: skip
    check_keys(path, stored, kinds, RESTORE)
    return stored


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def _namespace(tree: Any) -> Any:
    if isinstance(tree, dict):
        return SimpleNamespace(**{key: _namespace(value) for key, value in tree.items()})
    return tree
