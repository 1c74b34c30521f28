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
# Off CPUs, training's microbatches at once, as nothing is stored for a gradient, and the tokens of
# them: the logits of a hard negatives' pool take gigabytes per microbatch.
WITHOUT_GRADIENT, TOKENS = 4, 2**15


class Inference:
    """Log-probs of many examples with a given adapter; compiled once per batch shape."""

    def __init__(self, model, layout: str, mesh, microbatch: int):
        self.base, self.mesh = model.base, mesh
        self.microbatch, self.rows = microbatch, sharding.data_shards(mesh)
        self._logp = jax.jit(
            make_logp(model.graphdef, layout), out_shardings=sharding.replicated(mesh)
        )

    def at_once(self, examples: Sequence[Example]) -> int:
        """Examples per data shard in one batch: `microbatch`, or a multiple of it off CPUs."""
        if sharding.platform(self.mesh) == "cpu":
            return self.microbatch
        longest = max(example.tokens for example in examples)
        fitting = TOKENS // (self.microbatch * longest)
        return self.microbatch * min(max(fitting, 1), WITHOUT_GRADIENT)

    def _cut(self, examples: Sequence[Example]) -> list[list[int]]:
        """Full batches of examples, the last with repeats."""
        at_once = self.at_once(examples)
        size = at_once * self.rows
        order = list(range(len(examples)))
        order += order[-1:] * (-len(order) % size)
        order = balanced(examples, order, len(order) // at_once)
        return [order[i : i + size] for i in range(0, len(order), size)]

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
        parts = self._cut(examples)
        size = len(parts[0])
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
            todo = progress_bar(todo, name, len(examples), first * size, size)
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
