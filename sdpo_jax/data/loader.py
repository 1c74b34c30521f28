"""Batches of examples with grain: the order is a pure function of (seed, step)."""

import dataclasses
from collections.abc import Iterator, Sequence

import grain
import numpy as np

from sdpo_jax.data.draws import generator
from sdpo_jax.data.tokens import Example

MAX_SHAPES = 4  # compiled shapes a stage may have
GROUP = 16  # batches that are sorted by length together before they are cut
ROUND = 8


@dataclasses.dataclass(frozen=True)
class Shape:
    """Padded sizes of a batch: P prompt tokens, S packed answer tokens, A tokens an answer."""

    P: int
    S: int
    A: int


def round_up(n: int, multiple: int = ROUND) -> int:
    return -(-n // multiple) * multiple


def collate(examples: Sequence[Example], shape: Shape) -> dict[str, np.ndarray]:
    """The batch that `sdpo_jax.objectives.logprobs` describes, padded to `shape`."""
    B, C = len(examples), len(examples[0].answers)
    batch = {
        "prompt_BP": np.zeros((B, shape.P), np.int32),
        "prompt_mask_BP": np.zeros((B, shape.P), bool),
        "answers_BCA": np.zeros((B, C, shape.A), np.int32),
        "answers_mask_BCA": np.zeros((B, C, shape.A), bool),
        "packed_BS": np.full((B, shape.S), -1, np.int32),
    }
    for b, example in enumerate(examples):
        batch["prompt_BP"][b, shape.P - len(example.prompt) :] = example.prompt
        batch["prompt_mask_BP"][b, shape.P - len(example.prompt) :] = True
        for c, answer in enumerate(example.answers):
            batch["answers_BCA"][b, c, : len(answer)] = answer
            batch["answers_mask_BCA"][b, c, : len(answer)] = True
        fed_CA = batch["answers_mask_BCA"][b].copy()
        fed_CA[:, :-1] = fed_CA[:, 1:]
        fed_CA[:, -1] = False
        packed = np.flatnonzero(fed_CA)
        batch["packed_BS"][b, : len(packed)] = packed
    return batch


def choose_shapes(batches: Sequence[Sequence[Example]], limit: int = MAX_SHAPES) -> list[Shape]:
    """The shape of each batch, at most `limit` distinct ones, by cutting the sorted batches."""
    A = max(len(a) for examples in batches for e in examples for a in e.answers)
    needs = np.array(
        [
            (max(len(e.prompt) for e in examples), max(e.packed for e in examples))
            for examples in batches
        ]
    )
    shapes: list[Shape] = [Shape(0, 0, 0)] * len(batches)
    for part in np.array_split(np.lexsort(needs.T[::-1]), min(limit, len(batches))):
        P, S = needs[part].max(0)
        for i in part:
            shapes[i] = Shape(round_up(int(P)), round_up(max(int(S), 1)), A)
    return shapes


def stream(rows: int, seed: int, epochs: int) -> grain.MapDataset:
    """Row numbers in training order: each epoch is a fresh permutation."""
    return grain.MapDataset.range(rows).seed(seed).shuffle().repeat(epochs)


def grouped_batches(order: Sequence[int], lengths: dict[int, int], batch_size: int, seed: int):
    """Cuts `order` into batches of similar length.

    Runs of GROUP batches are sorted by length, cut, and put into a drawn order, so a batch has
    little padding while any row still can come at any place of its run.
    """
    batches = []
    for start in range(0, len(order), GROUP * batch_size):
        run = sorted(order[start : start + GROUP * batch_size], key=lengths.__getitem__)
        cut = [run[i : i + batch_size] for i in range(0, len(run), batch_size)]
        draw = generator(seed, "batches", "train", start).permutation(len(cut))
        batches += [cut[i] for i in draw]
    return batches


def spread(n: int, limit: int = 0) -> list[int]:
    """`limit` row numbers evenly spread over n rows, the ends included; all when limit is 0."""
    if not 0 < limit < n:
        return list(range(n))
    return [int(i) for i in np.linspace(0, n - 1, limit).round()]


def batches(
    examples: Sequence[Sequence[Example]],
    extra: Sequence[dict[str, np.ndarray]] | None = None,
    start: int = 0,
    limit: int = MAX_SHAPES,
) -> Iterator[dict[str, np.ndarray]]:
    """Collated batches from number `start` on, made ahead of time by grain's threads.

    Args:
      examples: the examples of each batch.
      extra: for each batch, further arrays to carry along (reference log-probs).
      start: the first batch's number, for going on after a restart.
      limit: how many distinct shapes there may be.
    """
    shapes = choose_shapes(examples, limit)
    source = grain.MapDataset.range(start, len(examples)).map(
        lambda i: collate(examples[i], shapes[i]) | (extra[i] if extra else {})
    )
    options = grain.ReadOptions(num_threads=2, prefetch_buffer_size=4)
    return iter(source.to_iter_dataset(options))
