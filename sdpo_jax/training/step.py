"""Train state, and the one step that SFT, DPO and S-DPO share.

The step is `jax.jit` with shardings, what `pjit` became. The frozen base is an argument that is
neither differentiated nor donated; the reference's log-probs come with the batch.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh

from sdpo_jax import sharding
from sdpo_jax.objectives import losses
from sdpo_jax.objectives.logprobs import LAYOUTS, Batch

# (logp_BC, batch) -> (loss_B, metrics of shape [B])
Objective = Callable[[jax.Array, Batch], tuple[jax.Array, dict[str, jax.Array]]]


@functools.partial(jax.tree_util.register_dataclass,
                   data_fields=["step", "lora", "opt_state"], meta_fields=[])  # fmt: skip
@dataclasses.dataclass
class TrainState:
    """What a checkpoint holds: steps done, the adapter in float32, the optimizer's moments."""

    step: jax.Array
    lora: nnx.State
    opt_state: Any


def sft_objective(logp_BC: jax.Array, batch: Batch):
    tokens_B = batch["answers_mask_BCA"][:, 0].sum(-1)
    loss_B = losses.sft_loss(logp_BC)
    return loss_B, {"loss_per_token": loss_B / tokens_B}


def preference_objective(logp_BC: jax.Array, batch: Batch, *, beta: float, name: str = "sdpo"):
    """`name`: key of `losses.OBJECTIVES`."""
    reference_logp_BC = batch["reference_logp_BC"]
    r_BC = losses.rewards(logp_BC, reference_logp_BC, beta)
    metrics = {"logps/chosen": logp_BC[:, 0], "logps/rejected": logp_BC[:, 1:].mean(-1)}
    loss_B = losses.OBJECTIVES[name](logp_BC, reference_logp_BC, beta)
    return loss_B, losses.reward_metrics(r_BC) | metrics


def make_logp(graphdef: nnx.GraphDef, layout: str):
    """`logp(lora, base, batch, dropout_keys_R=None) -> logp_BC`, float32 nats."""

    def logp(lora, base, batch, dropout_keys_R=None):
        return LAYOUTS[layout](nnx.merge(graphdef, lora, base), batch, dropout_keys_R)

    return logp


def make_train_step(logp, objective: Objective, optimizer: optax.GradientTransformation,
                    state_shardings: TrainState, mesh: Mesh, dropout_key=None):  # fmt: skip
    """Jitted `step(state, base, batches) -> (state, metrics)`; the state is donated.

    `batches` holds arrays [number of microbatches, M, ...]: the global batch, whose gradient is
    the mean over all its examples however it is cut into microbatches and devices.
    """

    def loss(lora, base, batch, keys_R):
        loss_B, metrics = objective(logp(lora, base, batch, keys_R), batch)
        metrics = {"loss": loss_B, **metrics}
        return loss_B.mean(), {name: value.mean() for name, value in metrics.items()}

    def microbatch_gradient(state: TrainState, base, batch, index):
        R, keys_R = batch["slot_RT"].shape[0], None
        if dropout_key is not None:
            # By the row's number in the global batch, so that devices do not change the draw.
            key, rows = jax.random.fold_in(dropout_key, state.step), index * R + jnp.arange(R)
            keys_R = jax.vmap(jax.random.fold_in, (None, 0))(key, rows)
        (_, metrics), gradient = jax.value_and_grad(loss, has_aux=True)(
            state.lora, base, batch, keys_R
        )
        return gradient, metrics

    def train_step(state: TrainState, base, batches: Batch):
        count = batches["prompt_BP"].shape[0]

        def accumulate(total, scanned):
            index, batch = scanned
            return jax.tree.map(
                jnp.add, total, microbatch_gradient(state, base, batch, index)
            ), None

        first = jax.tree.map(lambda x: x[0], batches)
        zeros = jax.tree.map(
            lambda x: jnp.zeros(x.shape, x.dtype),
            jax.eval_shape(microbatch_gradient, state, base, first, 0),
        )
        total, _ = jax.lax.scan(accumulate, zeros, (jnp.arange(count), batches))
        gradient, metrics = jax.tree.map(lambda x: x / count, total)
        updates, opt_state = optimizer.update(gradient, state.opt_state, state.lora)
        lora = optax.apply_updates(state.lora, updates)
        metrics["grad_norm"] = optax.tree.norm(gradient)
        return TrainState(state.step + 1, lora, opt_state), metrics

    return jax.jit(
        train_step,
        donate_argnums=0,
        out_shardings=(state_shardings, sharding.replicated(mesh)),
    )


def first_state(lora: nnx.State, optimizer: optax.GradientTransformation) -> TrainState:
    """A state that starts from `lora`."""
    return TrainState(jnp.zeros((), jnp.int32), lora, optimizer.init(lora))


def init_state(lora: nnx.State, optimizer: optax.GradientTransformation, mesh: Mesh) -> TrainState:
    """`first_state`, its moments placed as the adapter is."""
    make = functools.partial(first_state, optimizer=optimizer)
    return jax.jit(make, out_shardings=state_shardings(lora, optimizer, mesh))(lora)


def state_shardings(lora: nnx.State, optimizer: optax.GradientTransformation, mesh: Mesh):
    """Shardings of a `TrainState`: an unpinned step would let the moments drift apart."""
    whole = sharding.replicated(mesh)
    of_lora = jax.tree.map(lambda x: x.sharding, lora)
    of_moments = optax.tree.map_params(
        optimizer,
        lambda _, placed: placed,
        jax.eval_shape(optimizer.init, lora),
        of_lora,
        transform_non_params=lambda _: whole,
    )
    return TrainState(whole, of_lora, of_moments)
