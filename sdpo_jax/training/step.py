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

from sdpo_jax.objectives import losses
from sdpo_jax.objectives.logprobs import LAYOUTS, Batch
from sdpo_jax.system import sharding

# (logp_BMC, batch) -> (loss_BM, metrics of shape [B, M])
Objective = Callable[[jax.Array, Batch], tuple[jax.Array, dict[str, jax.Array]]]


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["step", "lora", "opt_state"], meta_fields=[]
)
@dataclasses.dataclass
class TrainState:
    """What a checkpoint holds: steps done, the adapter in float32, the optimizer's moments."""

    step: Any
    lora: Any
    opt_state: Any


def sft_objective(logp_BMC: jax.Array, batch: Batch):
    tokens_BM = batch["answers_mask_BMCA"][..., 0, :].sum(-1)
    loss_BM = losses.sft_loss(logp_BMC)
    return loss_BM, {"loss_per_token": loss_BM / jnp.maximum(tokens_BM, 1)}


def preference_objective(logp_BMC: jax.Array, batch: Batch, *, beta: float, name: str = "sdpo"):
    """`name`: key of `losses.OBJECTIVES`."""
    reference_logp_BMC = batch["reference_logp_BMC"]
    r_BMC = losses.rewards(logp_BMC, reference_logp_BMC, beta)
    metrics = {"logps/chosen": logp_BMC[..., 0], "logps/rejected": logp_BMC[..., 1:].mean(-1)}
    loss_BM = losses.OBJECTIVES[name](logp_BMC, reference_logp_BMC, beta)
    return loss_BM, losses.reward_metrics(r_BMC) | metrics


def sums(objective: Objective, logp_BMC: jax.Array, batch: Batch) -> dict[str, jax.Array]:
    """Loss and metrics summed over the targets that are there, and their number, `targets`."""
    loss_BM, metrics = objective(logp_BMC, batch)
    there_BM = batch["place_BM"] >= 0
    values = {"loss": loss_BM, **metrics, "targets": jnp.ones_like(loss_BM)}
    return {name: jnp.where(there_BM, value, 0.0).sum() for name, value in values.items()}


def means(total: Any, targets: jax.Array | float) -> Any:
    """A tree of sums over targets as means."""
    return jax.tree.map(lambda x: x / targets, total)


def make_logp(graphdef: nnx.GraphDef, layout: str):
    """`logp(lora, base, batch, dropout_keys_W=None) -> logp_BMC`, float32 nats."""

    def logp(lora, base, batch, dropout_keys_W=None):
        return LAYOUTS[layout](nnx.merge(graphdef, lora, base), batch, dropout_keys_W)

    return logp


def make_train_step(
    logp,
    objective: Objective,
    optimizer: optax.GradientTransformation,
    state_shardings: TrainState,
    mesh: Mesh,
    dropout_key=None,
):
    """Jitted `step(state, base, batches) -> (state, metrics)`; the state is donated.

    `batches` holds arrays [number of microbatches, microbatch, ...]: the global batch, whose
    gradient is the mean over all its targets however it is cut into microbatches and devices.
    """

    def loss(lora, base, batch, keys_W):
        total = sums(objective, logp(lora, base, batch, keys_W), batch)
        return total["loss"], total

    def microbatch_gradient(state: TrainState, base, batch, index):
        W, keys_W = batch["slot_WT"].shape[0], None
        if dropout_key is not None:
            # By the row's number in the global batch, so that devices do not change the draw.
            key, rows = jax.random.fold_in(dropout_key, state.step), index * W + jnp.arange(W)
            keys_W = jax.vmap(jax.random.fold_in, (None, 0))(key, rows)
        (_, total), gradient = jax.value_and_grad(loss, has_aux=True)(
            state.lora, base, batch, keys_W
        )
        return gradient, total

    def train_step(state: TrainState, base, batches: Batch):
        count = batches["prompt_BP"].shape[0]

        def accumulate(total, scanned):
            index, batch = scanned
            return jax.tree.map(
                jnp.add, total, microbatch_gradient(state, base, batch, index)
            ), None

        # Known without tracing the model, which takes longer than all else of a small step.
        first = jax.tree.map(lambda x: x[0], batches)
        logp_BMC = jax.ShapeDtypeStruct(first["answers_BMCA"].shape[:-1], jnp.float32)
        like = state.lora, jax.eval_shape(functools.partial(sums, objective), logp_BMC, first)
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), like)
        (gradient, total), _ = jax.lax.scan(accumulate, zeros, (jnp.arange(count), batches))
        targets = total.pop("targets")
        gradient, metrics = means(gradient, targets), means(total, targets)
        updates, opt_state = optimizer.update(gradient, state.opt_state, state.lora)
        lora = optax.apply_updates(state.lora, updates)
        metrics |= {"grad_norm": optax.tree.norm(gradient), "targets": targets}
        return TrainState(state.step + 1, lora, opt_state), metrics

    return jax.jit(
        train_step,
        donate_argnums=0,
        out_shardings=(state_shardings, sharding.replicated(mesh)),
    )


def first_state(lora: nnx.State, optimizer: optax.GradientTransformation) -> TrainState:
    """A state that starts from `lora`."""
    return TrainState(jnp.zeros((), jnp.int32), lora, optimizer.init(lora))


def init_state(
    lora: nnx.State, optimizer: optax.GradientTransformation, mesh: Mesh, donate: bool = False
) -> TrainState:
    """`first_state`, its moments placed as the adapter is; `donate`: the state takes its arrays."""
    make = functools.partial(first_state, optimizer=optimizer)
    placed = state_shardings(lora, optimizer, mesh)
    return jax.jit(make, out_shardings=placed, donate_argnums=0 if donate else ())(lora)


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
