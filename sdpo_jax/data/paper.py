"""Known figures of the S-DPO paper (Chen et al. 2024, arXiv 2406.09215).

Reports print "–" for the others.
"""

# Users (sequences), items, interactions: Table 3.
SIZES = {
    "movielens": (943, 1682, 100_000),
    "lastfm": (1220, 4606, 73_510),
    "goodreads": (6031, 4500, 220_100),
}
# HR@1: Table 1.
HIT_RATIO = {
    "movielens": {"sasrec": 0.3444, "gru4rec": 0.3750, "caser": 0.3861},
    "lastfm": {"sasrec": 0.2233, "gru4rec": 0.2616, "caser": 0.2233},
}
