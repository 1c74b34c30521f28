"""Log-probs of many examples without a gradient: validation, and the reference's pass."""

import itertools
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

SAVE_SECONDS = 300.0  # between two copies on disk of a reference pass in progress


class Inference:
    """Log-probs of many examples with a given adapter; compiled once per batch shape."""

    def __init__(self, model, layout: str, mesh, microbatch: int):
        self.base, self.mesh = model.base, mesh
        self.microbatch, self.rows = microbatch, sharding.data_shards(mesh)
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
        known_NC: np.ndarray | None = None,
        save: Callable[[np.ndarray], None] = lambda _: None,
    ) -> np.ndarray:
        """`logp_NC` in nats, N being the targets of all examples, in their order.

        Args:
          lora: the adapter.
          examples: all with the same number of answers.
          stop: looked at before every batch.
          name: of a progress bar; "" for none.
          known_NC: what `save` got in a call that was cut off: that part is not computed again.
          save: gets `logp_NC`, NaN where not yet computed, now and then and before Interrupted.
        """
        order = list(range(len(examples)))
        order += order[-1:] * (-len(order) % self.batch_size)  # full batches; repeats are dropped
        order = balanced(examples, order, len(order) // self.microbatch)
        cut = [order[i : i + self.batch_size] for i in range(0, len(order), self.batch_size)]
        ends = np.cumsum([example.M for example in examples])
        shape = (int(ends[-1]), examples[0].C)
        out = np.full(shape, np.nan, np.float32) if known_NC is None else known_NC
        parts = [out[end - e.M : end] for e, end in zip(examples, ends, strict=True)]
        first = sum(
            1
            for _ in itertools.takewhile(
                lambda part: all(np.isfinite(parts[i]).all() for i in part), cut
            )
        )
        batches = loader.batches(
            [[examples[i] for i in part] for part in cut],
            start=first,
            rows=self.rows,
            limit=1,
            own=sharding.local_shards(self.mesh),
        )
        todo = zip(cut[first:], batches, strict=True)
        if name:
            todo = progress_bar(todo, name, len(examples), first * self.batch_size, self.batch_size)
        placed, saved = sharding.batch_sharding(self.mesh), time.monotonic()
        for part, batch in todo:
            if stop.ask() or time.monotonic() - saved > SAVE_SECONDS:
                save(out)
                saved = time.monotonic()
            stop.check()
            batch = sharding.shard_local(batch, placed)
            logp_BMC = jax.device_get(self._logp(lora, self.base, batch))
            for i, logp_MC in zip(part, logp_BMC, strict=True):
                parts[i][:] = logp_MC[: len(parts[i])]
        return out


def by_example(logp_NC: np.ndarray, examples: Sequence[Example]) -> list[np.ndarray]:
    """The rows of each example's targets, [M, C]."""
    return np.split(logp_NC, np.cumsum([example.M for example in examples])[:-1])
