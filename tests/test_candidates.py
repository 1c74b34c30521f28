"""Candidates: what they may hold, what they may depend on, and the authors' lists byte for byte."""

import collections
import hashlib
import json
from pathlib import Path

import pytest

from sdpo_jax.data import candidates
from sdpo_jax.data.prepared import Window
from sdpo_jax.data.readers.lastfm import read_lastfm
from sdpo_jax.system.errors import InputError

LASTFM = Path(__file__).parents[1].parent / "shared" / "data" / "lastfm"
RELEASED_BLOBS = {
    "train": "347a5eabe2c3cd8aaa53f9ad26edc7cc8dadafcf",
    "val": "8e2fde89707007ee666b8a14b8d0d7bd338513f1",
    "test": "2aedc73e8616f25924cd9d012e944f3dd548a900",
}
# Every title twice: ids 2n and 2n + 1 share one.
TITLES = {item: f"title {item // 2}" for item in range(100)}


def windows(targets, history=(0, 2, 4)):
    return [Window(7, len(history), history, (), target) for target in targets]


def test_titles_of_candidates_differ_from_each_other_and_from_the_history():
    for window in candidates.independent(windows([20] * 300), TITLES, 0, "train"):
        shown = [TITLES[item] for item in window.candidates]
        assert len(window.candidates) == len(set(shown)) == 20
        assert window.target in window.candidates
        assert not {TITLES[item] for item in window.history} & set(shown)


def test_swapping_the_target_only_swaps_what_it_excludes():
    titles = {item: str(item) for item in range(100)}
    swapped = zip(
        candidates.independent(windows([20] * 300), titles, 0, "train"),
        candidates.independent(windows([31] * 300), titles, 0, "train"),
        strict=True,
    )
    for one, other in swapped:
        assert one.candidates.index(20) == other.candidates.index(31)
        first = [item for item in one.candidates if item not in (20, 31)]
        second = [item for item in other.candidates if item not in (20, 31)]
        common = min(len(first), len(second))
        assert common >= 18 and first[:common] == second[:common]


def test_target_and_negatives_are_uniform():
    titles = {item: str(item) for item in range(43)}
    drawn = candidates.independent(windows([20] * 4000), titles, 0, "train")
    places = collections.Counter(window.candidates.index(20) for window in drawn)
    shown = collections.Counter(item for window in drawn for item in window.candidates)
    assert len(places) == 20 and max(places.values()) < 270  # 200 +- 14
    others = [count for item, count in shown.items() if item != 20]
    assert len(others) == 39 and min(others) > 1800 and max(others) < 2100  # 1949 +- 32


def test_a_draw_is_a_pure_function_of_seed_split_and_row():
    one = candidates.independent(windows([20] * 5), TITLES, 0, "train")
    assert one == candidates.independent(windows([20] * 5), TITLES, 0, "train")
    assert one[:2] == candidates.independent(windows([20] * 2), TITLES, 0, "train")
    assert one[0] != one[1]
    assert one != candidates.independent(windows([20] * 5), TITLES, 1, "train")
    assert one != candidates.independent(windows([20] * 5), TITLES, 0, "test")


def test_too_few_items_is_an_error():
    titles = {item: str(item) for item in range(22)}
    with pytest.raises(InputError, match="found 18 titles"):
        candidates.independent(windows([20]), titles, 0, "train")


@pytest.mark.skipif(not LASTFM.is_dir(), reason=f"needs the LastFM files in {LASTFM}")
def test_released_rule_gives_the_authors_files_byte_for_byte():
    sessions = read_lastfm(LASTFM)
    names = sessions.titles
    for split, expected in RELEASED_BLOBS.items():
        rows = [
            {
                "historyList": "::".join(names[item] for item in window.history),
                "itemList": [names[item] for item in window.candidates],
                "trueSelection": names[window.target],
            }
            for window in candidates.released(sessions.windows[split], list(names))
        ]
        data = json.dumps(rows, indent=4).encode()
        assert hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest() == expected
