"""What a prepared folder gives away without any taste: its lists, its order, its titles."""

import dataclasses

import numpy as np
import pytest
from test_baselines import TITLES, dataset
from tiny import dataset_of, window

from sdpo_jax import leakcheck
from sdpo_jax.baselines import trainer, trivial
from sdpo_jax.data import candidates
from sdpo_jax.data.prepared import Dataset, Window, write_dataset


def leaky(data: Dataset) -> Dataset:
    """Candidates drawn from the target alone."""

    def draw(window: Window) -> Window:
        rng = np.random.default_rng(window.target)
        others = [i for i in TITLES if i not in (window.target, *window.history)]
        chosen = [window.target, *(int(i) for i in rng.permutation(others)[:19])]
        return dataclasses.replace(window, candidates=tuple(chosen))

    splits = {name: [draw(w) for w in rows] for name, rows in data.splits.items()}
    return dataclasses.replace(data, splits=splits)


def test_a_look_up_finds_the_target_where_candidates_depend_on_it(tmp_path):
    write_dataset(tmp_path / "leaky", leaky(dataset()))
    found = leakcheck.leakcheck(str(tmp_path / "leaky"))
    assert list(found) == ["val", "test"] and found["test"]["n"] == 80
    assert found["test"]["lookup_hit_ratio_at_1"] > 0.9
    assert leakcheck.warnings_of(found["test"])[0].startswith(
        "a look-up that ignores the history is right in"
    )


@pytest.mark.parametrize(
    ("others", "said"),
    [
        # The target always comes first; negatives are items that are never a target.
        (range(100, 140), "the target is at one place of the list in 1.000 of the windows"),
        (range(140, 180), "popularity is right in 1.000 of the windows, so negatives"),
    ],
)
def test_lists_that_tell_the_target_otherwise_are_told(others, said, tmp_path):
    rng, titles = np.random.default_rng(1), {100 + i: f"title {i}" for i in range(80)}

    def listed(window: Window) -> Window:
        known = {*window.history, window.target}
        drawn = rng.choice([item for item in others if item not in known], 19, replace=False)
        found = [window.target, *drawn.tolist()]
        if others[0] != 100:
            rng.shuffle(found)
        return dataclasses.replace(window, candidates=tuple(found))

    splits = {name: [listed(w) for w in part] for name, part in dataset().splits.items()}
    write_dataset(tmp_path / "data", dataset_of(splits, titles))
    for at in leakcheck.leakcheck(str(tmp_path / "data")).values():
        assert any(told.startswith(said) for told in leakcheck.warnings_of(at))


def test_on_independent_candidates_the_look_up_does_no_better_than_popularity(tmp_path):
    rng = np.random.default_rng(0)
    titles = {i: f"title {i}" for i in range(400)}
    drawn = [rng.choice(400, 4, replace=False).tolist() for _ in range(1200)]
    rows = [window(row[:3], row[3]) for row in drawn]
    splits = {
        name: candidates.independent(part, titles, 0, name)
        for name, part in (("train", rows[:800]), ("val", rows[800:1000]), ("test", rows[1000:]))
    }
    write_dataset(tmp_path / "data", dataset_of(splits, titles))
    for at in leakcheck.leakcheck(str(tmp_path / "data")).values():
        assert at["lookup_hit_ratio_at_1"] < at["popularity_hit_ratio_at_1"] + 0.05
        assert at["order_hit_ratio_at_1"] < at["popularity_hit_ratio_at_1"] + 0.05
        assert at["repeat_hit_ratio_at_1"] == at["popularity_hit_ratio_at_1"]
        assert leakcheck.warnings_of(at) == []


def successor_hits(windows: list[Window]) -> float:
    """How often the next candidate after the history's last, in the order of ids, is the target."""
    chosen = [min((c for c in w.candidates if c > w.history[-1]), default=None) for w in windows]
    return np.mean([c == w.target for c, w in zip(chosen, windows, strict=True)])


def test_sequences_of_one_order_are_told_however_candidates_are_drawn(tmp_path):
    """As LastFM's, which were sorted by artist."""
    rng = np.random.default_rng(2)
    starts, steps = rng.integers(0, 380, 3000), rng.integers(1, 5, (3000, 4))
    found = [np.cumsum([a, *more]).tolist() for a, more in zip(starts, steps, strict=True)]
    rows = [window(row[:4], row[4]) for row in found]
    titles = {i: f"title {i}" for i in range(400)}
    splits = {
        name: candidates.independent(part, titles, 0, name)
        for name, part in (("train", rows[:2600]), ("val", rows[2600:2800]), ("test", rows[2800:]))
    }
    write_dataset(tmp_path / "data", dataset_of(splits, titles, "music"))
    at = leakcheck.leakcheck(str(tmp_path / "data"))["test"]
    assert at["order_hit_ratio_at_1"] == pytest.approx(successor_hits(splits["test"]), abs=0.05)
    assert "training sequences follow one order of the items" in leakcheck.warnings_of(at)[0]


def test_an_order_that_holds_only_within_pages_is_told(tmp_path):
    """As of interactions with one time in a file that is sorted by item."""
    rng = np.random.default_rng(3)
    splits = {"train": [], "val": [], "test": []}
    for user in range(400):
        pages = np.sort(rng.choice(300, (3, 8), replace=False), 1)
        split = "train" if user < 300 else "val" if user < 330 else "test"
        items = pages.ravel().tolist()
        splits[split] += [window(items[t - 4 : t], items[t]) for t in range(4, 24)]
    titles = {i: f"title {i}" for i in rng.permutation(300).tolist()}
    drawn = {name: candidates.independent(rows, titles, 0, name) for name, rows in splits.items()}
    write_dataset(tmp_path / "data", dataset_of(drawn, titles))
    at = leakcheck.leakcheck(str(tmp_path / "data"))["test"]
    assert at["order_hit_ratio_at_1"] == pytest.approx(successor_hits(drawn["test"]), abs=0.05)
    assert "training sequences follow one order of the items" in leakcheck.warnings_of(at)[0]


def test_numbers_in_titles_sort_as_numbers_of_any_length():
    titles = ["Film 9", "Film 10", "Film 010b", "Film 11", f"Film 1{'0' * 5000}", "Film X"]
    assert sorted(titles[::-1], key=leakcheck._natural) == titles


def test_a_target_whose_title_the_history_has_is_told(tmp_path):
    """As of one product under several ids: no other candidate has a title of the history."""
    rng = np.random.default_rng(4)
    titles = {i: f"title {i % 100}" for i in range(200)}
    rows = []
    for n in range(900):
        *history, target = rng.choice(100, 5, replace=False).tolist()
        rows.append(window(history, history[1] + 100 if n % 3 == 0 else target))
    splits = {
        name: candidates.independent(part, titles, 0, name)
        for name, part in (("train", rows[:300]), ("val", rows[300:600]), ("test", rows[600:]))
    }
    write_dataset(tmp_path / "data", dataset_of(splits, titles))
    at = leakcheck.leakcheck(str(tmp_path / "data"))["test"]
    assert 1 / 3 <= at["repeat_hit_ratio_at_1"] < 0.45
    assert "the candidate with the same title as an item" in leakcheck.warnings_of(at)[-1]


def test_the_look_up_counts_common_candidates_and_then_popularity():
    rows = [((1, 2, 3), 1), ((4, 5, 6), 1), ((1, 2, 4), 2), ((2, 3, 1), 2), ((3, 8, 9), 3)]
    shown = np.array([c for c, _ in rows])
    train = trainer.Arrays(np.zeros((5, 1), np.int32), shown, np.array([t for _, t in rows]))
    lookup = leakcheck.Lookup(train, trivial.popularity(train.target_B, 10))
    # Item 1 was shown with 2 and 3 (three in common), item 2 too, once more often; 7 never.
    scores = lookup.scores(np.array([1, 2, 3, 7]))
    assert np.floor(scores).tolist() == [3, 3, 1, 0] and scores[0] == scores[1] > scores[2]
