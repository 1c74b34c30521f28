"""JAX sides of the step benchmark: `ours`, and `strong`, the same step on K+1 full rows per prompt.

Both store the base once and cache the reference's log-probs. A stage of EPOCHS epochs computes
these once, so every step includes 1/EPOCHS of the reference's pass. One answer (K = 0) is SFT,
which has no reference.
"""

import time
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.flops import matrix_flops
from benchmarks.workload import full_rows_at_once, packed_at_once
from sdpo_jax.data import loader
from sdpo_jax.data.tokens import Example
from sdpo_jax.models.lora import LoraConfig
from sdpo_jax.models.store import load_model
from sdpo_jax.system import sharding
from sdpo_jax.training.optimizer import paper_optimizer
from sdpo_jax.training.step import build_step, make_logp, make_objective

EPOCHS = 3  # of the paper's stage 2
# Name -> batch layout, recomputation in the backward pass.
SIDES = {"ours": ("shared_prefix", "cheap"), "strong": ("padded", "none")}


class JaxSide:
    """A step with one batch layout."""

    def __init__(self, name: str, model: Path, dtype: str):
        self.layout, remat = SIDES[name]
        self.mesh = sharding.make_mesh()
        self.model = load_model(
            model, LoraConfig(), dtype=dtype, remat=remat, shardings=sharding.placement(self.mesh)
        )

    def prepare(self, examples: Sequence[Example]) -> tuple[Callable[[], float], dict]:
        """Compiles a step for a batch; returns a function that runs and times it, and its facts."""
        C = examples[0].C
        at_once = packed_at_once(examples)
        if self.layout == "padded":
            at_once = full_rows_at_once(len(examples), C)
        batch = self.batch(examples, at_once)
        logp = make_logp(self.model.graphdef, self.layout)
        reference = jax.jit(lambda *args: jax.lax.map(lambda part: logp(*args[:2], part), args[2]))
        logp_XBMC = reference(self.model.lora, self.model.base, batch)
        batch["reference_logp_BMC"] = logp_XBMC
        objective = make_objective("sdpo" if C > 1 else "sft")
        lora = jax.tree.map(jnp.copy, self.model.lora)  # the step donates its state
        step, state = build_step(logp, objective, paper_optimizer(), lora, self.mesh)
        compiled = step.lower(state, self.model.base, batch).compile()

        def run() -> float:
            nonlocal state
            started = time.perf_counter()
            if C > 1:
                jax.block_until_ready(reference(self.model.lora, self.model.base, batch))
            between = time.perf_counter()
            state, metrics = compiled(state, self.model.base, batch)
            jax.block_until_ready((state, metrics))
            return (between - started) / EPOCHS + time.perf_counter() - between

        flops = matrix_flops(step, state, self.model.base, batch)
        if C > 1:
            flops += matrix_flops(reference, self.model.lora, self.model.base, batch) / EPOCHS
        run()  # the first step is slower
        facts = {
            "examples_at_once": at_once,
            "flops": flops,
            "temporary_bytes": compiled.memory_analysis().temp_size_in_bytes,
            "logp_XC": np.concatenate(
                [
                    logp_MC[: e.M]
                    for logp_MC, e in zip(
                        np.asarray(logp_XBMC).reshape(len(examples), -1, C), examples, strict=True
                    )
                ]
            ),
        }
        if self.layout == "shared_prefix":
            facts["real_tokens_of_fed"] = sum(e.tokens for e in examples) / batch["slot_WT"].size
        return run, facts

    def batch(self, examples: Sequence[Example], at_once: int) -> dict[str, jax.Array]:
        """Arrays [parts, at_once, ...]."""
        rows = len(examples) // at_once
        batch = loader.collate(examples, loader.choose_shapes([examples], rows)[0], rows)
        return {
            k: jnp.asarray(x.reshape(rows, len(x) // rows, *x.shape[1:])) for k, x in batch.items()
        }
