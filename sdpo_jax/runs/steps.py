"""The checkpoints of a run and their adapters. The base counts as step 0 of stage `base`."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from absl import logging
from flax import nnx

from sdpo_jax.runs.checkpoints import Checkpoints
from sdpo_jax.runs.workdir import Run, stage_result
from sdpo_jax.system.errors import InputError

LISTINGS = 10  # tries to list a folder from which steps vanish meanwhile


@contextlib.contextmanager
def _open(run: Run, stage: str) -> Iterator[Checkpoints]:
    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.ERROR)  # Orbax warns three times that read-only is read-only
    try:
        checkpoints = _listed(run.path / stage)
    finally:
        logging.set_verbosity(verbosity)
    try:
        yield checkpoints
    finally:
        checkpoints.close()


def _listed(folder: Path) -> Checkpoints:
    """Orbax lists a folder, then reads each step's time: one may be deleted in between."""
    for _ in range(LISTINGS):
        try:
            return Checkpoints(folder, read_only=True)
        except FileNotFoundError as error:
            gone = error
    raise InputError(
        f"{folder}: checkpoints vanish while they are listed ({gone}), expected a run's folder: "
        "was it deleted? if not, run this again"
    )


def steps(run: Run, stage: str) -> list[int]:
    """Steps with a complete checkpoint."""
    if stage == "base":
        return [0]
    if not (run.path / stage).is_dir():
        return []
    with _open(run, stage) as checkpoints:
        return checkpoints.steps()


def adapter(run: Run, stage: str, step: int, fresh: nnx.State) -> nnx.State:
    """The adapter of a step; the base's is the fresh one, whose B is zero.

    Raises CheckpointGone.
    """
    if stage == "base":
        return fresh
    with _open(run, stage) as checkpoints:
        return checkpoints.restore_lora(step, fresh)


def raw_adapter(run: Run, stage: str, step: int) -> dict:
    """The adapter of a step as host arrays in nested dicts, for a reader without the model."""
    with _open(run, stage) as checkpoints:
        return checkpoints.restore_raw(step)


def last_finished(run: Run) -> str:
    """The last finished stage. Raises InputError if there is none."""
    for stage in reversed(run.config.stages):
        if stage_result(run.path, stage) is not None:
            return stage
    raise InputError(
        f"{run.path}: found no finished stage, expected one of {', '.join(run.config.stages)}: "
        "finish training, name a --stage (base needs none), or give --follow"
    )


def choose_step(run: Run, stage: str, wanted: int | None) -> int:
    """`wanted`, or the stage's best step. Raises InputError if it is not there."""
    found = steps(run, stage)
    if not found:
        raise InputError(
            f"{run.path}/{stage}: found no checkpoint, expected one: train the stage first, or "
            "give --stage=base"
        )
    if wanted is not None and wanted not in found:
        raise InputError(
            f"--step: found {wanted}, expected a step that {run.path} holds for {stage}: "
            f"{', '.join(map(str, found))}"
        )
    if wanted is not None:
        return wanted
    if stage == "base":
        return 0
    if result := stage_result(run.path, stage):
        if result["best_step"] not in found:
            raise InputError(
                f"{run.path}/stages/{stage}.json: found best_step {result['best_step']}, expected "
                f"a step that is there: {', '.join(map(str, found))}: give one with --step"
            )
        return result["best_step"]
    with _open(run, stage) as checkpoints:
        return checkpoints.best_step()
