"""Which windows of a history are one example, and what its tokens are."""

import dataclasses
import itertools

import numpy as np
import pytest
from tiny import dataset_of, history_dataset, window

from sdpo_jax.data.prepared import Dataset, UserSequence
from sdpo_jax.data.segments import units
from sdpo_jax.data.tokens import Encoder
from sdpo_jax.models.tokenizer import load_tokenizer
from sdpo_jax.system.errors import InputError

TEMPLATES = ("seen:\n[HistoryHere]\n", "a person has\n[HistoryHere]\n")
SEGMENT = 4


@pytest.fixture(scope="module")
def tokenizer(model_folder):
    return load_tokenizer(model_folder)


def make(tokenizer, data: Dataset, max_length: int = 512, prompt: str = "history", history=10):
    templates = TEMPLATES if prompt == "history" else ("[HistoryHere] of [CansHere]: ",)
    return Encoder(data, tokenizer, templates, 0, max_length, prompt=prompt, history=history)


@pytest.fixture(scope="module")
def encoder(tokenizer):
    return make(tokenizer, history_dataset())


def segment(encoder: Encoder, split: str, rows, others=()):
    items = [[encoder.window(split, row).target, *others] for row in rows]
    return encoder.segment(split, rows, items)


def text(encoder: Encoder, ids) -> str:
    return encoder.tokenizer.decode(ids, clean_up_tokenization_spaces=False)


def one_user(titles: dict[int, str]) -> Dataset:
    """One user who had all of the titles in their order; every window is for training."""
    data = dataset_of({"train": [window([0], 1, [0, 1])]}, titles)
    sequence = UserSequence(0, tuple(titles))
    rows = [sequence.window(place, 10, (0, place)) for place in range(1, len(titles))]
    return dataclasses.replace(data, splits={"train": rows}, sequences={0: sequence})


@pytest.mark.parametrize("segment", [1, SEGMENT, 60])
def test_every_window_of_a_split_is_in_one_segment_of_its_user(encoder, segment):
    found = units(encoder, "train", segment)
    windows = encoder.dataset.splits["train"]
    assert [row for rows in found for row in rows] == list(range(len(windows)))
    for rows in found:
        assert 1 <= len(rows) <= segment
        first = windows[rows[0]]
        assert [(windows[row].user, windows[row].place) for row in rows] == [
            (first.user, first.place + i) for i in range(len(rows))
        ]


def test_the_segments_of_a_user_are_as_few_and_as_equal_as_can_be(encoder):
    windows = encoder.dataset.splits["train"]
    found = units(encoder, "train", SEGMENT)
    for _, own in itertools.groupby(found, lambda rows: windows[rows[0]].user):
        sizes = [len(rows) for rows in own]
        assert len(sizes) == -(-sum(sizes) // SEGMENT)
        assert max(sizes) - min(sizes) <= 1


def test_windows_in_the_order_of_time_make_the_same_segments(tokenizer, encoder):
    """A split by time has the windows of all users among each other."""
    rows = encoder.dataset.splits["train"]
    order = np.random.default_rng(0).permutation(len(rows))
    order = sorted(order.tolist(), key=lambda row: rows[row].place)
    mixed = dataclasses.replace(encoder.dataset, splits={"train": [rows[row] for row in order]})
    found = units(make(tokenizer, mixed), "train", SEGMENT)
    again = {tuple(order[row] for row in of) for of in found}
    assert again == set(units(encoder, "train", SEGMENT))


def test_single_windows_are_segments_of_one_target(encoder):
    """Such as those of val, the last of each user."""
    count = len(encoder.dataset.splits["val"])
    assert units(encoder, "val", SEGMENT) == [(row,) for row in range(count)]


def test_a_gap_between_two_windows_of_a_user_ends_a_segment(tokenizer):
    data = one_user({i: f"{i}" for i in range(8)})
    rows = data.splits["train"]
    data = dataclasses.replace(data, splits={"train": [*rows[:2], *rows[4:]]})
    assert units(make(tokenizer, data), "train", 60) == [(0, 1), (2, 3, 4)]


def test_a_candidates_prompt_has_one_target(tokenizer, encoder):
    shown = make(tokenizer, encoder.dataset, prompt="candidates")
    count = len(encoder.dataset.splits["train"])
    assert units(shown, "train", SEGMENT) == [(row,) for row in range(count)]


@pytest.mark.parametrize("history", [2, 10])
def test_the_tokens_are_a_head_and_one_title_a_line(tokenizer, encoder, history):
    made = make(tokenizer, encoder.dataset, history=history)
    for rows in units(made, "train", SEGMENT):
        example = segment(made, "train", rows)
        first, last = made.window("train", rows[0]), made.window("train", rows[-1])
        items = made.dataset.sequences[first.user].items
        shown = items[max(0, first.place - history) : last.place + 1]
        lines = "".join(f"{made.dataset.titles[item]}\n" for item in shown)
        head = text(made, made.head("train", rows[0]))
        assert head in {"seen:\n", "a person has\n"}
        assert text(made, [*example.prompt, made.end]) == head + lines  # the last end is not fed


def test_each_place_predicts_the_first_token_of_its_title(encoder):
    for rows in units(encoder, "train", SEGMENT):
        example = segment(encoder, "train", rows, others=(0, 5))
        assert (example.M, example.C, example.continued) == (len(rows), 3, True)
        whole = [*example.prompt.tolist(), encoder.end]
        for row, place, answers in zip(rows, example.places, example.answers_MC, strict=True):
            target = encoder.answer(encoder.window("train", row).target)
            assert whole[place + 1 : place + 1 + len(target)] == target.tolist()
            np.testing.assert_array_equal(answers[0], target)
            np.testing.assert_array_equal(answers[1], encoder.answer(0))
            assert all(answer[-1] == encoder.end for answer in answers)
        assert example.places[-1] + len(example.answers_MC[-1][0]) == len(example.prompt)


def test_the_first_target_has_the_prompt_that_evaluation_gives_it(encoder):
    for rows in units(encoder, "train", SEGMENT):
        example = segment(encoder, "train", rows)
        (alone,) = encoder.examples("train", rows[:1], [[0]])
        np.testing.assert_array_equal(example.prompt[: example.places[0] + 1], alone.prompt)
        assert alone.places == (len(alone.prompt) - 1,) and not alone.continued


def test_long_titles_are_cut_into_more_segments_that_fit(tokenizer):
    rng = np.random.default_rng(0)
    data = one_user({i: "x" * int(n) for i, n in enumerate(rng.integers(1, 24, 40))})
    found = {}
    for max_length in (90, 150, 2000):
        made = make(tokenizer, data, max_length)
        found[max_length] = units(made, "train", 60)
        assert [row for rows in found[max_length] for row in rows] == list(range(39))
        examples = [segment(made, "train", rows) for rows in found[max_length]]
        assert max(len(example.prompt) for example in examples) <= max_length
        # What comes before the targets leaves them half of the room.
        assert all(example.places[0] < max_length / 2 + 20 for example in examples)
    assert len(found[90]) > len(found[150]) > len(found[2000]) == 1


@pytest.mark.parametrize("place", [3, 7])
def test_a_title_that_fits_into_no_segment_is_told(tokenizer, place):
    """Wherever it is: the last title of a user is in no other's context."""
    data = one_user({i: "x" * (60 if i == place else 2) for i in range(8)})
    with pytest.raises(InputError, match=r"max_length=80 .*61 tokens: raise --config.max_length"):
        units(make(tokenizer, data, 80), "train", 60)
