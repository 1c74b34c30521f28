"""Trains a network to predict the next item of a history among all items.

Adam with early stopping and L2 regularization, whose weight validation chooses. Validation measures
HR@1 among a window's candidates, as the evaluation does.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from sdpo_jax.baselines.windows import Arrays, place
from sdpo_jax.evaluation import metrics
from sdpo_jax.system.errors import InputError


@dataclasses.dataclass(frozen=True)
class Settings:
    """The paper's: Adam at 1e-3, batches of 256, L2 from 1e-3 to 1e-7 (section 4.1)."""

    learning_rate: float = 1e-3
    batch_size: int = 256
    l2: tuple[float, ...] = (1e-3, 1e-4, 1e-5, 1e-6, 1e-7)
    epochs: int = 200  # at most
    patience: int = 5  # epochs without a better validation before training stops
    seed: int = 0


@dataclasses.dataclass(frozen=True)
class Fitted:
    """Weights, L2 weight and validation HR@1 of the best epoch; `tried`: L2 weight -> best HR@1."""

    state: nnx.State
    l2: float
    epoch: int
    hit_ratio: float
    tried: dict[str, float]


NOTHING = nnx.State({})


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How a network is made, and its optimizer, by default Adam.

    `depends`: what its weights depend on besides data and settings; `about`: more to report of it.
    """

    make: Callable[[nnx.Rngs], nnx.Module]
    optimizer: optax.GradientTransformation | None = None
    depends: tuple[Any, ...] = ()
    about: dict[str, Any] = dataclasses.field(default_factory=dict)


class Scores:
    """Scores of every item, [B, I], from networks of one structure; compiled once."""

    BATCH = 1024

    def __init__(self, graphdef: nnx.GraphDef, frozen: nnx.State = NOTHING):
        def scores(state, frozen, history_BT):
            return nnx.merge(graphdef, state, frozen)(history_BT)

        self._scores, self._frozen = jax.jit(scores), frozen

    def __call__(self, state: nnx.State, history_BT: np.ndarray) -> np.ndarray:
        B, T = history_BT.shape
        # The last batch is filled with windows from the start.
        batches = np.resize(history_BT, (-(-B // self.BATCH), self.BATCH, T))
        scores = [self._scores(state, self._frozen, batch) for batch in batches]
        return np.concatenate(jax.device_get(scores))[:B]


def ranks(scores_BI: np.ndarray, windows: Arrays) -> list[int]:
    """The target's rank among the candidates of each window."""
    return [
        metrics.target_rank(scores_I[candidates_C], place(candidates_C, target))
        for scores_I, candidates_C, target in zip(
            scores_BI, windows.candidates_BC, windows.target_B, strict=True
        )
    ]


def make_epoch(
    graphdef: nnx.GraphDef, optimizer: optax.GradientTransformation, frozen: nnx.State = NOTHING
):
    """Jitted `epoch(state, opt_state, key, l2, history_XBT, target_XB)` over X batches.

    Returns (state, opt_state, mean loss). `state` is trained and regularized, `frozen` is the rest
    of the network.
    """

    def loss(state, frozen, history_BT, target_B, key, l2):
        scores_BI = nnx.merge(graphdef, state, frozen)(history_BT, nnx.Rngs(dropout=key))
        squares = sum(jnp.vdot(leaf, leaf) for leaf in jax.tree.leaves(state))
        cross_entropy_B = optax.softmax_cross_entropy_with_integer_labels(scores_BI, target_B)
        return cross_entropy_B.mean() + l2 / 2 * squares

    def step(frozen, carry, batch):
        state, opt_state, key, l2 = carry
        key, dropout = jax.random.split(key)
        value, gradient = jax.value_and_grad(loss)(state, frozen, *batch, dropout, l2)
        updates, opt_state = optimizer.update(gradient, opt_state)
        return (optax.apply_updates(state, updates), opt_state, key, l2), value

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def epoch(state, opt_state, key, l2, history_XBT, target_XB, frozen):
        carry, losses = jax.lax.scan(
            functools.partial(step, frozen), (state, opt_state, key, l2), (history_XBT, target_XB)
        )
        return carry[0], carry[1], losses.mean()

    return functools.partial(epoch, frozen=frozen)


def fit(
    recipe: Recipe,
    train: Arrays,
    validation: Arrays,
    settings: Settings,
    report: Callable[[str], Any] = print,
) -> Fitted:
    """The best of one training per L2 weight; `report` receives a line per epoch.

    Only `nnx.Param`s are trained. Raises InputError where training diverges.
    """
    graphdef, first, frozen = nnx.split(recipe.make(nnx.Rngs(settings.seed)), nnx.Param, ...)
    optimizer = recipe.optimizer or optax.adam(settings.learning_rate)
    epoch, scores = make_epoch(graphdef, optimizer, frozen), Scores(graphdef, frozen)

    def hit_ratio(state: nnx.State) -> float:
        found = ranks(scores(state, validation.history_BT), validation)
        return metrics.mean([rank == 1 for rank in found])

    best = None
    tried = {}
    for l2 in settings.l2:
        value, at, state = _until_no_better(
            first, epoch, optimizer, train, settings, l2, hit_ratio, report
        )
        tried[f"{l2:g}"] = value
        if best is None or value > best.hit_ratio:
            best = Fitted(state, l2, at, value, tried)
    assert best is not None  # there is an L2 weight
    return best


def _until_no_better(first, epoch, optimizer, train, settings, l2, hit_ratio, report):
    """(validation's HR@1, epoch, state) at the best epoch of one training."""
    state = jax.tree.map(jnp.copy, first)
    opt_state = optimizer.init(state)
    order = np.random.default_rng(settings.seed)
    best = (-1.0, 0, first)
    for number in range(1, settings.epochs + 1):
        batches = _shuffled(train, order, settings.batch_size)
        key = jax.random.fold_in(jax.random.key(settings.seed), number)
        state, opt_state, loss = epoch(state, opt_state, key, l2, *batches)
        loss = float(loss)
        if not math.isfinite(loss):
            raise InputError(
                f"L2 {l2:g}, epoch {number}: found a loss of {loss}, expected a finite number: "
                "training diverged, leave out this --l2"
            )
        value = hit_ratio(state)
        report(f"L2 {l2:g} epoch {number}: loss {loss:.4f}, validation HR@1 {value:.4f}")
        if value > best[0]:
            best = (value, number, jax.tree.map(jnp.copy, state))
        if number - best[1] >= settings.patience:
            break
    return best


def _shuffled(train: Arrays, order: np.random.Generator, size: int) -> Sequence[np.ndarray]:
    """Shuffled full batches of history, [X, B, T], and targets, [X, B]; the rest is left out."""
    size = min(size, len(train.target_B))
    rows = order.permutation(len(train.target_B))
    rows = rows[: len(rows) // size * size].reshape(-1, size)
    return train.history_BT[rows], train.target_B[rows]
