"""Metrics of next-item recommendation with one relevant item per example.

Accuracy is measured per example; a system's value is the mean over all examples, invalid ones
included. `coverage`, `gini` and `mean_popularity` describe the recommended items, relevant or not.
Intervals are 95%. Windows of one user are not independent, so users are the sampled units: see
`design_effect`.
"""

import collections
import dataclasses
import math
from collections.abc import Hashable, Mapping, Sequence

import numpy as np
from scipy.special import stdtrit

from sdpo_jax.data.text import plain

Z = 1.959963984540054  # the normal distribution's 0.975 quantile


def recommended(generation: str, candidates: Sequence[str]) -> int | None:
    """Index of the candidate that a generation names, or None where it is invalid.

    A generation is valid iff exactly one candidate is a substring of it, case-sensitive (Chen
    et al. 2024, arXiv 2406.09215; the authors' evaluate_batch.py). So a candidate that contains
    another candidate's title can never be recommended: both are found. The generation is compared
    in the titles' form, with composed accents and single spaces.
    """
    generation = plain(generation)
    found = [i for i, title in enumerate(candidates) if title in generation]
    return found[0] if len(found) == 1 else None


def target_rank(scores: Sequence[float] | np.ndarray, target: int) -> int:
    """The target's rank, 1 to C, by descending score.

    Candidates with the target's score rank before it. A system that gives every candidate the same
    score thus gets the last rank; ranking the target first would make it perfect (on ties in
    ranking metrics: McSherry & Najork 2008, doi 10.1007/978-3-540-78646-7_38). NaN counts as high.
    """
    return 1 + sum(not s < scores[target] for i, s in enumerate(scores) if i != target)


def hit_at(k: int, rank: int | None) -> float:
    """HR@k = 1 if rank <= k, else 0 (equals recall@k with one relevant item).

    Here and below, a rank of None means that the target is not in the ranked list: a miss.
    """
    return float(rank is not None and rank <= k)


def ndcg_at(k: int, rank: int | None) -> float:
    """NDCG@k = 1 / log2(1 + rank) if rank <= k, else 0.

    Järvelin & Kekäläinen 2002 (doi 10.1145/582415.582418) with one relevant item, whose ideal
    gain, at rank 1, is 1.
    """
    return 1 / math.log2(1 + rank) if rank is not None and rank <= k else 0.0


def reciprocal_rank(rank: int | None) -> float:
    """1 / rank; its mean is MRR (Voorhees 1999, the TREC-8 question answering track report)."""
    return 0.0 if rank is None else 1 / rank


def coverage(recommended: Sequence[Sequence[Hashable]], items: int) -> float:
    """Share of all `items` that appear in at least one of the recommended lists.

    Catalogue coverage of Ge et al. 2010 (doi 10.1145/1864708.1864761); RecBole's ItemCoverage.
    Raises ValueError if more than `items` different items are recommended.
    """
    return len(_counts(recommended, items)) / items


def gini(recommended: Sequence[Sequence[Hashable]], items: int) -> float:
    """Gini index of how often each of all `items` is recommended.

    sum_i (2i - I - 1) P_(i) / (I sum_i P_(i)), where P_(1) <= … <= P_(I) are the numbers of lists
    that contain each item (RecBole's GiniIndex). 0: all items equally often, or none at all;
    (I - 1) / I: a single item. Raises ValueError as `coverage` does.
    """
    counts = sorted(_counts(recommended, items).values())
    total = sum(counts)
    # Items that are never recommended come first and add nothing to the sum.
    ranks = range(items - len(counts) + 1, items + 1)
    weighted = sum((2 * i - items - 1) * count for i, count in zip(ranks, counts, strict=True))
    return weighted / (items * total) if total else 0.0


def mean_popularity(
    recommended: Sequence[Sequence[Hashable]], counts: Mapping[Hashable, int]
) -> float:
    """Mean number of training interactions of the recommended items.

    The mean over the lists of the mean over each list (RecBole's AveragePopularity). Items without
    a count have none. Empty lists are left out; 0 if all are empty.
    """
    means = [mean([counts.get(item, 0) for item in top]) for top in recommended if top]
    return mean(means) if means else 0.0


def _counts(recommended: Sequence[Sequence[Hashable]], items: int) -> collections.Counter:
    """Number of lists per recommended item."""
    counts = collections.Counter(item for top in recommended for item in top)
    if len(counts) > items:
        raise ValueError(f"items: found {len(counts)} recommended, expected at most {items}")
    return counts


def mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def chance(metric, candidates: int) -> float:
    """The mean of `metric(rank)` when the target's rank is uniform on 1..C."""
    return mean([metric(rank) for rank in range(1, candidates + 1)])


def design_effect(values: Sequence[float], users: Sequence[Hashable]) -> float:
    """Variance of the mean of `values` with users sampled, over that of independent examples.

    With G users: G/(G-1) sum_g (sum_{i of g} (x_i - mean))^2 / n^2, over s^2/n; Kish 1965, Survey
    Sampling. For few users times the square of the quantile of Student's t, G-1 degrees of freedom,
    over that of the normal distribution. 1 where each user has one example. At least 1, as few
    users may by chance vary less than independent examples; at most n, as if all were one example.
    """
    n, centre = len(values), mean(values)
    of_user: dict[Hashable, float] = collections.defaultdict(float)
    for value, user in zip(values, users, strict=True):
        of_user[user] += value - centre
    G, squares = len(of_user), math.fsum((value - centre) ** 2 for value in values)
    if n == G:
        return 1.0
    if G < 2:
        return float(n)
    few = (float(stdtrit(G - 1, 0.975)) / Z) ** 2
    between = math.fsum(total**2 for total in of_user.values())
    alike = G / (G - 1) * between / squares * (n - 1) / n if squares else 1.0
    return min(max(1.0, alike) * few, float(n))


def wilson(successes: float, n: float, effect: float = 1.0) -> tuple[float, float]:
    """Score interval of a proportion p = s/n, worth n/effect independent examples.

    (p + z²/2n ± z sqrt(p(1-p)/n + z²/4n²)) / (1 + z²/n): Wilson 1927
    (doi 10.1080/01621459.1927.10502953). It stays within [0, 1] and has a positive width even at
    p = 0 and p = 1.
    """
    p, n = successes / n, n / effect
    centre = p + Z * Z / (2 * n)
    half = Z * math.sqrt(p * (1 - p) / n + Z * Z / (4 * n * n))
    scale = 1 + Z * Z / n
    # At p = 0 and 1 an end is exact, but for rounding.
    low = (centre - half) / scale if p > 0 else 0.0
    return low, (centre + half) / scale if p < 1 else 1.0


def interval(values: Sequence[float], users: Sequence[Hashable]) -> tuple[float, float]:
    """Interval of the mean of `values`, with users sampled.

    mean ± z sqrt(d s² / n) with sample variance s² and design effect d; clipped to [0, 1] when all
    values lie in it. Its width is 0 when all values are equal, so use `wilson` for proportions. A
    single value gives no variance: all of [0, 1], or of the real line.
    """
    n, centre = len(values), mean(values)
    half = math.inf
    if n > 1:
        variance = math.fsum((value - centre) ** 2 for value in values) / (n - 1)
        half = Z * math.sqrt(design_effect(values, users) * variance / n)
    low, high = centre - half, centre + half
    if all(0 <= value <= 1 for value in values):
        return max(0.0, low), min(1.0, high)
    return low, high


@dataclasses.dataclass(frozen=True)
class Difference:
    """Hit ratio of `a` minus that of `b` on the same examples, its interval and p-value."""

    value: float
    low: float
    high: float
    p: float
    only_a: int
    only_b: int
    n: int


def paired_difference(
    hits_a: Sequence[bool], hits_b: Sequence[bool], users: Sequence[Hashable]
) -> Difference:
    """Compares two systems on the same examples, in the same order.

    With b examples hit by `a` only and c by `b` only, the value is (b - c)/n. The interval is
    Bonett & Price's (2012, doi 10.3102/1076998611411915): Wald's with one added to b and c
    and two to n, which keeps its coverage at small counts; its variance times `design_effect`.
    p is that of `exchanged`. Raises ValueError for unequal lengths.
    """
    nets = [int(bool(a)) - int(bool(b)) for a, b in zip(hits_a, hits_b, strict=True)]
    n, only_a, only_b = len(nets), nets.count(1), nets.count(-1)
    p_a, p_b = (only_a + 1) / (n + 2), (only_b + 1) / (n + 2)
    variance = (p_a + p_b - (p_a - p_b) ** 2) / (n + 2) * design_effect(nets, users)
    half = Z * math.sqrt(variance)
    of_user: dict[Hashable, int] = collections.defaultdict(int)
    for net, user in zip(nets, users, strict=True):
        of_user[user] += net
    return Difference(
        value=(only_a - only_b) / n,
        low=max(-1.0, p_a - p_b - half),
        high=min(1.0, p_a - p_b + half),
        p=exchanged(list(of_user.values())),
        only_a=only_a,
        only_b=only_b,
        n=n,
    )


def exchanged(nets: Sequence[int]) -> float:
    """Exact two-sided p-value: the share of exchanges of the systems with a sum so far from 0.

    `nets` are, by user, the hits of one system minus those of the other. Were the systems equal,
    each could as well have the other sign (Fisher's randomization test). Where each user has one
    example, it is McNemar's exact test (1947, doi 10.1007/BF02295996).
    """
    reach = sum(map(abs, nets))
    share = np.zeros(2 * reach + 1)  # of all exchanges, by their sum from -reach to reach
    share[reach] = 1.0
    for net in map(abs, nets):
        if net:
            share = (np.roll(share, net) + np.roll(share, -net)) / 2  # nothing wraps around
    distance = np.abs(np.arange(-reach, reach + 1))
    return min(1.0, float(share[distance >= abs(sum(nets))].sum()))
