"""The progress bar of a stage, and its lines in the curves."""

import contextlib
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from sdpo_jax.runs.config import RunConfig, keys
from sdpo_jax.runs.curves import MetricsWriter
from sdpo_jax.runs.trackers import Lenient, open_tracker
from sdpo_jax.training import device_stats
from sdpo_jax.training.optimizer import learning_rate_schedule


class NotANumber(Exception):
    """The loss or the gradient of `step` is NaN or infinite."""

    def __init__(self, step: int, values: Mapping[str, float]):
        self.step = step
        self.found = ", ".join(f"{name} {value}" for name, value in values.items())
        super().__init__(f"step {step}: {self.found}")


def bar(total: int, done: int, name: str, **settings: Any) -> tqdm:
    """A progress bar of examples, on process 0 only."""
    return tqdm(
        total=total,
        initial=done,
        unit="ex",
        desc=name,
        mininterval=1,
        disable=jax.process_index() > 0,
        **settings,
    )


def progress_bar(batches: Iterable, name: str, total: int, done: int, batch_size: int) -> Iterator:
    """Yields `batches` and shows examples, rate and ETA; `done` of `total` examples came before."""
    with bar(total, done, name) as examples:
        for batch in batches:
            yield batch
            examples.update(min(batch_size, total - examples.n))


def summary(values: Mapping[str, float], prefix: str = "") -> str:
    """`loss 1.3863 margin 0.0100 accuracy 0.2500`, of the values that are there."""
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
    """The bar of a stage and its lines in metrics.jsonl, TensorBoard and a tracker.

    Args:
      workdir: of the run; the curves are in its folder `metrics`.
      config: of the run.
      stage: its name.
      first: steps done before this process, of `steps` in all.
      parameters: of the model, for its FLOPs.
    """

    def __init__(
        self, workdir: Path, config: RunConfig, stage: str, first: int, steps: int, parameters: int
    ):
        self._stage, self._done, self._steps = stage, first, steps
        self._batch_size, self._log_every = config.batch_size, config.log_every
        peak = getattr(config, stage).learning_rate
        self._schedule: Any = learning_rate_schedule(peak, steps, config.warmup)
        self._parameters, self._full = parameters, config.tune == "full"
        self._peak = device_stats.peak_flops(jax.devices()[0], config.dtype)
        self._pending: list[dict[str, Any]] = []
        self._tokens, self._waited, self._since = 0, 0.0, time.perf_counter()
        first_here = jax.process_index() == 0
        self._writer = MetricsWriter(workdir / "metrics", stage, first) if first_here else None
        self._tracker = None
        if first_here:
            told = {name: value for name, _, value in keys(config)}
            found = open_tracker(config.tracker, workdir, stage, told)
            self._tracker = Lenient(found) if found else None
        self._bar = bar(steps * self._batch_size, first * self._batch_size, stage, smoothing=0.1)

    def waited_for(self, batches: Iterator) -> Iterator:
        """Yields `batches` and counts the seconds that their consumer waits."""
        while True:
            started = time.perf_counter()
            try:
                batch = next(batches)
            except StopIteration:
                return
            self._waited += time.perf_counter() - started
            yield batch

    def step(self, metrics: dict[str, jax.Array], tokens: int) -> None:
        """Adds a step, which may still be running: its metrics and its number of real tokens."""
        if self._pending:
            # One step stays queued while the line of those before it is written, so the device
            # never waits and the bar is at most one ahead.
            jax.block_until_ready(self._pending[-1])
            self._log_if_due()
        self._done += 1
        self._tokens += tokens
        self._pending.append(metrics)
        self._bar.update(self._batch_size)
        if self._done == self._steps:
            self.settle()

    def settle(self) -> None:
        """Waits for the steps so far and writes their line if it is due.

        Raises NotANumber for the first step with NaN or infinity.
        """
        self._check()
        self._log_if_due()

    def _log_if_due(self) -> None:
        if self._pending and (self._done % self._log_every == 0 or self._done == self._steps):
            self._check()
            self._log()

    def _check(self) -> None:
        self._pending = jax.device_get(self._pending)
        for step, values in enumerate(self._pending, self._done - len(self._pending) + 1):
            broken = {
                k: float(values[k]) for k in ("loss", "grad_norm") if not np.isfinite(values[k])
            }
            if broken:
                raise NotANumber(step, broken)

    def _log(self) -> None:
        values = jax.tree.map(lambda *x: float(np.mean(x)), *self._pending)
        values["learning_rate"] = float(self._schedule(self._done - 1))
        values["examples_per_second"] = self._bar.format_dict["rate"] or 0.0
        values |= self._throughput()
        self._pending = []
        self._bar.set_postfix_str(summary(values), refresh=False)
        self._write(values)

    def _throughput(self) -> dict[str, float]:
        """Of the steps since the last line; with MFU where the device's peak is known."""
        seconds, devices = time.perf_counter() - self._since, jax.device_count()
        values = {
            "tokens_per_second_per_device": self._tokens / seconds / devices,
            "input_wait_seconds": self._waited,
            "peak_memory_gib": device_stats.peak_bytes(jax.local_devices()[0]) / 2**30,
        }
        if self._peak:
            flops = device_stats.model_flops(self._parameters, self._tokens, self._full)
            values["mfu"] = flops / seconds / devices / self._peak
        self._tokens, self._waited, self._since = 0, 0.0, time.perf_counter()
        return values

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Leaves the time within out of the throughput of steps."""
        started = time.perf_counter()
        yield
        self._since += time.perf_counter() - started

    def validation(self, values: Mapping[str, float]) -> None:
        """Shows and logs the means over the validation windows after the last step."""
        values = {f"validation/{name}": value for name, value in values.items()}
        tqdm.write(f"{self._stage} {self._done}/{self._steps} {summary(values, 'validation/')}")
        self._write(values)

    def _write(self, values: Mapping[str, float]) -> None:
        if self._writer:
            self._writer.write(self._done, self._done * self._batch_size, values)
        if self._tracker:
            self._tracker.write(self._done, values)

    def close(self) -> None:
        self._bar.close()
        if self._writer:
            self._writer.close()
        if self._tracker:
            self._tracker.close(self._done == self._steps)
