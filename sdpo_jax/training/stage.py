"""One stage of training, SFT or S-DPO: its examples, its loop, its validation.

The two stages differ in the objective, in C (1, or K+1), and in whether the batch carries the
reference's log-probs.
"""

import functools
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from tqdm import tqdm

from sdpo_jax import sharding
from sdpo_jax.data import loader
from sdpo_jax.data.tokens import Encoder, Example, training_items
from sdpo_jax.errors import InputError
from sdpo_jax.training import reference
from sdpo_jax.training.checkpoint import Checkpoints
from sdpo_jax.training.metrics import MetricsWriter
from sdpo_jax.training.optimizer import learning_rate_schedule, make_optimizer
from sdpo_jax.training.step import (
    Objective, init_state, make_logp, make_train_step, sdpo_objective, sft_objective,
    state_shardings,
)  # fmt: skip
from sdpo_jax.workdir import stage_result, write_stage_result

COMPILATION_IN_STEPS = 30  # roughly what a compilation costs; short runs use fewer shapes


class Interrupted(Exception):
    """SIGINT or SIGTERM came, and all that was done is on disk."""


class StopSignal:
    """Notes SIGINT and SIGTERM, so that the loop can end between two steps."""

    def __init__(self):
        self.received = False
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._note)

    def _note(self, number, frame):
        self.received = True

    def check(self) -> None:
        if self.received:
            raise Interrupted


class Inference:
    """Log-probs of many examples with a given adapter; compiled once per batch shape."""

    def __init__(self, model, layout: str, mesh, microbatch: int):
        self.base, self.mesh = model.base, mesh
        self.batch_size = microbatch * sharding.data_shards(mesh)
        self._logp = jax.jit(
            make_logp(model.graphdef, layout), out_shardings=sharding.replicated(mesh)
        )

    def logp(self, lora, examples: Sequence[Example], stop: StopSignal, bar=iter) -> np.ndarray:
        """`logp_NC` in nats, in the order of `examples`."""
        order = sorted(range(len(examples)), key=lambda i: len(examples[i].prompt))
        order += order[-1:] * (-len(order) % self.batch_size)  # full batches; repeats are dropped
        cut = [order[i : i + self.batch_size] for i in range(0, len(order), self.batch_size)]
        out = np.zeros((len(examples), len(examples[0].answers)), np.float32)
        batches = loader.batches([[examples[i] for i in part] for part in cut], limit=2)
        placed = sharding.batch_sharding(self.mesh)
        for part, batch in bar(zip(cut, batches, strict=True)):
            stop.check()
            out[part] = jax.device_get(self._logp(lora, self.base, put(batch, placed)))
        return out


def put(batch: dict[str, np.ndarray], placed: jax.sharding.Sharding) -> dict[str, jax.Array]:
    """Host arrays, equal on every process, onto their devices."""
    return {
        name: jax.make_array_from_callback(x.shape, placed, x.__getitem__)
        for name, x in batch.items()
    }


def plan(config, stage: str, rows: int) -> list[int]:
    """The rows of `train` in the order the stage takes them; a multiple of the batch size.

    Raises InputError when the stage would have no step.
    """
    of_stage = config[stage]
    steps = rows * of_stage.epochs // config.batch_size
    if of_stage.max_steps:
        steps = min(steps, of_stage.max_steps)
    if steps < 1:
        raise InputError(
            f"{stage}: {rows} windows x {of_stage.epochs} epochs give no batch of "
            f"{config.batch_size}: lower --config.batch_size or raise --config.{stage}.epochs"
        )
    order = loader.stream(rows, config.seed + (stage == "sdpo"), of_stage.epochs)
    return [int(order[i]) for i in range(steps * config.batch_size)]


def encode(encoder: Encoder, split: str, rows: Sequence[int], num_negatives: int):
    """Row -> Example, with the target and the drawn negatives as answers."""
    rows = sorted(set(rows))
    items = [training_items(encoder, split, row, num_negatives) for row in rows]
    return dict(zip(rows, encoder.examples(split, rows, items), strict=True))


class Stage:
    """What one stage works on. `train` runs it to its end or to an interruption."""

    def __init__(self, name: str, config, workdir: Path, model, encoder: Encoder, mesh,
                 inference: Inference, stop: StopSignal):  # fmt: skip
        self.name, self.config, self.workdir = name, config, workdir
        self.model, self.mesh, self.inference, self.stop = model, mesh, inference, stop
        K = config.num_negatives if name == "sdpo" else 0
        self.order = plan(config, name, len(encoder.dataset.splits["train"]))
        self.steps = len(self.order) // config.batch_size
        self.train_examples = encode(encoder, "train", self.order, K)
        split = config.validation_split
        val_rows = loader.spread(len(encoder.dataset.splits[split]), config.validation_windows)
        self.validation_examples = list(encode(encoder, split, val_rows, K).values())

    def objective(self) -> Objective:
        if self.name == "sft":
            return sft_objective
        return functools.partial(sdpo_objective, beta=self.config.beta)

    def references(self, lora) -> tuple[dict[int, dict], dict]:
        """Per train row, and for the validation set, the arrays that the objective needs."""
        if self.name == "sft":
            return dict.fromkeys(self.train_examples, {}), {}
        settings = {k: getattr(self.config, k) for k in ("dtype", "batch_layout", "microbatch")}
        found = []
        for part, examples in (("train", list(self.train_examples.values())),
                               ("validation", self.validation_examples)):  # fmt: skip
            path = self.workdir / "reference" / f"{part}.npz"
            key = reference.fingerprint(self.model.meta["sha256"], lora, examples, settings)
            logp_NC = reference.read_reference(path, key)
            if logp_NC is None:
                bar = progress_bar(f"reference {part}", len(examples), self.inference.batch_size)
                logp_NC = self.inference.logp(lora, examples, self.stop, bar)
                if jax.process_index() == 0:
                    reference.write_reference(path, logp_NC, key)
            found.append(logp_NC)
        of_row = {
            row: {"reference_logp_BC": logp_C}
            for row, logp_C in zip(self.train_examples, found[0], strict=True)
        }
        return of_row, {"reference_logp_BC": found[1]}

    def batches(self, references: dict[int, dict], start: int) -> Iterator[dict[str, np.ndarray]]:
        """Global batches [number of microbatches, M, ...] from step `start` on."""
        size = self.config.batch_size
        lengths = {row: len(example.prompt) for row, example in self.train_examples.items()}
        cut = loader.grouped_batches(self.order, lengths, size, self.config.seed)
        extra = [
            {k: np.stack([references[row][k] for row in rows]) for k in references[rows[0]]}
            for rows in cut
        ]
        limit = max(1, min(loader.MAX_SHAPES, self.steps // COMPILATION_IN_STEPS))
        examples = [[self.train_examples[row] for row in rows] for rows in cut]
        count = size // self.inference.batch_size
        for batch in loader.batches(examples, extra, start, limit):
            yield {k: x.reshape(count, size // count, *x.shape[1:]) for k, x in batch.items()}

    def validate(self, lora, references: dict) -> dict[str, float]:
        """Means over the validation windows."""
        examples = self.validation_examples
        logp_BC = self.inference.logp(lora, examples, self.stop)
        shape = loader.choose_shapes([examples])[0]
        loss_B, metrics = self.objective()(logp_BC, loader.collate(examples, shape) | references)
        values = {"loss": loss_B, **metrics}
        means = {f"validation/{name}": float(np.mean(value)) for name, value in values.items()}
        return means | {"validation/windows": len(examples)}

    def run(self, lora: nnx.State) -> nnx.State:
        """Trains unless the stage is finished already; returns its best adapter."""
        result = stage_result(self.workdir, self.name)
        if result is None:
            lora, result = self.train(lora)
            write_stage_result(self.workdir, self.name, result)
        else:
            checkpoints = Checkpoints(self.workdir / self.name, read_only=True)
            lora = checkpoints.restore_lora(result["best_step"], lora)
            checkpoints.close()
        print(
            f"{self.name}: {result['steps']} steps in {result['seconds']:.0f} s, validation loss "
            f"{result['validation_loss']:.4f} at step {result['best_step']} (the best)"
        )
        return lora

    def train(self, lora: nnx.State) -> tuple[nnx.State, dict[str, Any]]:
        """Runs from the latest checkpoint, or from `lora`, to the stage's last step.

        Returns the adapter with the lowest validation loss and the stage's result. Raises
        Interrupted after a signal, with the state saved.
        """
        c, started = self.config, time.time()
        train_references, validation_references = self.references(lora)
        of_stage = c[self.name]
        optimizer = make_optimizer(
            of_stage.learning_rate, self.steps,
            warmup=c.warmup, clip=c.clip, weight_decay=c.weight_decay,
        )  # fmt: skip
        state = init_state(lora, optimizer, self.mesh)
        checkpoints = Checkpoints(self.workdir / self.name)
        position = {"stage": self.name, "seconds": 0.0}
        if saved := checkpoints.steps():
            state, position = checkpoints.restore(saved[-1], state)
        first = int(state.step)
        key = jax.random.key(c.seed) if c.lora.dropout > 0 else None
        logp = make_logp(self.model.graphdef, c.batch_layout)
        step = make_train_step(
            logp, self.objective(), optimizer,
            state_shardings(lora, optimizer, self.mesh), self.mesh, key,
        )  # fmt: skip
        writer = MetricsWriter(self.workdir / "metrics", self.name, first)
        schedule = learning_rate_schedule(of_stage.learning_rate, self.steps, c.warmup)

        def seconds() -> float:
            return position["seconds"] + time.time() - started

        def save(loss=None):
            checkpoints.save(state, {"stage": self.name, "seconds": seconds()}, loss)

        def validate(done: int) -> float:
            values = self.validate(state.lora, validation_references)
            writer.write(done, done * c.batch_size, values)
            tqdm.write(f"{self.name} {done}/{self.steps} " + summary(values, "validation/"))
            return values["validation/loss"]

        if first == 0:
            save(validate(0))
        bar = tqdm(total=self.steps * c.batch_size, initial=first * c.batch_size, unit="ex",
                   desc=self.name, mininterval=1, smoothing=0.1)  # fmt: skip
        placed = sharding.batch_sharding(self.mesh, leading=1)
        pending: list[dict[str, jax.Array]] = []
        for done, batch in enumerate(self.batches(train_references, first), first + 1):
            state, metrics = step(state, self.model.base, put(batch, placed))
            pending.append(metrics)
            if len(pending) > 1:
                # One step stays queued, so the device never waits and the bar tells the truth.
                jax.block_until_ready(pending[-2])
            bar.update(c.batch_size)
            if done % c.log_every == 0 or done == self.steps:
                values = jax.tree.map(lambda *x: float(np.mean(x)), *jax.device_get(pending))
                pending = []
                values["learning_rate"] = float(schedule(done - 1))
                values["examples_per_second"] = bar.format_dict["rate"] or 0.0
                writer.write(done, done * c.batch_size, values)
                bar.set_postfix_str(summary(values), refresh=False)
            if done == self.steps or done % c.eval_every == 0:
                save(validate(done))
            elif self.stop.received or done % c.checkpoint_every == 0:
                save()
            if self.stop.received and done < self.steps:
                checkpoints.wait()
                raise Interrupted
        bar.close()
        writer.close()
        checkpoints.wait()
        best = checkpoints.best_step()
        result = {
            "stage": self.name, "steps": self.steps, "best_step": best,
            "validation_loss": checkpoints.losses()[best], "examples": len(self.order),
            "seconds": round(seconds(), 1),
        }  # fmt: skip
        lora = checkpoints.restore_lora(best, lora)
        checkpoints.close()
        return lora, result


def progress_bar(name: str, total: int, batch_size: int) -> Callable:
    """An iterator wrapper that shows examples, rate and ETA."""

    def wrap(batches):
        with tqdm(total=total, unit="ex", desc=name, mininterval=1) as bar:
            for batch in batches:
                yield batch
                bar.update(min(batch_size, total - bar.n))

    return wrap


def summary(values: dict[str, float], prefix: str = "") -> str:
    """`loss 1.386 margin +0.01 accuracy 0.25`, of what is there."""
    names = {"loss": "loss", "loss_per_token": "per token", "rewards/margins": "margin",
             "rewards/accuracies": "accuracy"}  # fmt: skip
    return " ".join(
        f"{short} {values[prefix + name]:.4f}"
        for name, short in names.items()
        if prefix + name in values
    )
