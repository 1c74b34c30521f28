"""Batches of examples with grain: the order is a pure function of (seed, step)."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import grain
import numpy as np

from sdpo_jax.data.draws import generator
from sdpo_jax.data.tokens import Example

MAX_SHAPES = 4  # compiled shapes a stage may have
GROUP = 16  # batches that are sorted by length together before they are cut
ROUND = 8


@dataclasses.dataclass(frozen=True)
class Shape:
    """Padded sizes: P prompt tokens, S packed answer tokens, A tokens an answer, T of a row."""

    P: int
    S: int
    A: int
    T: int


def round_up(n: int, multiple: int = ROUND) -> int:
    return -(-n // multiple) * multiple


def deal(sizes: Sequence[int], rows: int) -> list[int]:
    """An order in which `rows` equal runs of the sizes have nearly equal sums.

    The largest are dealt first, forth and back, as cards are.
    """
    hands: list[list[int]] = [[] for _ in range(rows)]
    for k, i in enumerate(sorted(range(len(sizes)), key=lambda i: -sizes[i])):
        turn, place = divmod(k, rows)
        hands[rows - 1 - place if turn % 2 else place].append(i)
    return [i for hand in hands for i in hand]


def collate(examples: Sequence[Example], shape: Shape, rows: int = 1) -> dict[str, np.ndarray]:
    """The batch that `sdpo_jax.objectives.logprobs` describes, padded to `shape`."""
    B, C = len(examples), len(examples[0].answers)
    batch = {
        "prompt_BP": np.zeros((B, shape.P), np.int32),
        "prompt_mask_BP": np.zeros((B, shape.P), bool),
        "answers_BCA": np.zeros((B, C, shape.A), np.int32),
        "answers_mask_BCA": np.zeros((B, C, shape.A), bool),
        "packed_BS": np.full((B, shape.S), -1, np.int32),
        "slot_RT": np.full((rows, shape.T), -1, np.int32),
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
    valid_BX = np.concatenate([batch["prompt_mask_BP"], batch["packed_BS"] >= 0], 1)
    for r, valid_X in enumerate(valid_BX.reshape(rows, -1)):
        slots = np.flatnonzero(valid_X)
        batch["slot_RT"][r, : len(slots)] = slots
    return batch


def choose_shapes(
    batches: Sequence[Sequence[Example]], rows: int = 1, limit: int = MAX_SHAPES
) -> list[Shape]:
    """The shape of each batch, at most `limit` distinct ones.

    The batches, sorted by the tokens of their fullest row, are cut again and again where that
    saves the most tokens.
    """
    A = max(len(a) for examples in batches for e in examples for a in e.answers)
    needs = np.array([_needs(examples, rows) for examples in batches])
    parts = [np.argsort(needs[:, 0], kind="stable")]
    while len(parts) < limit:
        saved, count, i = max((*_best_cut(needs[part, 0]), i) for i, part in enumerate(parts))
        if not saved:
            break
        parts[i : i + 1] = np.split(parts[i], [count])
    shapes: list[Shape] = [Shape(0, 0, 0, 0)] * len(batches)
    for part in parts:
        T, P, S = (round_up(max(int(n), 1)) for n in needs[part].max(0))
        for i in part:
            shapes[i] = Shape(P, S, A, T)
    return shapes


def _best_cut(sizes: np.ndarray) -> tuple[int, int]:
    """Of ascending sizes, each fed at its run's largest: tokens saved by a cut, and its place."""
    count = np.arange(len(sizes))
    saved = count * (sizes[-1] - np.roll(sizes, 1))  # the first `count` fed as their own largest
    best = int(np.argmax(saved))
    return int(saved[best]), best


def _needs(examples: Sequence[Example], rows: int) -> tuple[int, int, int]:
    """Tokens of the fullest row, of the longest prompt, and of the most answers."""
    fullest = np.reshape([e.tokens for e in examples], (rows, -1)).sum(-1).max()
    return int(fullest), max(len(e.prompt) for e in examples), max(e.packed for e in examples)


def stream(rows: int, seed: int, epochs: int) -> grain.MapDataset:
    """Row numbers in training order: each epoch is a fresh permutation."""
    return grain.MapDataset.range(rows).seed(seed).shuffle().repeat(epochs)


def grouped_batches(order: Sequence[Any], lengths: Mapping[Any, int], batch_size: int, seed: int):
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
    rows: int = 1,
    limit: int = MAX_SHAPES,
    own: Sequence[int] | None = None,
) -> Iterator[dict[str, np.ndarray]]:
    """Collated batches from number `start` on, made ahead of time by grain's threads.

    Args:
      examples: the examples of each batch.
      extra: for each batch, further arrays to carry along (reference log-probs).
      start: the first batch's number, for going on after a restart.
      rows: in how many rows of tokens a batch lies.
      limit: how many distinct shapes there may be.
      own: the rows that this process makes; None: all. Shapes follow from the whole batch.
    """
    shapes = choose_shapes(examples, rows, limit)
    chosen = range(rows) if own is None else own

    def make(i: int) -> dict[str, np.ndarray]:
        size = len(examples[i]) // rows
        places = [row * size + place for row in chosen for place in range(size)]
        batch = collate([examples[i][place] for place in places], shapes[i], len(chosen))
        return batch | {name: x[places] for name, x in (extra[i] if extra else {}).items()}

    source = grain.MapDataset.range(start, len(examples)).map(make)
    options = grain.ReadOptions(num_threads=2, prefetch_buffer_size=4)
    return iter(source.to_iter_dataset(options))
