"""Batches of examples with grain: the order is a pure function of (seed, step)."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import grain
import numpy as np

from sdpo_jax.data.randomness import generator
from sdpo_jax.data.tokens import Example

MAX_SHAPES = 4  # compiled shapes per stage
GROUP = 16  # batches per run of examples that is sorted by length
ROUND = 8  # padded sizes are multiples of it
COARSE = 64  # those of `coarse_shape`


@dataclasses.dataclass(frozen=True)
class Shape:
    """Padded sizes: P prompt tokens, S packed answer tokens, Q prompt tokens that predict, M
    targets, A tokens per answer, T tokens per row. X is P + S, in a row those of all examples."""

    P: int
    S: int
    Q: int
    M: int
    A: int
    T: int


def round_up(n: int, multiple: int = ROUND) -> int:
    return -(-n // multiple) * multiple


def balance(sizes: Sequence[int], rows: int) -> list[int]:
    """Indices in an order in which `rows` equal runs of the sizes have nearly equal sums.

    Distributes the largest first, with the direction reversed every turn.
    """
    runs: list[list[int]] = [[] for _ in range(rows)]
    for k, i in enumerate(sorted(range(len(sizes)), key=lambda i: -sizes[i])):
        turn, place = divmod(k, rows)
        runs[rows - 1 - place if turn % 2 else place].append(i)
    return [i for run in runs for i in run]


def collate(examples: Sequence[Example], shape: Shape, rows: int = 1) -> dict[str, np.ndarray]:
    """The batch that `sdpo_jax.objectives.logprobs` describes, padded to `shape`."""
    B, C, A = len(examples), examples[0].C, shape.A
    batch = {
        "prompt_BP": np.zeros((B, shape.P), np.int32),
        "prompt_mask_BP": np.zeros((B, shape.P), bool),
        "place_BM": np.full((B, shape.M), -1, np.int32),
        "answers_BMCA": np.zeros((B, shape.M, C, A), np.int32),
        "answers_mask_BMCA": np.zeros((B, shape.M, C, A), bool),
        "packed_BS": np.full((B, shape.S), -1, np.int32),
        "head_BQ": np.full((B, shape.Q), -1, np.int32),
        "predictor_BMCA": np.zeros((B, shape.M, C, A), np.int32),
        "slot_WT": np.full((rows, shape.T), -1, np.int32),
    }
    for b, example in enumerate(examples):
        _fill(example, {name: x[b] for name, x in batch.items() if name != "slot_WT"})
    valid_BX = np.concatenate([batch["prompt_mask_BP"], batch["packed_BS"] >= 0], 1)
    for w, valid_X in enumerate(valid_BX.reshape(rows, -1)):
        slots = np.flatnonzero(valid_X)
        batch["slot_WT"][w, : len(slots)] = slots
    return batch


def stack_targets(values: Sequence[np.ndarray], M: int) -> np.ndarray:
    """Stacks arrays [targets of an example, C] to float32 [B, M, C], padded with zeros."""
    out = np.zeros((len(values), M, values[0].shape[1]), np.float32)
    for b, value in enumerate(values):
        out[b, : len(value)] = value
    return out


def _fill(example: Example, row: dict[str, np.ndarray]) -> None:
    """Writes one example into its row of the batch's arrays."""
    M, C, (Q, A) = example.M, example.C, (len(row["head_BQ"]), row["answers_BMCA"].shape[-1])
    padding = len(row["prompt_BP"]) - len(example.prompt)
    row["prompt_BP"][padding:] = example.prompt
    row["prompt_mask_BP"][padding:] = True
    row["place_BM"][:M] = places_M = padding + np.asarray(example.places, np.int32)

    sizes_MC = np.array([[len(answer) for answer in answers] for answers in example.answers_MC])
    mask_MCA = np.arange(A) < sizes_MC[..., None]
    row["answers_BMCA"][:M][mask_MCA] = np.concatenate(example.answers)
    row["answers_mask_BMCA"][:M] = mask_MCA

    fed_MCA = np.arange(A) < sizes_MC[..., None] - 1
    # Prompt tokens that predict a target's answers: one, or one per token of the chosen answer.
    heads_M = np.ones(M, np.int64)
    if example.continued:
        fed_MCA[:, 0], heads_M = False, sizes_MC[:, 0]
    packed = np.flatnonzero(fed_MCA)
    row["packed_BS"][: len(packed)] = packed
    first_M = np.cumsum(heads_M) - heads_M  # each target's first index in head_BQ
    within = np.arange(heads_M.sum()) - np.repeat(first_M, heads_M)
    row["head_BQ"][: len(within)] = np.repeat(places_M, heads_M) + within

    # An answer's first token is predicted at its target's place, the others by the token before.
    before = np.full(M * C * A, -1)
    before[packed] = Q + np.arange(len(packed))
    predictor_MCA = row["predictor_BMCA"][:M]
    predictor_MCA[..., 1:] = before.reshape(M, C, A)[..., :-1]
    predictor_MCA[..., 0] = first_M[:, None]
    if example.continued:
        predictor_MCA[:, 0] = first_M[:, None] + np.arange(A)
    predictor_MCA[~mask_MCA] = 0


def most_shapes(batches: int, platform: str) -> int:
    """How many shapes the steps of a stage, or an evaluation's batches, may compile and still gain.

    A compilation costs about 8 steps on CPUs, and hundreds of a small model's on other devices.
    """
    return max(1, min(MAX_SHAPES, batches // (8 if platform == "cpu" else 256)))


def choose_shapes(
    batches: Sequence[Sequence[Example]], rows: int = 1, limit: int = MAX_SHAPES
) -> list[Shape]:
    """The shape of each batch, with at most `limit` distinct shapes.

    Sorts the batches by the tokens of their fullest row and repeatedly makes the cut that saves
    the most tokens.
    """
    A = max(len(a) for examples in batches for e in examples for a in e.answers)
    needs = np.array([_needs(examples, rows) for examples in batches])
    parts = [np.argsort(needs[:, 0], kind="stable")]
    while len(parts) < limit:
        saved, count, i = max((*_best_cut(needs[part, 0]), i) for i, part in enumerate(parts))
        if not saved:
            break
        parts[i : i + 1] = np.split(parts[i], [count])
    shapes: list[Any] = [None] * len(batches)
    for part in parts:
        T, P, S, Q, M = map(int, needs[part].max(0))
        Q = Q if Q == 1 else round_up(Q)  # the paper's prompt has one predicting token
        for i in part:
            shapes[i] = Shape(round_up(P), round_up(S), Q, M, A, round_up(T))
    return shapes


def coarse_shape(examples: Sequence[Example], rows: int = 1) -> Shape:
    """A shape that depends on these examples alone, of the few that occur for prompts of one kind.

    Evaluation over a catalogue and recommending use it, so their log-probs are equal bit for bit.
    """
    T, P, S, Q, M = _needs(examples, rows)
    A = max(len(a) for e in examples for a in e.answers)
    sizes = [round_up(size, COARSE) for size in (P, S, T)]
    return Shape(sizes[0], sizes[1], Q if Q == 1 else round_up(Q), M, round_up(A), sizes[2])


def _best_cut(sizes: np.ndarray) -> tuple[int, int]:
    """Tokens saved by the best cut of ascending sizes, padded to their run's largest; its index."""
    count = np.arange(len(sizes))
    saved = count * (sizes[-1] - np.roll(sizes, 1))  # the first `count` padded to their own largest
    best = int(np.argmax(saved))
    return int(saved[best]), best


def _needs(examples: Sequence[Example], rows: int) -> tuple[int, int, int, int, int]:
    """Tokens of the fullest row; maxima of prompt, packed and predicting tokens and of targets."""
    fullest = np.reshape([e.tokens for e in examples], (rows, -1)).sum(-1).max()
    sizes = [(len(e.prompt), e.packed, e.heads, e.M) for e in examples]
    return int(fullest), *(max(column) for column in zip(*sizes, strict=True))


def stream(rows: int, seed: int, epochs: int) -> grain.MapDataset:
    """Row numbers in training order: each epoch is a fresh permutation."""
    return grain.MapDataset.range(rows).seed(seed).shuffle().repeat(epochs)


def grouped_batches(
    order: Sequence[Any], lengths: Mapping[Any, int], batch_size: int, seed: int, alike: bool
):
    """Cuts `order` into batches and shuffles the GROUP batches of each run.

    With `alike`, a run is sorted by length and cut, so that a batch has little padding and a row
    can come anywhere in its run. Otherwise the batches of a run are balanced to similar numbers of
    tokens. Segments of histories need that, as each of their tokens belongs to a target: sorted
    batches would have ten targets or hundreds.
    """
    batches = []
    for start in range(0, len(order), GROUP * batch_size):
        run = sorted(order[start : start + GROUP * batch_size], key=lengths.__getitem__)
        if not alike:
            run = [run[i] for i in balance([lengths[key] for key in run], len(run) // batch_size)]
        cut = [run[i : i + batch_size] for i in range(0, len(run), batch_size)]
        draw = generator(seed, "batches", "train", start).permutation(len(cut))
        batches += [cut[i] for i in draw]
    return batches


def batches(
    examples: Sequence[Sequence[Example]],
    references: Sequence[Sequence[np.ndarray]] | None = None,
    start: int = 0,
    rows: int = 1,
    limit: int = MAX_SHAPES,
    own: Sequence[int] | None = None,
    shapes: Sequence[Shape] | None = None,
) -> Iterator[dict[str, np.ndarray]]:
    """Collated batches from number `start` on, made ahead of time by grain's threads.

    Args:
      examples: the examples of each batch.
      references: for each batch the reference's log-probs of each example, [M, C].
      start: number of the first batch, to resume after a restart.
      rows: rows of tokens per batch.
      limit: maximum number of distinct shapes.
      own: the rows that this process makes; None: all. Shapes depend on the whole batch.
      shapes: of the batches; None: chosen here.
    """
    shapes = shapes or choose_shapes(examples, rows, limit)
    chosen = range(rows) if own is None else own

    def make(i: int) -> dict[str, np.ndarray]:
        size = len(examples[i]) // rows
        places = [row * size + place for row in chosen for place in range(size)]
        batch = collate([examples[i][place] for place in places], shapes[i], len(chosen))
        if references:
            found = [references[i][place] for place in places]
            batch["reference_logp_BMC"] = stack_targets(found, shapes[i].M)
        return batch

    source = grain.MapDataset.range(start, len(examples)).map(make)
    options = grain.ReadOptions(num_threads=2, prefetch_buffer_size=4)
    return iter(source.to_iter_dataset(options))
