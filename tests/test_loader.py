"""Order, negatives and padding are pure functions of the seed."""

import numpy as np
import pytest
from conftest import random_examples, random_segments
from tiny import tiny_dataset

from sdpo_jax.data import loader
from sdpo_jax.data.prompts import TEMPLATES
from sdpo_jax.data.rows import evenly_spaced
from sdpo_jax.data.tokens import Encoder
from sdpo_jax.models.tokenizer import load_tokenizer
from sdpo_jax.system.errors import InputError


@pytest.fixture(scope="module")
def encoder(model_folder):
    data = tiny_dataset()
    return Encoder(data, load_tokenizer(model_folder), TEMPLATES["movie"], 0, 512)


def test_every_epoch_is_a_fresh_permutation():
    order = loader.stream(10, seed=0, epochs=2)
    first, second = ([int(order[i]) for i in range(k, k + 10)] for k in (0, 10))
    assert sorted(first) == sorted(second) == list(range(10))
    assert first != second
    assert first == [int(loader.stream(10, 0, 2)[i]) for i in range(10)]
    assert first != [int(loader.stream(10, 1, 2)[i]) for i in range(10)]


def test_grouped_batches_hold_every_row_once_and_less_padding():
    rng = np.random.default_rng(0)
    lengths = {row: int(rng.integers(100, 300)) for row in range(320)}
    order = [int(r) for r in rng.permutation(320)]
    cut = loader.grouped_batches(order, lengths, 8, seed=0, alike=True)
    assert sorted(row for rows in cut for row in rows) == list(range(320))
    assert cut == loader.grouped_batches(order, lengths, 8, seed=0, alike=True)
    real = sum(lengths.values())
    padded = sum(8 * max(lengths[r] for r in rows) for rows in cut)
    plain = sum(8 * max(lengths[r] for r in order[i : i + 8]) for i in range(0, 320, 8))
    assert real / padded > 0.95 > real / plain


def test_batches_of_unlike_lengths_have_nearly_equal_sums():
    rng = np.random.default_rng(0)
    lengths = {row: int(rng.integers(20, 500)) for row in range(320)}
    order = [int(r) for r in rng.permutation(320)]
    cut = loader.grouped_batches(order, lengths, 8, seed=0, alike=False)
    assert sorted(row for rows in cut for row in rows) == list(range(320))
    assert cut == loader.grouped_batches(order, lengths, 8, seed=0, alike=False)
    sums = [sum(lengths[r] for r in rows) for rows in cut]
    plain = [sum(lengths[r] for r in order[i : i + 8]) for i in range(0, 320, 8)]
    assert np.ptp(sums) < 0.2 * np.ptp(plain)


def test_dealt_sizes_have_nearly_equal_sums():
    rng = np.random.default_rng(0)
    sizes = [int(n) for n in rng.integers(100, 300, 128)]
    order = loader.balance(sizes, 32)
    assert sorted(order) == list(range(128))
    sums = np.reshape([sizes[i] for i in order], (32, 4)).sum(-1)
    plain = np.reshape(sizes, (32, 4)).sum(-1)
    assert np.ptp(sums) < 0.1 * np.ptp(plain)


@pytest.mark.parametrize("make", [random_examples, random_segments])
def test_a_stage_has_at_most_four_shapes_and_every_example_fits(make):
    rng = np.random.default_rng(0)
    batches = [make(rng, 4, 3, 40) for _ in range(30)]
    shapes = loader.choose_shapes(batches, rows=2)
    assert len(set(shapes)) == 4
    assert len(set(loader.choose_shapes(batches, rows=2, limit=1))) == 1
    for examples, shape in zip(batches, shapes, strict=True):
        batch = loader.collate(examples, shape, rows=2)
        tokens = sum(e.tokens for e in examples[:2]), sum(e.tokens for e in examples[2:])
        assert tuple((batch["slot_WT"] >= 0).sum(-1)) == tokens
        for b, example in enumerate(examples):
            np.testing.assert_array_equal(
                batch["prompt_BP"][b][batch["prompt_mask_BP"][b]], example.prompt
            )
            assert (batch["packed_BS"][b] >= 0).sum() == example.packed
            assert (batch["head_BQ"][b] >= 0).sum() == example.heads
            assert (batch["place_BM"][b] >= 0).sum() == example.M


def test_batches_go_on_from_any_step():
    rng = np.random.default_rng(0)
    examples = [random_examples(rng, 2, 2) for _ in range(6)]
    whole = list(loader.batches(examples))
    rest = list(loader.batches(examples, start=4))
    assert len(whole) == 6
    assert len(rest) == 2
    for a, b in zip(whole[4:], rest, strict=True):
        for key in a:
            np.testing.assert_array_equal(a[key], b[key])


def test_every_token_of_an_answer_is_predicted_by_the_one_before_it():
    """At the places that `predictor_BMCA` names lie the tokens that come before the answer's."""
    for make in (random_examples, random_segments):
        examples = make(np.random.default_rng(1), 5, 3)
        batch = loader.collate(examples, loader.choose_shapes([examples])[0])
        Q, answers = batch["head_BQ"].shape[1], batch["answers_BMCA"].reshape(5, -1)
        for b, example in enumerate(examples):
            head, packed = batch["prompt_BP"][b][batch["head_BQ"][b]], batch["packed_BS"][b]
            fed = np.concatenate([head, answers[b][packed]])
            for m, (place, of) in enumerate(zip(example.places, example.answers_MC, strict=True)):
                for c, answer in enumerate(of):
                    predictor = batch["predictor_BMCA"][b, m, c, : len(answer)]
                    np.testing.assert_array_equal(
                        fed[predictor], [example.prompt[place], *answer[:-1]]
                    )
                    in_prompt = (np.arange(len(answer)) == 0) | (example.continued and c == 0)
                    np.testing.assert_array_equal(predictor < Q, in_prompt)


def test_the_prompt_shows_history_and_candidates_and_the_answer_ends_in_eos(encoder):
    text, titles = encoder.prompt_text("train", 3), encoder.dataset.titles
    window = encoder.window("train", 3)
    for item in (*window.history, *window.candidates):
        assert f"\n{titles[item]}\n" in text
    example = encoder.examples("train", [3], [[window.target]])[0]
    assert example.answers_MC[0][0][-1] == encoder.tokenizer.eos_token_id
    decode = encoder.tokenizer.decode
    assert decode(example.answers_MC[0][0][:-1]) == titles[window.target]


def test_a_long_prompt_keeps_its_end_and_is_counted(encoder, model_folder):
    short = Encoder(encoder.dataset, encoder.tokenizer, encoder.templates, 0, max_length=60)
    window = short.window("train", 0)
    example = short.examples("train", [0], [window.candidates])[0]
    whole = encoder.examples("train", [0], [window.candidates])[0]
    longest = max(map(len, example.answers_MC[0]))
    assert len(example.prompt) == 60 - longest
    np.testing.assert_array_equal(example.prompt, whole.prompt[-len(example.prompt) :])
    assert short.truncated == 1


def test_no_room_for_a_prompt_is_an_error(encoder):
    short = Encoder(encoder.dataset, encoder.tokenizer, encoder.templates, 0, max_length=3)
    with pytest.raises(InputError, match="max_length"):
        short.examples("train", [0], [encoder.window("train", 0).candidates])


def test_rows_spread_over_a_split_include_both_ends():
    assert evenly_spaced(100, 5) == [0, 25, 50, 74, 99]
    assert evenly_spaced(3, 5) == evenly_spaced(3) == [0, 1, 2]


@pytest.mark.parametrize(
    ("steps", "platform", "count"),
    [(1, "cpu", 1), (16, "cpu", 2), (1000, "cpu", 4), (186, "gpu", 1), (560, "tpu", 2)],
)
def test_a_shape_must_repay_its_compilation(steps, platform, count):
    assert loader.most_shapes(steps, platform) == count
