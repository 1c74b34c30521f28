"""The examples of a stage, their order, and their answers."""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from sdpo_jax.data import loader
from sdpo_jax.data.negatives import Negatives
from sdpo_jax.data.randomness import generator
from sdpo_jax.data.segments import Unit
from sdpo_jax.data.tokens import Encoder, Example
from sdpo_jax.runs.config import RunConfig, StageConfig
from sdpo_jax.system.errors import InputError


class Key(NamedTuple):
    """An example of a stage: its number in the split, whether its prompt has item vectors, and the
    number of its draw of negatives."""

    unit: int
    vectors: bool = False
    draw: int = 0


def plan(config: RunConfig, stage: str, units: int) -> list[int]:
    """The examples of `train` in the order of the stage; a multiple of the batch size.

    Raises InputError if the stage would have no step.
    """
    of_stage: StageConfig = getattr(config, stage)
    steps = units * of_stage.epochs // config.batch_size
    if of_stage.max_steps:
        steps = min(steps, of_stage.max_steps)
    if steps < 1:
        raise InputError(
            f"{stage}: {units} examples x {of_stage.epochs} epochs give no batch of "
            f"{config.batch_size}: lower --config.batch_size or raise --config.{stage}.epochs"
        )
    order: Any = loader.stream(units, config.seed + (stage == "sdpo"), of_stage.epochs)
    return [int(order[i]) for i in range(steps * config.batch_size)]


def curriculum(units: Sequence[int], vectors: bool, gradual: bool, seed: int) -> list[Key]:
    """Decides for each example whether its prompt has item vectors.

    If `gradual`, the i-th of n examples has them with probability i / n: LLaRA's curriculum from
    texts to hybrid prompts (Liao et al. 2024, arXiv 2312.02445, section 3.3).
    """
    draws = generator(seed, "curriculum", "train", 0).random(len(units))
    shares = np.arange(len(units)) / len(units) if gradual else np.ones(len(units))
    return [
        Key(unit, bool(vectors and draw < share))
        for unit, draw, share in zip(units, draws, shares, strict=True)
    ]


def redrawn(order: Sequence[Key], units: int) -> list[Key]:
    """The same, with another draw of negatives in each epoch of `units` examples."""
    return [key._replace(draw=i // units) for i, key in enumerate(order)]


def encode(
    encoder: Encoder,
    split: str,
    units: Sequence[Unit],
    keys: Iterable[Key],
    negatives: Negatives,
    count: int,
) -> dict[Key, Example]:
    """Key -> Example, with each target and `count` drawn negatives as answers."""
    found = sorted(set(keys))
    rows = [units[key.unit] for key in found]
    items = [
        [
            [encoder.window(split, row).target, *drawn]
            for row, drawn in zip(
                of, _drawn(encoder, split, of, key, negatives, count), strict=True
            )
        ]
        for key, of in zip(found, rows, strict=True)
    ]
    if encoder.prompt == "history":
        return {
            key: encoder.segment(split, of, of_rows)
            for key, of, of_rows in zip(found, rows, items, strict=True)
        }
    single = encoder.examples(
        split, [row for (row,) in rows], [of for (of,) in items], [key.vectors for key in found]
    )
    return dict(zip(found, single, strict=True))


def _drawn(
    encoder: Encoder, split: str, rows: Unit, key: Key, negatives: Negatives, count: int
) -> list[list[int]]:
    last = encoder.window(split, rows[-1]).place
    return [negatives.draw(split, row, count, key.draw, last) if count else [] for row in rows]


def select_in_band(logp_MC: np.ndarray, count: int, band: Sequence[float]) -> np.ndarray:
    """[M, 1 + count]: the chosen answer, and `count` others from a band of log-probs.

    The others are ranked by log-prob, the highest first. `band` gives the first and the last rank
    as shares of their number; the ranks between are evenly spaced.
    """
    order_MK = 1 + np.argsort(-logp_MC[:, 1:], 1, kind="stable")
    n = order_MK.shape[1]
    first, last = int(band[0] * n), max(int(band[0] * n) + count, round(band[1] * n))
    first = min(first, n - count)
    places = np.linspace(first, min(last, n) - 1, count).round().astype(int)
    return np.concatenate([np.zeros((len(order_MK), 1), int), order_MK[:, places]], 1)


def balanced(examples, keys: Sequence[Any], rows: int) -> list[Any]:
    """`keys` in an order in which `rows` equal runs of their examples have nearly equal lengths."""
    order = loader.balance([examples[k].tokens for k in keys], rows)
    return [keys[i] for i in order]
