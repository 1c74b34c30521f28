"""One stage of training, SFT or S-DPO: its examples, its loop, its validation.

The two stages differ in the objective, in C (1, or K+1), and in whether the batch carries the
reference's log-probs. X: the targets of all examples.
"""

import dataclasses
import functools
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

import jax
import numpy as np
from flax import nnx

from sdpo_jax.data import loader
from sdpo_jax.data.negatives import Negatives
from sdpo_jax.data.rows import evenly_spaced
from sdpo_jax.data.segments import Unit, units
from sdpo_jax.data.tokens import Encoder, Example
from sdpo_jax.runs import best_step
from sdpo_jax.runs.checkpoints import Checkpoints
from sdpo_jax.runs.config import RunConfig
from sdpo_jax.runs.workdir import stage_result, write_stage_result
from sdpo_jax.system import sharding
from sdpo_jax.system.errors import InputError
from sdpo_jax.system.files import write_json
from sdpo_jax.system.processes import StopSignal, first_process
from sdpo_jax.training import reference
from sdpo_jax.training.device_stats import traced
from sdpo_jax.training.inference import Inference, by_example
from sdpo_jax.training.loop import Loop
from sdpo_jax.training.optimizer import make_optimizer
from sdpo_jax.training.order import Key, balanced, curriculum, encode, plan, redrawn, select_in_band
from sdpo_jax.training.progress import NotANumber, Progress
from sdpo_jax.training.step import (
    Step,
    TrainState,
    build_step,
    make_logp,
    make_objective,
    means,
    sums,
)


class Stage:
    """The examples of one stage and what runs on them; `run` trains it to its end."""

    def __init__(
        self,
        name: str,
        config: RunConfig,
        workdir: Path,
        model,
        encoder: Encoder,
        mesh,
        inference: Inference,
        stop: StopSignal,
    ):
        self.name, self.config, self.workdir = name, config, workdir
        self.model, self.mesh, self.inference, self.stop = model, mesh, inference, stop
        self.encoder = encoder
        self.K = config.num_negatives if name == "sdpo" else 0
        self.objective = make_objective(name, config.beta, config.objective)
        self.negatives = Negatives(
            encoder.dataset, config.negatives, config.seed, config.popularity_power
        )
        self.vectors = encoder.first_vector is not None
        self.units = units(encoder, "train", config.segment)
        self.order = self.train_order()
        self.steps = len(self.order) // config.batch_size
        self.train_examples = self.encode("train", self.units, self.order)
        self.validation_examples = self.validation_set(config.validation_split)

    def train_order(self) -> list[Key]:
        """The examples of all steps."""
        c, plain = self.config, plan(self.config, self.name, len(self.units))
        order = curriculum(plain, self.vectors, self.name == "sft", c.seed)
        return redrawn(order, len(self.units)) if c.redraw and self.K else order

    def validation_set(self, split: str) -> list[Example]:
        """About `validation_windows` evenly spaced: an example has one, or those of a segment."""
        found = units(self.encoder, split, self.config.segment)
        windows = len(self.encoder.dataset.splits[split])
        limit = -(-self.config.validation_windows * len(found) // windows)
        keys = [Key(unit, self.vectors) for unit in evenly_spaced(len(found), limit)]
        return list(self.encode(split, found, keys).values())

    def encode(self, split: str, of: Sequence[Unit], keys: Iterable[Key]) -> dict[Key, Example]:
        """Examples with the answers that the reference scores: for hard negatives, a pool."""
        hard = self.K and self.config.negatives == "hard"
        count = self.config.hard_pool if hard else self.K
        return encode(self.encoder, split, of, keys, self.negatives, count)

    def reference_logp(self, lora) -> tuple[dict[Key, np.ndarray] | None, list[np.ndarray] | None]:
        """The reference's log-probs [M, C] of each train example and each validation example.

        Hard negatives are selected here by those log-probs; the examples lose the others.
        """
        if self.name == "sft":
            return None, None
        settings = {
            k: getattr(self.config, k)
            for k in ("dtype", "base_dtype", "batch_layout", "microbatch")
        }
        found = []
        for part, examples in (
            ("train", list(self.train_examples.values())),
            ("validation", self.validation_examples),
        ):
            path = self.workdir / "reference" / f"{part}.npz"
            key = reference.fingerprint(self.model.meta["sha256"], lora, examples, settings)
            logp_XC = reference.read_reference(path, key)
            if logp_XC is None or np.isnan(logp_XC).any():
                save = functools.partial(reference.write_reference, path, key)
                logp_XC = self.inference.logp(
                    lora, examples, self.stop, f"reference {part}", logp_XC, save
                )
                save(logp_XC)
            found.append(by_example(logp_XC, examples))
        train, validation = found
        if self.config.negatives == "hard":
            keys, examples = list(self.train_examples), list(self.train_examples.values())
            examples, train = self._hard_negatives(examples, train)
            self.train_examples = dict(zip(keys, examples, strict=True))
            self.validation_examples, validation = self._hard_negatives(
                self.validation_examples, validation
            )
        return dict(zip(self.train_examples, train, strict=True)), validation

    def _hard_negatives(
        self, examples: Sequence[Example], logp: Sequence[np.ndarray]
    ) -> tuple[list[Example], list[np.ndarray]]:
        """The examples with the K negatives of the configured band, and their log-probs."""
        selected, logp_selected = [], []
        for example, logp_MC in zip(examples, logp, strict=True):
            chosen_MC = select_in_band(logp_MC, self.K, self.config.hard_band)
            answers = tuple(
                tuple(of[c] for c in chosen_C)
                for of, chosen_C in zip(example.answers_MC, chosen_MC, strict=True)
            )
            selected.append(dataclasses.replace(example, answers_MC=answers))
            logp_selected.append(np.take_along_axis(logp_MC, chosen_MC, 1))
        return selected, logp_selected

    @functools.cached_property
    def train_batches(self) -> list[list[Key]]:
        """The train examples of each step, in the order of its rows of tokens."""
        size = self.config.batch_size
        alike = self.encoder.prompt == "candidates"
        lengths = {
            key: len(example.prompt) if alike else example.tokens
            for key, example in self.train_examples.items()
        }
        grouped = loader.grouped_batches(self.order, lengths, size, self.config.seed, alike)
        rows = size // self.config.microbatch
        return [balanced(self.train_examples, part, rows) for part in grouped]

    def batches(
        self, references: dict[Key, np.ndarray] | None, start: int
    ) -> Iterator[dict[str, np.ndarray]]:
        """Batches [number of microbatches, this process's part, ...] from step `start` on.

        A microbatch has one row of tokens per data shard, with `config.microbatch` examples each.
        """
        found = None
        if references is not None:
            found = [[references[key] for key in part] for part in self.train_batches]
        limit = loader.most_shapes(self.steps, sharding.platform(self.mesh))
        examples = [[self.train_examples[key] for key in part] for part in self.train_batches]
        shards = sharding.data_shards(self.mesh)
        count = self.config.batch_size // (self.config.microbatch * shards)
        own = [i * shards + j for i in range(count) for j in sharding.local_shards(self.mesh)]
        for batch in loader.batches(examples, found, start, count * shards, limit, own):
            # Rows of all microbatches to [microbatches, rows of each, ...]
            yield {k: x.reshape(count, len(x) // count, *x.shape[1:]) for k, x in batch.items()}

    def validate(self, state: TrainState, references: list[np.ndarray] | None) -> dict[str, float]:
        """Means over the targets of the validation examples, and their number."""
        examples = self.validation_examples
        shape = loader.choose_shapes([examples])[0]
        batch = loader.collate(examples, shape)
        if references:
            batch["reference_logp_BMC"] = loader.stack_targets(references, shape.M)
        logp_BMC: Any
        if references and int(state.step) == 0:  # the policy still is the reference
            logp_BMC = batch["reference_logp_BMC"]
        else:
            logp_XC = self.inference.logp(state.lora, examples, self.stop)
            logp_BMC = loader.stack_targets(by_example(logp_XC, examples), shape.M)
        total = {k: float(v) for k, v in sums(self.objective, logp_BMC, batch).items()}
        targets = total.pop("targets")
        return means(total, targets) | {"windows": int(targets)}

    def run(self, lora: nnx.State) -> nnx.State:
        """Trains from `lora` unless the stage is finished; returns its best adapter.

        Deletes the arrays of `lora`.
        """
        result = stage_result(self.workdir, self.name)
        if result is None:
            result = self.train(lora)
            first_process(lambda: write_stage_result(self.workdir, self.name, result))
        checkpoints = Checkpoints(self.workdir / self.name)
        jax.tree.map(lambda x: x.delete(), lora)  # only shapes and shardings are needed
        lora = checkpoints.restore_lora(result["best_step"], lora)
        checkpoints.close()
        print(
            f"{self.name}: {result['steps']} steps in {result['seconds']:.0f} s, validation loss "
            f"{result['validation_loss']:.4f} at step {result['best_step']} (the best)"
        )
        if result["best_step"] == 0:
            print(
                f"warning: {self.name} never lowered the validation loss, so its best step is its "
                f"start: try more steps or a lower --config.{self.name}.learning_rate"
            )
        return lora

    def train(self, lora: nnx.State) -> dict[str, Any]:
        """Runs from the latest checkpoint, or from `lora`, to the stage's last step.

        Raises Interrupted after a signal, with the state saved.
        """
        c, started = self.config, time.monotonic()
        train_references, validation_references = self.reference_logp(lora)
        (compiled, state), before = self.build(lora), 0.0
        checkpoints = Checkpoints(self.workdir / self.name, evaluated=self.hit_ratios())
        if checkpoints.steps():
            state, position = checkpoints.restore_newest(state)
            before = position["seconds"]
        first = int(state.step)
        loop = Loop(
            name=self.name,
            state=state,
            steps=self.steps,
            eval_every=c.eval_every,
            checkpoint_every=c.checkpoint_every,
            validate=lambda state: self.validate(state, validation_references),
            checkpoints=checkpoints,
            progress=Progress(
                self.workdir, c, self.name, first, self.steps, self.model.meta["parameters"]
            ),
            stop=self.stop,
            seconds=before,
            started=started,
        )
        del state  # the loop donates it
        placed = sharding.batch_sharding(self.mesh, leading=1)
        batches = loop.progress.waited_for(self.batches(train_references, first))
        batches = traced(batches, self.workdir / "profile" / self.name, c.profile_steps)

        def step(state, batch):
            return compiled(state, self.model.base, sharding.shard_local(batch, placed))

        try:
            loop.run(step, batches, self.tokens)
            losses, best = checkpoints.losses(), self.choose_step(checkpoints)
        except NotANumber as error:
            self.report_broken(error)
        finally:
            loop.progress.close()
            checkpoints.close()
        return {
            "stage": self.name,
            "steps": self.steps,
            "best_step": best,
            "validation_loss": losses[best],
            "examples": len(self.order),
            "seconds": round(loop.elapsed(), 1),
        }

    def build(self, lora: nnx.State) -> tuple[Step, TrainState]:
        """The jitted step and the state that it starts from."""
        c = self.config
        optimizer = make_optimizer(
            getattr(c, self.name).learning_rate,
            self.steps,
            warmup=c.warmup,
            clip=c.clip,
            weight_decay=c.weight_decay,
        )
        return build_step(
            make_logp(self.model.graphdef, c.batch_layout),
            self.objective,
            optimizer,
            lora,
            self.mesh,
            dropout_key=jax.random.key(c.seed) if c.tune == "lora" and c.lora.dropout else None,
            donate=True,  # it may be all weights, of which --explain counts one copy
        )

    def hit_ratios(self) -> Callable[[], dict[int, float]] | None:
        """Returns step -> HR@1 so far; None where the loss decides on the best step."""
        by = self.config.best_by
        if by == "loss":
            return None
        split = self.config.validation_split
        return functools.partial(best_step.hit_ratios, self.workdir, self.name, by, split)

    def choose_step(self, checkpoints: Checkpoints) -> int:
        """The best step, after waiting for the evaluator if that decides."""
        evaluated, losses = self.hit_ratios(), checkpoints.losses()
        if evaluated is None:
            return checkpoints.best_step()
        print(
            f"{self.name}: waiting until all of its checkpoints are evaluated by python -m "
            f"sdpo_jax.evaluate --workdir={self.workdir} --follow "
            f"--split={self.config.validation_split} --decoder={self.config.best_by}"
        )

        def ask() -> None:
            # Several processes would have to ask equally often; everything is saved by now.
            if jax.process_count() == 1:
                self.stop.ask()
                self.stop.check()

        first_process(lambda: best_step.wait_for_evaluator(evaluated, list(losses), ask))
        return best_step.best_of({step: evaluated()[step] for step in losses})

    def tokens(self, step: int) -> int:
        """The number of real tokens of `step`; the first step is 1."""
        return sum(self.train_examples[key].tokens for key in self.train_batches[step - 1])

    def report_broken(self, error: NotANumber) -> NoReturn:
        """Writes the windows of a step with NaN or infinity; raises InputError."""
        file = self.workdir / "stages" / f"{self.name}-broken-step.json"
        rows = [row for key in self.train_batches[error.step - 1] for row in self.units[key.unit]]
        content = {
            "stage": self.name,
            "step": error.step,
            "found": error.found,
            "lines": [row + 1 for row in rows],
        }
        first_process(lambda: write_json(file, content))
        raise InputError(
            f"{self.name} {error}, expected numbers: the lines of train.jsonl that it took are in "
            f"{file}, the checkpoints before it remain; start in another --workdir with a lower "
            f"--config.{self.name}.learning_rate"
        ) from error
