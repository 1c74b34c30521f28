"""Experiment trackers, beside the run's own curves. A package is imported only where it is named.

Each writes to where its own environment variables say (WANDB_MODE, TRACKIO_SPACE_ID,
MLFLOW_TRACKING_URI, …). A run that resumes goes on with the same run of the tracker.
"""

import importlib
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from tqdm import tqdm

from sdpo_jax.system.errors import InputError, first_line
from sdpo_jax.system.files import TEXT, check_keys, read_object, write_json

PROJECT = "sdpo_jax"


class Tracker(Protocol):
    """Where the curves of a stage go."""

    def write(self, step: int, values: Mapping[str, float]) -> None: ...

    def close(self, whole: bool) -> None:
        """`whole`: whether the stage has ended as it should."""


class _WandbLike:
    """Weights & Biases, or Trackio, which has the same calls."""

    def __init__(self, name: str, run: Path, stage: str, config: dict[str, Any]):
        self._module, self._stage = _module(name), stage
        identity = _known_run(name, run) or f"{run.name}-{uuid.uuid4().hex[:8]}"
        settings: dict[str, Any] = {"name": identity}
        if name == "wandb":
            settings = {"name": run.name, "id": identity, "dir": str(run / "metrics")}
        _note_run(name, run, identity)
        self._module.init(project=PROJECT, config=config, resume="allow", **settings)
        if name == "wandb":  # its own steps must rise over both stages
            self._module.define_metric(f"{stage}/*", step_metric=f"{stage}/step")

    def write(self, step: int, values: Mapping[str, float]) -> None:
        line = {f"{self._stage}/{key}": float(value) for key, value in values.items()}
        self._module.log(line | {f"{self._stage}/step": step})

    def close(self, whole: bool) -> None:
        if self._module.__name__ == "wandb":
            self._module.finish(exit_code=0 if whole else 1)
        else:
            self._module.finish()


class _Mlflow:
    def __init__(self, name: str, run: Path, stage: str, config: dict[str, Any]):
        self._module, self._stage = _module(name), stage
        known = _known_run(name, run)
        self._module.set_experiment(PROJECT)
        started = self._module.start_run(run_id=known, run_name=run.name)
        if known is None:
            self._module.log_params(config)
            _note_run(name, run, started.info.run_id)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        line = {f"{self._stage}/{key}": float(value) for key, value in values.items()}
        self._module.log_metrics(line, step=step)

    def close(self, whole: bool) -> None:
        self._module.end_run("FINISHED" if whole else "KILLED")


def open_tracker(name: str, run: Path, stage: str, config: dict[str, Any]) -> Tracker | None:
    """The tracker that config.tracker names, for one stage of the run in the folder `run`.

    `config`: keys and values to show. Raises InputError where the package is missing or cannot
    begin, such as without a login or a server.
    """
    if name == "none":
        return None
    try:
        return (_Mlflow if name == "mlflow" else _WandbLike)(name, run, stage, config)
    except InputError:
        raise
    except Exception as error:  # of the tracker's package, its store and its HTTP client
        raise InputError(
            f"config.tracker is {name!r}, which cannot begin ({first_line(error)}): see to it, or "
            "give --config.tracker=none"
        ) from error


class Lenient:
    """A tracker whose failure ends no training: it is told once, and then left out."""

    def __init__(self, tracker: Tracker):
        self._tracker: Tracker | None = tracker

    def write(self, step: int, values: Mapping[str, float]) -> None:
        self._do(lambda tracker: tracker.write(step, values))

    def close(self, whole: bool) -> None:
        self._do(lambda tracker: tracker.close(whole))

    def _do(self, act: Callable[[Tracker], None]) -> None:
        if self._tracker is None:
            return
        try:
            act(self._tracker)
        except Exception as error:  # as above
            self._tracker = None
            tqdm.write(f"warning: the tracker has failed and gets no more: {first_line(error)}")


def check_tracker(name: str) -> None:
    """Raises InputError where the package of config.tracker is missing."""
    if name != "none":
        _module(name)


def _module(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise InputError(
            f"config.tracker is {name!r}, expected an installed package ({error}): pip install "
            f"{name}, or --config.tracker=none"
        ) from error


def _known_run(name: str, run: Path) -> str | None:
    """The tracker's name for this run, if it has one."""
    file = run / "metrics" / f"{name}.json"
    if not file.exists():
        return None
    found = read_object(file, "expected what training wrote: remove it")
    check_keys(file, found, {"run_id": TEXT}, "remove it")
    return found["run_id"]


def _note_run(name: str, run: Path, identity: str) -> None:
    write_json(run / "metrics" / f"{name}.json", {"run_id": identity})
