"""Log-probs of many examples without a gradient: validation, and the reference's pass."""

import time
from collections.abc import Callable, Sequence

import jax
import numpy as np

from sdpo_jax.data import loader
from sdpo_jax.data.tokens import Example
from sdpo_jax.system import sharding
from sdpo_jax.system.processes import StopSignal
from sdpo_jax.training.order import balanced
from sdpo_jax.training.progress import progress_bar
from sdpo_jax.training.step import make_logp

SAVE_SECONDS = 300.0  # between two saves of a reference pass in progress
WITHOUT_GRADIENT = 4  # training's microbatches at once off CPUs: nothing is stored for a gradient


class Inference:
    """Log-probs of many examples with a given adapter; compiled once per batch shape."""

    def __init__(self, model, layout: str, mesh, microbatch: int):
        self.base, self.mesh = model.base, mesh
        at_once = 1 if sharding.platform(mesh) == "cpu" else WITHOUT_GRADIENT
        self.microbatch, self.rows = microbatch * at_once, sharding.data_shards(mesh)
        self.batch_size = microbatch * self.rows
        self._logp = jax.jit(
            make_logp(model.graphdef, layout), out_shardings=sharding.replicated(mesh)
        )

    def logp(
        self,
        lora,
        examples: Sequence[Example],
        stop: StopSignal,
        name: str = "",
        known_XC: np.ndarray | None = None,
        save: Callable[[np.ndarray], None] = lambda _: None,
    ) -> np.ndarray:
        """`logp_XC` in nats, X being the targets of all examples, in their order.

        Args:
          lora: the adapter.
          examples: all with the same number of answers.
          stop: checked before every batch.
          name: of a progress bar; "" for none.
          known_XC: the argument of `save` in an interrupted call, which is continued.
          save: called with `logp_XC`, NaN where not yet computed, every SAVE_SECONDS and before
            Interrupted is raised.
        """
        order = list(range(len(examples)))
        order += order[-1:] * (-len(order) % self.batch_size)  # full batches; repeats are dropped
        order = balanced(examples, order, len(order) // self.microbatch)
        parts = [order[i : i + self.batch_size] for i in range(0, len(order), self.batch_size)]
        ends = np.cumsum([example.M for example in examples])
        shape = (int(ends[-1]), examples[0].C)
        out = np.full(shape, np.nan, np.float32) if known_XC is None else known_XC
        rows = [out[end - e.M : end] for e, end in zip(examples, ends, strict=True)]
        done = (all(np.isfinite(rows[i]).all() for i in part) for part in parts)
        first = next((n for n, whole in enumerate(done) if not whole), len(parts))
        batches = loader.batches(
            [[examples[i] for i in part] for part in parts],
            start=first,
            rows=self.rows,
            limit=1,
            own=sharding.local_shards(self.mesh),
        )
        todo = zip(parts[first:], batches, strict=True)
        if name:
            todo = progress_bar(todo, name, len(examples), first * self.batch_size, self.batch_size)
        placed, saved = sharding.batch_sharding(self.mesh), time.monotonic()
        queued = None  # fetched when the next one runs, so that the device does not wait

        def fetch() -> None:
            if queued is not None:
                part, logp_BMC = queued
                for i, logp_MC in zip(part, jax.device_get(logp_BMC), strict=True):
                    rows[i][:] = logp_MC[: len(rows[i])]

        for part, batch in todo:
            if stop.ask() or time.monotonic() - saved > SAVE_SECONDS:
                fetch()
                save(out)
                saved = time.monotonic()
            stop.check()
            running = self._logp(lora, self.base, sharding.shard_local(batch, placed))
            fetch()
            queued = part, running
        fetch()
        return out


def by_example(logp_XC: np.ndarray, examples: Sequence[Example]) -> list[np.ndarray]:
    """The rows of each example's targets, [M, C]."""
    return np.split(logp_XC, np.cumsum([example.M for example in examples])[:-1])
