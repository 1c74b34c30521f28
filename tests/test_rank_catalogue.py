"""`evaluate --rank=catalogue` on a tiny run: files, keys, and agreement of both decoders."""

import dataclasses
import json

import numpy as np
import pytest
import tiny_run
from tiny import history_dataset

from sdpo_jax.baselines.__main__ import run as run_baseline
from sdpo_jax.data.prepared import Dataset, read_dataset
from sdpo_jax.evaluate import evaluate
from sdpo_jax.evaluation.evaluator import Evaluator
from sdpo_jax.evaluation.ranked_items import RankedItems
from sdpo_jax.report import report
from sdpo_jax.runs.workdir import read_run
from sdpo_jax.system.errors import InputError

KEYS = {
    *(f"hit_ratio_at_{k}" for k in (1, 5, 10, 20)),
    *(f"ndcg_at_{k}" for k in (5, 10, 20)),
    "mrr",
    "n",
    "coverage_at_10",
    "gini_at_10",
    "mean_popularity_at_10",
}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of histories with one adapter, evaluated with both decoders."""
    run = tiny_run.history_run(tmp_path_factory.mktemp("tiny"))
    evaluate(run, ["base", "sft"], decoders=["score", "beam"], rank="catalogue", beams=10)
    return run


def result(run, name):
    path = run / "eval" / f"{name}.json"
    lines = path.with_suffix(".jsonl").read_text().splitlines()
    return json.loads(path.read_text()), [json.loads(line) for line in lines]


@pytest.mark.parametrize("decoder", ["score", "beam"])
def test_the_file_has_the_name_and_the_keys_that_checks_read(run, decoder):
    summary, predictions = result(run, f"sft-2-{decoder}-catalogue")
    assert set(summary) >= KEYS
    assert (summary["rank"], summary["decoder"], summary["n"]) == ("catalogue", decoder, 11)
    assert len(predictions) == 11
    assert summary["hit_ratio_at_20"] == 1  # ten items, none of which can be missed
    assert 0 < summary["coverage_at_10"] <= 1


def test_a_beam_as_wide_as_the_catalogue_ranks_as_the_exact_pass_does(run):
    for stage in ("base-0", "sft-2"):
        _, exact = result(run, f"{stage}-score-catalogue")
        _, beam = result(run, f"{stage}-beam-catalogue")
        for a, b in zip(exact, beam, strict=True):
            assert a["rank"] == b["rank"] and a["top"] == b["top"]
            np.testing.assert_allclose(
                [x for _, x in a["ranked"]], [x for _, x in b["ranked"]], atol=2e-4
            )


def test_items_of_the_history_are_not_recommended(run):
    windows = read_dataset(run.parent / "data").splits["test"]
    _, predictions = result(run, "sft-2-score-catalogue")
    for prediction in predictions:
        window = windows[prediction["row"]]
        assert not set(prediction["top"]) & set(window.history)
        assert len(prediction["top"]) == 10 - len(window.history)


def with_repeats() -> Dataset:
    """Of each second test window the target is the first item of its history."""
    data, rows = tiny_run.dataset(), []
    sequences = dict(data.sequences)
    for row, window in enumerate(data.splits["test"]):
        if row % 2 == 0:
            user = sequences[window.user]
            items = list(user.items)
            items[window.place] = window.history[0]
            sequences[window.user] = dataclasses.replace(user, items=tuple(items))
            others = [item for item in window.candidates if item not in window.history][:3]
            window = sequences[window.user].window(window.place, 3, (*others, window.history[0]))
        rows.append(window)
    return dataclasses.replace(data, splits=data.splits | {"test": rows}, sequences=sequences)


def test_where_users_repeat_items_nothing_is_left_out(tmp_path):
    """If a history were left out but for its target, the target would be told."""
    data = with_repeats()
    run = tiny_run.make_run(tmp_path, "history", data)
    tiny_run.save(run, "sft", 2, tiny_run.adapters(tiny_run.model_of(run), 2), 0.5)
    evaluate(run, ["sft"], decoders=["score", "beam"], rank="catalogue", step=2, beams=10)
    run_baseline("popularity", str(tmp_path / "data"), str(run))
    for name in ("sft-2-score", "sft-2-beam", "popularity"):
        _, predictions = result(run, f"{name}-catalogue")
        assert all(len(prediction["top"]) == 10 for prediction in predictions)


def test_a_prompt_does_not_depend_on_the_length_of_its_target(run):
    """Where not all of a history fits, else a short target would leave it more titles."""
    read = read_run(run)
    read = dataclasses.replace(read, config=dataclasses.replace(read.config, max_length=80))
    evaluator = Evaluator(read, "test", rank="catalogue")
    room = 80 - max(map(len, tiny_run.TITLES)) - 1
    for row, example in enumerate(evaluator.examples):
        head = len(evaluator.encoder.head("test", row))
        window = evaluator.windows[row]
        sizes = [len(tiny_run.TITLES[item]) + 1 for item in evaluator.encoder.before(window)]
        fitting = [sum(sizes[-n:]) for n in range(1, 11) if sum(sizes[-n:]) <= room - head]
        assert len(example.prompt) == head + max(fitting)


def test_a_target_outside_a_narrow_beam_is_a_miss(run):
    evaluate(run, ["sft"], decoders=["beam"], rank="catalogue", beams=2)
    summary, predictions = result(run, "sft-2-beam-catalogue")
    missed = [p for p in predictions if p["rank"] is None]
    assert missed and summary["beams"] == 2
    assert summary["hit_ratio_at_20"] == 1 - len(missed) / len(predictions)
    evaluate(run, ["sft"], decoders=["beam"], rank="catalogue", beams=10)


def test_items_of_one_title_stand_together_and_the_target_after_the_others():
    ranked = RankedItems.__new__(RankedItems)
    ranked.dataset, ranked._repeats = tiny_run.dataset(), False
    ranked.items = np.arange(4)
    ranked.place = {item: item for item in range(4)}
    ranked.title_I = np.array([0, 1, 1, 2])
    window = ranked.dataset.splits["test"][0]
    for item, rank in ((0, 2), (1, 4), (2, 4), (3, 1)):
        of_item = window.__class__(0, 1, (), (), item)
        found = ranked.by_beam(of_item, np.array([2, 0, 1]), np.array([-1.0, -2.0, -3.0]))
        scored = ranked.by_score(of_item, np.array([-2.0, -3.0, -1.0]))
        assert found["rank"] == scored["rank"] == rank


def test_the_report_has_a_table_of_the_whole_catalogue(run):
    run_baseline("popularity", str(run.parent / "data"), str(run))
    text = report(run)
    assert "Whole catalogue" in text and "popularity" in text


def test_candidates_prompts_and_their_decoders_are_refused(run, tmp_path):
    with pytest.raises(InputError, match="--decoder: found 'greedy', expected score, beam"):
        evaluate(run, ["sft"], decoders=["greedy"], rank="catalogue")
    with pytest.raises(InputError, match="--decoder: found 'beam'"):
        evaluate(run, ["sft"], decoders=["beam"])
    candidates = tiny_run.make_run(tmp_path / "candidates")
    with pytest.raises(InputError, match="--rank: found catalogue"):
        evaluate(candidates, ["base"], decoders=["score"], rank="catalogue")


def rated_low() -> Dataset:
    """Of the users of the test windows, all rated an item low early, each second one also later."""
    data = history_dataset()
    sequences = dict(data.sequences)
    for row, window in enumerate(data.splits["test"]):
        own = sequences[window.user]
        early, late = (item for _, item in own.disliked[:2])
        disliked = ((window.place - 1, early), (window.place, late))[: 2 - row % 2]
        sequences[window.user] = dataclasses.replace(own, disliked=disliked)
    return dataclasses.replace(data, sequences=sequences)


def test_a_target_is_ranked_against_what_its_user_rated_low_later_on(tmp_path):
    data = rated_low()
    run = tiny_run.make_run(tmp_path, "history", data)
    evaluate(run, ["base"], decoders=["score"], rank="disliked")
    run_baseline("popularity", str(tmp_path / "data"), str(run))
    for name in ("base-0-score", "popularity"):
        summary, predictions = result(run, f"{name}-disliked")
        assert [p["row"] for p in predictions] == [0, 2]
        for p in predictions:
            window = data.splits["test"][p["row"]]
            _, (_, late) = data.sequences[window.user].disliked
            (first, above), (second, below) = p["ranked"]
            target = data.titles[window.target]
            assert {first, second} == {target, data.titles[late]}
            assert p["hit"] == (first == target and above > below)
        assert summary["hit_ratio_at_1"] == sum(p["hit"] for p in predictions) / 2
    text = report(run)
    assert "Liked against disliked" in text and "AUC [95%]" in text


def test_without_low_ratings_nothing_is_ranked_against_them(run):
    with pytest.raises(InputError, match="--rank: found disliked for test"):
        evaluate(run, ["base"], decoders=["score"], rank="disliked")
    run_baseline("random", str(run.parent / "data"), str(run))
    assert not (run / "eval" / "random-disliked.json").exists()
