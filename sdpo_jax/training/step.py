"""Train state, and the one step that SFT, DPO and S-DPO share.

The step is `jax.jit` with shardings, the successor of `pjit`. Base, adapter and batch lie on the
mesh as `sharding.placement` and `sharding.batch_sharding` put them, and XLA adds the all-reduces.
The frozen base is an argument that is neither differentiated nor donated; the reference's
log-probs come with the batch.
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
# XLA:GPU would join `x W` and `x A` to one product, for which it copies every weight matrix.
COMPILER_OPTIONS = {"gpu": {"xla_gpu_dot_merger_threshold_mb": 0}}
Step = Callable[..., tuple["TrainState", dict[str, jax.Array]]]


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["step", "lora", "opt_state"], meta_fields=[]
)
@dataclasses.dataclass
class TrainState:
    """The content of a checkpoint: steps done, the adapter in float32, the optimizer's moments.

    With `tune=full`, `lora` is all weights.
    """

    step: Any
    lora: Any
    opt_state: Any


def make_objective(stage: str, beta: float = 1.0, loss: str = "sdpo") -> Objective:
    """The objective of a stage, "sft" or "sdpo"; `loss`: key of `losses.OBJECTIVES`."""
    if stage == "sft":
        return sft_objective
    return functools.partial(preference_objective, beta=beta, loss=loss)


def sft_objective(logp_BMC: jax.Array, batch: Batch):
    tokens_BM = batch["answers_mask_BMCA"][..., 0, :].sum(-1)
    loss_BM = losses.sft_loss(logp_BMC)
    return loss_BM, {"loss_per_token": loss_BM / jnp.maximum(tokens_BM, 1)}


def preference_objective(logp_BMC: jax.Array, batch: Batch, *, beta: float, loss: str = "sdpo"):
    """`loss`: key of `losses.OBJECTIVES`."""
    reference_logp_BMC = batch["reference_logp_BMC"]
    r_BMC = losses.rewards(logp_BMC, reference_logp_BMC, beta)
    metrics = {"logps/chosen": logp_BMC[..., 0], "logps/rejected": logp_BMC[..., 1:].mean(-1)}
    loss_BM = losses.OBJECTIVES[loss](logp_BMC, reference_logp_BMC, beta)
    return loss_BM, losses.reward_metrics(r_BMC) | metrics


def sums(objective: Objective, logp_BMC: jax.Array, batch: Batch) -> dict[str, jax.Array]:
    """Loss and metrics summed over the existing targets, and their number, `targets`."""
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


def build_step(
    logp,
    objective: Objective,
    optimizer: optax.GradientTransformation,
    lora: nnx.State,
    mesh: Mesh,
    *,
    dropout_key=None,
    donate: bool = False,
) -> tuple[Step, TrainState]:
    """The jitted step, and the state that it starts from.

    `step(state, base, batches) -> (state, metrics)` donates the state. `batches` holds arrays
    [number of microbatches, microbatch, ...]: the global batch, whose gradient is the mean over all
    its targets, whatever the microbatches and devices it is split over.

    Args:
      logp: see `make_logp`.
      objective: see `make_objective`.
      optimizer: of the trained arrays.
      lora: the trained arrays on `mesh`; or their shapes with shardings, for an abstract state.
      mesh: of the step.
      dropout_key: of LoRA's dropout; None for none.
      donate: whether the state takes over the arrays of `lora`.
    """
    placed = _state_shardings(lora, optimizer, mesh)
    init = jax.jit(
        lambda lora: TrainState(jnp.zeros((), jnp.int32), lora, optimizer.init(lora)),
        out_shardings=placed,
        donate_argnums=0 if donate else (),
    )
    abstract = isinstance(jax.tree.leaves(lora)[0], jax.ShapeDtypeStruct)
    state = init.eval_shape(lora) if abstract else init(lora)
    step = jax.jit(
        _train_step(logp, objective, optimizer, dropout_key),
        donate_argnums=0,
        out_shardings=(placed, sharding.replicated(mesh)),
        compiler_options=COMPILER_OPTIONS.get(sharding.platform(mesh)),
    )
    return step, state


def _state_shardings(
    lora: nnx.State, optimizer: optax.GradientTransformation, mesh: Mesh
) -> TrainState:
    """Moments lie as the adapter does. Unpinned, XLA would move them after the first step."""
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


def _train_step(logp, objective: Objective, optimizer, dropout_key) -> Step:

    def loss(lora, base, batch, keys_W):
        total = sums(objective, logp(lora, base, batch, keys_W), batch)
        return total["loss"], total

    def microbatch_gradient(state: TrainState, base, batch, index):
        W, keys_W = batch["slot_WT"].shape[0], None
        if dropout_key is not None:
            # By the row's number in the global batch, so that the draw does not depend on devices.
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

        # Shapes of the sums without tracing the model, which is most of a small step's tracing.
        first = jax.tree.map(lambda x: x[0], batches)
        logp_BMC = jax.ShapeDtypeStruct(first["answers_BMCA"].shape[:-1], jnp.float32)
        like = state.lora, jax.eval_shape(functools.partial(sums, objective), logp_BMC, first)
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), like)
        (gradient, total), _ = jax.lax.scan(accumulate, zeros, (jnp.arange(count), batches))
        targets = total.pop("targets")
        gradient, metrics = means(gradient, targets), means(total, targets)
        updates, opt_state = optimizer.update(gradient, state.opt_state, state.lora)
        lora = optax.apply_updates(state.lora, updates)
        # The norm is that before the optimizer clips.
        metrics |= {"grad_norm": optax.tree.norm(gradient), "targets": targets}
        return TrainState(state.step + 1, lora, opt_state), metrics

    return train_step
