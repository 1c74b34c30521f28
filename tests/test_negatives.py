"""Rejected titles are pure functions of (seed, draw, row), and what each kind of them is."""

import collections
import dataclasses

import numpy as np
import pytest
from tiny import history_dataset

from sdpo_jax.data.negatives import NEGATIVES, Negatives
from sdpo_jax.data.prepared import Dataset
from sdpo_jax.data.prompts import HISTORY_TEMPLATES, templates_of
from sdpo_jax.data.segments import units
from sdpo_jax.data.sequences import leave_one_out
from sdpo_jax.data.tokens import Encoder
from sdpo_jax.models.tokenizer import load_tokenizer
from sdpo_jax.system.errors import InputError
from sdpo_jax.training.order import Key, encode, redrawn, select_in_band

ANY = [kind for kind in NEGATIVES if kind != "shown"]
COUNT = 7


def with_twins(data: Dataset) -> Dataset:
    """Each item has another one with its title."""
    twins = {item + 100: title for item, title in data.titles.items()}
    titles = data.titles | twins
    return dataclasses.replace(data, titles=titles, attributes={item: {} for item in titles})


DATA = with_twins(history_dataset())
ROWS = range(len(DATA.splits["train"]))


def draw_all(kind: str, *, data=DATA, seed=0, count=COUNT, draw=0, power=1.0) -> list[list[int]]:
    made = Negatives(data, kind, seed, power)
    return [made.draw("train", row, count, draw) for row in ROWS]


@pytest.mark.parametrize("kind", NEGATIVES)
def test_negatives_are_a_function_of_seed_draw_and_row(kind):
    found = draw_all(kind)
    assert found == draw_all(kind)
    made = Negatives(DATA, kind, 0)
    assert [made.draw("train", row, COUNT) for row in reversed(ROWS)] == found[::-1]
    for other in (draw_all(kind, seed=1), draw_all(kind, draw=1), draw_all(kind, draw=2)):
        assert sum(a != b for a, b in zip(found, other, strict=True)) > 0.9 * len(found)
    assert draw_all(kind, draw=1) != draw_all(kind, draw=2)


@pytest.mark.parametrize("kind", NEGATIVES)
def test_negatives_are_distinct_titles_beside_the_target(kind):
    for window, items in zip(DATA.splits["train"], draw_all(kind), strict=True):
        titles = {DATA.titles[item] for item in (window.target, *items)}
        assert len(titles) == 1 + COUNT


@pytest.mark.parametrize("kind", ANY)
def test_no_title_of_the_users_own_is_drawn_whatever_its_item(kind):
    drawn = set()
    for window, items in zip(DATA.splits["train"], draw_all(kind), strict=True):
        own = {DATA.titles[item] for item in DATA.sequences[window.user].items}
        assert not own & {DATA.titles[item] for item in items}
        drawn.update(items)
    # Twins are drawn too, but never were a target.
    assert any(item >= 100 for item in drawn) == (kind != "popularity")


@pytest.mark.parametrize(("split", "later"), [("train", 2), ("val", 1)])
@pytest.mark.parametrize("kind", ["uniform", "hard", "disliked"])
def test_titles_of_a_users_later_splits_are_drawn_like_any_other(kind, split, later):
    """A title that is never drawn for a user would tell that it is a target of the test."""
    splits = leave_one_out(DATA.sequences.values(), 10, 1)
    made = Negatives(dataclasses.replace(DATA, splits=splits), kind, 0)
    drawn = collections.defaultdict(set)
    for row, window in enumerate(splits[split]):
        for draw in range(40):
            items = made.draw(split, row, COUNT, draw)
            drawn[window.user].update(DATA.titles[item] for item in items)
    for user, titles in drawn.items():
        own = [DATA.titles[item] for item in DATA.sequences[user].items]
        assert titles >= set(own[-later:]) and not titles & set(own[:-later])


def test_shown_negatives_are_those_that_the_window_shows():
    for window, items in zip(DATA.splits["train"], draw_all("shown"), strict=True):
        assert set(items) <= set(window.candidates) - {window.target}
    for window, items in zip(DATA.splits["train"], draw_all("shown", count=19), strict=True):
        assert {*items, window.target} == set(window.candidates)


def test_uniform_draws_every_item_about_as_often():
    draws = [draw for n in range(24) for draw in draw_all("uniform", draw=n)]
    counts = collections.Counter(item for items in draws for item in items)
    users = [DATA.sequences[window.user] for window in DATA.splits["train"]]
    owned = collections.Counter(item for user in users for item in user.items)
    shares = np.array([counts[item] / (len(users) - owned[item % 100]) for item in DATA.titles])
    assert np.ptp(shares) < 0.6 * shares.mean()


def test_popularity_favours_frequent_targets_and_the_more_the_higher_the_power():
    counts = collections.Counter(window.target for window in DATA.splits["train"])

    def mean(power: float) -> float:
        items = [item for of in draw_all("popularity", power=power) for item in of]
        return float(np.mean([counts[item] for item in items]))

    assert mean(0.0) < mean(1.0) < mean(4.0)
    assert mean(0.0) == pytest.approx(np.mean([counts[i] for i in DATA.titles]), rel=0.15)
    assert mean(4000.0) > mean(4.0) - 0.5  # no power overflows
    # What was never a target comes only where the others do not suffice.
    assert min(counts[item] for of in draw_all("popularity", count=3) for item in of) > 0


@pytest.mark.parametrize("until", [0, 5, 11])
def test_disliked_come_first_up_to_a_place_and_are_filled_up(until):
    made, found = Negatives(DATA, "disliked", 0), 0
    for row, window in enumerate(DATA.splits["train"]):
        pairs = DATA.sequences[window.user].disliked
        near = {item for place, item in pairs if place <= max(until, window.place)}
        items = made.draw("train", row, COUNT, until=until)
        assert set(items[: len(near)]) == near
        assert not {item for _, item in pairs} - near & set(items[: len(near)])
        assert len(items) == COUNT
        assert set(made.draw("train", row, 1, until=until)) <= (near or set(DATA.titles))
        found += len(near)
    assert found > len(ROWS)


@pytest.mark.parametrize("kind", ANY)
def test_all_titles_but_the_users_can_be_drawn_and_one_more_is_refused(kind):
    made = Negatives(DATA, kind, 0)
    own = len(DATA.sequences[DATA.splits["train"][0].user].items)
    assert len(made.draw("train", 0, 48 - own)) == 48 - own
    key = "hard_pool" if kind == "hard" else "num_negatives"
    with pytest.raises(InputError, match=rf"config.{key}: found {48 - own} titles .*lower it"):
        made.draw("train", 0, 48 - own + 1)


LOGP = -np.array([[0.5, 3.0, 1.0, 2.0, 9.0, 8.0, 7.0, 6.0, 5.0, 4.0, 10.0]])  # ten and the target
BY_LOGP = [2, 3, 1, 9, 8, 7, 6, 5, 4, 10]


@pytest.mark.parametrize(
    ("count", "band", "places"),
    [
        (3, (0.0, 0.3), [0, 1, 2]),
        (3, (0.2, 0.7), [2, 4, 6]),  # evenly spaced
        (2, (0.2, 0.7), [2, 6]),
        (1, (0.2, 0.7), [2]),
        (4, (0.2, 0.3), [2, 3, 4, 5]),  # a band with too few goes on behind it
        (3, (0.9, 1.0), [7, 8, 9]),  # or before it
        (10, (0.5, 0.6), range(10)),
    ],
)
def test_hard_negatives_are_those_of_a_band_of_the_log_probs(count, band, places):
    found = select_in_band(LOGP, count, band)
    assert found.tolist() == [[0, *(BY_LOGP[place] for place in places)]]


def test_each_target_has_its_own_band():
    logp_MC = np.random.default_rng(0).normal(size=(5, 33))
    found = select_in_band(logp_MC, 4, (0.05, 0.3))
    for logp_C, chosen in zip(logp_MC, found, strict=True):
        assert chosen[0] == 0 and len(set(chosen.tolist())) == 5
        above = [(logp_C[1:] > logp_C[c]).sum() for c in chosen[1:]]
        assert above == sorted(above) and above[0] == 1 and above[-1] == 9


@pytest.fixture(scope="module", params=["candidates", "history"])
def encoder(request, model_folder):
    templates = templates_of("movie", prompt=request.param)
    return Encoder(DATA, load_tokenizer(model_folder), templates, 0, 512, prompt=request.param)


def titles_of(encoder: Encoder, answers) -> list[str]:
    return [encoder.tokenizer.decode(answer[:-1]) for answer in answers]


def test_an_example_has_each_target_and_its_negatives_as_answers(encoder):
    made, of = Negatives(DATA, "uniform", 0), units(encoder, "train", 4)
    keys = [Key(unit, draw=draw) for unit in (0, 3, 1) for draw in (1, 0)]
    found = encode(encoder, "train", of, keys, made, 3)
    assert set(found) == set(keys)
    for key, example in found.items():
        assert len(of[key.unit]) == example.M
        for row, answers in zip(of[key.unit], example.answers_MC, strict=True):
            items = [encoder.window("train", row).target, *made.draw("train", row, 3, key.draw)]
            assert titles_of(encoder, answers) == [DATA.titles[item] for item in items]


def test_a_segment_may_show_what_was_disliked_up_to_its_last_target(model_folder):
    templates = HISTORY_TEMPLATES["movie"]
    encoder = Encoder(DATA, load_tokenizer(model_folder), templates, 0, 512, prompt="history")
    made, of = Negatives(DATA, "disliked", 0), units(encoder, "train", 60)
    for key, example in encode(encoder, "train", of, [Key(0), Key(1)], made, 3).items():
        last = encoder.window("train", of[key.unit][-1])
        pairs = DATA.sequences[last.user].disliked
        near = {DATA.titles[item] for place, item in pairs if place <= last.place}
        for answers in example.answers_MC:
            assert near <= set(titles_of(encoder, answers))


def test_without_negatives_each_target_is_alone(encoder):
    of = units(encoder, "train", 4)
    (example,) = encode(encoder, "train", of, [Key(2)], Negatives(DATA, "hard", 0), 0).values()
    assert example.C == 1 and (example.packed == 0) == example.continued


def test_each_epoch_has_a_draw_of_its_own():
    order = [Key(unit) for unit in (2, 0, 1, 1, 2, 0, 0)]
    assert redrawn(order, 3) == [
        Key(2),
        Key(0),
        Key(1),
        Key(1, draw=1),
        Key(2, draw=1),
        Key(0, draw=1),
        Key(0, draw=2),
    ]
