"""The loop of a stage: steps, validations and checkpoints, until the last step or a signal."""

import dataclasses
import time
from collections.abc import Callable, Iterable

import jax
import numpy as np

from sdpo_jax.objectives.logprobs import Batch
from sdpo_jax.runs.checkpoints import Checkpoints
from sdpo_jax.system.errors import InputError
from sdpo_jax.system.processes import Interrupted, StopSignal
from sdpo_jax.training.progress import Progress
from sdpo_jax.training.step import TrainState


@dataclasses.dataclass
class Loop:
    """The loop of a stage from `state`, which changes with every step, to step `steps`.

    `validate` returns means over the validation examples; `seconds` are of earlier processes.
    """

    name: str
    state: TrainState
    steps: int
    eval_every: int
    checkpoint_every: int
    validate: Callable[[TrainState], dict[str, float]]
    checkpoints: Checkpoints
    progress: Progress
    stop: StopSignal
    seconds: float
    started: float = dataclasses.field(default_factory=time.monotonic)

    def run(
        self,
        step: Callable[[TrainState, Batch], tuple[TrainState, dict[str, jax.Array]]],
        batches: Iterable[Batch],
        tokens: Callable[[int], int],
    ) -> None:
        """Runs `step` on each batch; `tokens` returns the number of real tokens of a step.

        Raises Interrupted after a signal, with the state saved, and NotANumber.
        """
        first = int(self.state.step)
        if self.due(first) and first not in self.checkpoints.losses():
            self.validate_and_save()
        for done, batch in enumerate(batches, first + 1):
            self.state, metrics = step(self.state, batch)
            self.progress.step(metrics, tokens(done))
            stop = self.stop.ask()
            if self.due(done):
                self.validate_and_save()
            elif stop or done % self.checkpoint_every == 0:
                self.save()
            if done < self.steps:
                self.stop.check()
        self.checkpoints.wait()

    def due(self, step: int) -> bool:
        """Whether the state after `step` is validated."""
        return step == self.steps or step % self.eval_every == 0

    def elapsed(self) -> float:
        """Seconds of the stage so far, earlier processes included."""
        return self.seconds + time.monotonic() - self.started

    def save(self, loss: float | None = None) -> None:
        self.progress.settle()  # raises rather than saving a state from NaN
        self.checkpoints.save(self.state, {"seconds": self.elapsed()}, loss)

    def validate_and_save(self) -> None:
        try:
            self.progress.settle()
            with self.progress.paused():
                values = self.validate(self.state)
        except Interrupted:
            self.save()  # the next run validates this step first
            raise
        self.progress.validation(values)
        if not np.isfinite(values["loss"]):
            raise InputError(
                f"{self.name} step {int(self.state.step)}: the validation loss is "
                f"{values['loss']}, expected a number: the step before is kept; start in "
                f"another --workdir with a lower --config.{self.name}.learning_rate"
            )
        self.save(values["loss"])
