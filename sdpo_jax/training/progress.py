"""What a person sees of a stage, and what goes to the curves."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

import jax
import numpy as np
from tqdm import tqdm

from sdpo_jax.training.metrics import MetricsWriter


def progress_bar(batches: Iterable, name: str, total: int, done: int, batch_size: int) -> Iterator:
    """Yields `batches` and shows examples, rate and ETA; `done` of `total` examples came before."""
    with tqdm(total=total, initial=done, unit="ex", desc=name, mininterval=1) as bar:
        for batch in batches:
            yield batch
            bar.update(min(batch_size, total - bar.n))


def summary(values: Mapping[str, float], prefix: str = "") -> str:
    """`loss 1.3863 margin 0.0100 accuracy 0.2500`, of what is there."""
    names = {
        "loss": "loss",
        "loss_per_token": "per token",
        "rewards/margins": "margin",
        "rewards/accuracies": "accuracy",
    }
    return " ".join(
        f"{short} {values[prefix + name]:.4f}"
        for name, short in names.items()
        if prefix + name in values
    )


class Progress:
    """The bar of a stage and its lines in metrics.jsonl and TensorBoard.

    Args:
      folder: workdir/metrics.
      stage: its name.
      first: steps done before this process, of `steps` in all.
      batch_size: examples a step.
      log_every: steps whose metrics are averaged into one line.
      schedule: step -> learning rate.
    """

    def __init__(self, folder: Path, stage: str, first: int, steps: int, batch_size: int,
                 log_every: int, schedule: Callable):  # fmt: skip
        self._stage, self._done, self._steps = stage, first, steps
        self._batch_size, self._log_every, self._schedule = batch_size, log_every, schedule
        self._pending: list[dict[str, jax.Array]] = []
        self._writer = MetricsWriter(folder, stage, first)
        self._bar = tqdm(
            total=steps * batch_size, initial=first * batch_size, unit="ex", desc=stage,
            mininterval=1, smoothing=0.1,
        )  # fmt: skip

    def step(self, metrics: dict[str, jax.Array]) -> None:
        """Takes the metrics of one more step, which may still be running."""
        self._done += 1
        self._pending.append(metrics)
        if len(self._pending) > 1:
            # One step stays queued, so the device never waits and the bar tells the truth.
            jax.block_until_ready(self._pending[-2])
        self._bar.update(self._batch_size)
        if self._done % self._log_every == 0 or self._done == self._steps:
            self._log()

    def _log(self) -> None:
        values = jax.tree.map(lambda *x: float(np.mean(x)), *jax.device_get(self._pending))
        self._pending = []
        values["learning_rate"] = float(self._schedule(self._done - 1))
        values["examples_per_second"] = self._bar.format_dict["rate"] or 0.0
        self._bar.set_postfix_str(summary(values), refresh=False)
        self._write(values)

    def validation(self, values: Mapping[str, float]) -> None:
        """Takes the means over the validation windows after the last step taken."""
        values = {f"validation/{name}": value for name, value in values.items()}
        tqdm.write(f"{self._stage} {self._done}/{self._steps} {summary(values, 'validation/')}")
        self._write(values)

    def _write(self, values: Mapping[str, float]) -> None:
        self._writer.write(self._done, self._done * self._batch_size, values)

    def close(self) -> None:
        self._bar.close()
        self._writer.close()
