"""Recommendations from a run: in Python, in the shell, and for a file of people."""

import json
import subprocess
import sys

import pytest
import tiny_run
from tiny_run import TITLES
from trainers import ROOT, environment

from sdpo_jax.data.prepared import read_dataset
from sdpo_jax.data.prompts import template_index
from sdpo_jax.evaluate import evaluate
from sdpo_jax.recommend import filters, shares, show, titles_of
from sdpo_jax.serving import scoring
from sdpo_jax.serving.recommender import Recommender
from sdpo_jax.serving.titles import TitleIndex
from sdpo_jax.system.errors import InputError


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return tiny_run.history_run(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def recommender(run):
    return Recommender.from_workdir(run, "sft")


@pytest.mark.parametrize("method", ["beam", "score"])
def test_a_window_gets_the_items_that_the_evaluation_lists(run, recommender, method):
    evaluate(run, ["sft"], "test", [method], rank="catalogue")
    lines = (run / "eval" / f"sft-2-{method}-catalogue.jsonl").read_text().splitlines()
    data, settings = read_dataset(run.parent / "data"), recommender.settings
    windows = data.splits["test"]
    shown = [data.sequences[w.user].items[: w.place][-settings.history :] for w in windows]
    count = len(settings.templates)
    templates = [template_index(settings.seed, "test", row, count) for row in range(len(windows))]
    found = recommender.ranked(shown, 10, exclude_seen=False, method=method, templates=templates)
    for line, window, listed in zip(map(json.loads, lines), windows, found, strict=True):
        among = [one for one in listed if one.item not in window.history]
        assert [one.item for one in among] == line["top"]
        # Rounded as in the file; the log-probs are equal bit for bit, as batches and shapes are.
        assert [[one.title, round(one.score, 4)] for one in among] == line["ranked"]


def test_several_people_get_what_each_gets_alone(recommender):
    people = [["heat", "alien"], [3, 4, 5], ["up"], ["jaws", "big", "speed"]] * 5
    together = recommender.recommend(people, k=4)
    for one, found in zip(people[:4], together, strict=False):
        alone = recommender.recommend(one, k=4)
        assert [title for title, _ in alone] == [title for title, _ in found]
        assert [s for _, s in alone] == pytest.approx([s for _, s in found], abs=1e-4)


def test_filters_leave_k_items_and_the_history_comes_only_if_asked_for(recommender):
    found = recommender.recommend(["heat", "alien"], k=3, items=[7, 8, 9, 0])
    assert {title for title, _ in found} == {TITLES[i] for i in (7, 8, 9)}
    seen = recommender.recommend(["heat", "alien"], k=10, exclude_seen=False)
    assert {title for title, _ in seen} == set(TITLES)
    scores = [score for _, score in seen]
    assert scores == sorted(scores, reverse=True)
    even = recommender.recommend(["heat"], k=10, items=lambda item: item["id"] % 2 == 0)
    assert {title for title, _ in even} == {TITLES[i] for i in (2, 4, 6, 8)}


def test_rank_and_score_give_log_probs_of_any_titles(recommender):
    found = recommender.rank(["heat", "alien"], ["up", "big", "fargo"])
    listed = dict(recommender.recommend(["heat", "alien"], k=10, method="score"))
    assert {title for title, _ in found} == {"up", "big", "fargo"}
    for title, value in found:
        assert value == pytest.approx(listed[title], abs=1e-4)
    first, second = recommender.score("heat\nalien\n", ["up", "up big"])
    assert first < 0 and second < 0 and first != second
    assert recommender.score("heat\nalien\n", ["up"]) == [pytest.approx(first, abs=1e-5)]


def test_unknown_titles_are_answered_with_the_nearest_ones(recommender):
    with pytest.raises(InputError, match=r"found 'alein', expected a title .*did you mean 'alien'"):
        recommender.recommend(["alein"])
    exact = recommender.recommend(["alien"], k=2)
    assert recommender.recommend(["alein"], k=2, fuzzy=True) == exact
    assert recommender.recommend(["ALIEN"], k=2) == exact
    assert recommender.index.search("alien", 5) == [1, 2]
    for history, words in (
        ("heat", "expected a list"),
        ([], "expected one or more"),
        ([[]], "expected one or more"),
        ([99], "found id 99"),
        ([True], "expected a title or an integer"),
        ([["heat"], []], "expected one or more"),
    ):
        with pytest.raises(InputError, match=words):
            recommender.recommend(history)
    with pytest.raises(InputError, match="where: found 'genre', expected an attribute"):
        recommender.recommend(["heat"], where={"genre": "x"})
    with pytest.raises(InputError, match="items: found 77"):
        recommender.recommend(["heat"], items=[77])
    with pytest.raises(InputError, match="k: found 0"):
        recommender.recommend(["heat"], k=0)


def test_few_shapes_are_compiled_however_long_the_histories_are(recommender):
    before = recommender._prefill._cache_size()
    for count in range(1, 8):
        recommender.recommend(list(range(count)), k=2)
    assert recommender._prefill._cache_size() <= before + 2  # of one person, two lengths


def test_a_model_whose_prompts_show_candidates_ranks_them_and_recommends_nothing(tmp_path):
    other = Recommender.from_workdir(tiny_run.make_run(tmp_path, "candidates"), "base")
    found = other.rank(["heat", "alien"], ["up", "big"])
    assert {title for title, _ in found} == {"up", "big"} and found[0][1] >= found[1][1]
    with pytest.raises(InputError, match="use rank with candidates"):
        other.recommend(["heat"])


def test_a_file_that_was_stopped_is_finished_with_the_same_bytes(
    recommender, tmp_path, monkeypatch
):
    monkeypatch.setattr(scoring, "CHUNK", 4)
    lines = [{"user": f"ü{n}", "history": [n % 10, (n + 3) % 10]} for n in range(11)]
    source = tmp_path / "people.jsonl"
    source.write_text("".join(json.dumps(line) + "\n" for line in lines))
    options = {"k": 2, "fuzzy": False}
    whole, stopped = tmp_path / "whole.jsonl", tmp_path / "stopped.jsonl"
    assert scoring.score_file(recommender, source, whole, **options) == 11
    first = json.loads(whole.read_text().splitlines()[0])
    assert first["user"] == "ü0" and len(first["items"]) == 2 and "history" not in first
    partial = tmp_path / "stopped.jsonl.partial"

    def stop(*arguments) -> None:
        partial.write_bytes(whole.read_bytes()[:-300])  # in the middle of a line
        raise KeyboardInterrupt

    with monkeypatch.context() as context, pytest.raises(KeyboardInterrupt):
        context.setattr(scoring, "_score_rest", stop)
        scoring.score_file(recommender, source, stopped, **options)
    with pytest.raises(InputError, match=r"found a call with another options, expected the same"):
        scoring.score_file(recommender, source, stopped, k=3, fuzzy=False)
    scoring.score_file(recommender, source, stopped, **options)
    assert stopped.read_bytes() == whole.read_bytes() and not partial.exists()
    with pytest.raises(InputError, match=r"--output=.*whole\.jsonl/x\.jsonl: .*: give another"):
        scoring.score_file(recommender, source, whole / "x.jsonl", **options)
    stray = tmp_path / "stray.jsonl"
    stray.with_name("stray.jsonl.partial").write_text("x")
    with pytest.raises(InputError, match="expected both: remove it"):
        scoring.score_file(recommender, source, stray, **options)
    with pytest.raises(InputError, match=r"--output: found .*whole\.jsonl, expected a new file"):
        scoring.score_file(recommender, source, whole, **options)
    source.write_text('{"history": ["heat"]}\n{"history": ["hat"]}\n')
    with pytest.raises(InputError, match=r"people\.jsonl:2: .*'hat'.*did you mean 'heat'"):
        scoring.score_file(recommender, source, tmp_path / "new.jsonl", **options)


def test_the_command_prints_a_table_or_json_and_refuses_in_one_line(run):
    def sdpo(*arguments: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            [
                sys.executable,
                "-m",
                "sdpo_jax",
                "recommend",
                f"--workdir={run}",
                "--stage=sft",
                *arguments,
            ],
            cwd=ROOT,
            env=environment(),
            capture_output=True,
            text=True,
            check=False,
        )

    found = json.loads(sdpo("--history=heat; 1", "--k=3", "--json").stdout)["items"]
    assert len(found) == 3 and set(found[0]) == {"id", "title", "score"}
    wrong = sdpo("--history=haet")
    assert wrong.returncode == 2 and wrong.stdout == ""
    assert "expected one or more titles" in sdpo("--history=;").stderr
    assert wrong.stderr.count("\n") == 1 and "did you mean 'heat'" in wrong.stderr
    text = show([("up", -1.0), ("big", -1.0)])
    assert "| up" in text and "50%" in text
    assert sum(shares([-700.0, -701.0])) == pytest.approx(1)
    assert titles_of("Heat; 12 ;") == ["Heat", 12]
    assert filters(["genres=Comedy"]) == {"genres": "Comedy"}


def test_items_of_one_title_are_told_apart_by_year_or_id():
    titles = {1: "Cape Fear", 2: "Heat", 3: "Cape Fear", 4: "Cape Fear"}
    index = TitleIndex(titles, {1: {"year": 1962}, 3: {"year": 1991}})
    assert index.told_apart([3, 2, 4]) == ["Cape Fear (1991)", "Heat", "Cape Fear (id 4)"]
    assert index.told_apart([1, 2]) == ["Cape Fear", "Heat"]
