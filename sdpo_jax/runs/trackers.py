"""Experiment trackers, beside the run's own curves. A package is imported only where it is named.

Each writes to where its own environment variables say (WANDB_MODE, TRACKIO_SPACE_ID,
MLFLOW_TRACKING_URI, …). A run that resumes goes on with the same run of the tracker.
"""

import importlib
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from sdpo_jax.system.errors import InputError
from sdpo_jax.system.files import TEXT, check_keys, read_object, write_json

PROJECT = "sdpo_jax"


class Tracker(Protocol):
    """Where the curves of a stage go."""

    def write(self, step: int, values: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


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

    def close(self) -> None:
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

    def close(self) -> None:
        self._module.end_run()


def open_tracker(name: str, run: Path, stage: str, config: dict[str, Any]) -> Tracker | None:
    """The tracker that config.tracker names, for one stage of the run in the folder `run`.

    `config`: keys and values to show. Raises InputError where the package is missing.
    """
    if name == "none":
        return None
    return (_Mlflow if name == "mlflow" else _WandbLike)(name, run, stage, config)


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
