"""Traditional recommenders: what their networks may depend on, that they learn, what they write."""

import dataclasses
import json
import subprocess
import sys

import jax
import numpy as np
import optax
import pytest
import tiny_run
from flax import nnx
from tiny import dataset_of, window
from trainers import ROOT

from sdpo_jax import leakcheck
from sdpo_jax.baselines import morec, trainer, trivial
from sdpo_jax.baselines.__main__ import NETWORKS, _recipe, run
from sdpo_jax.baselines.windows import arrays
from sdpo_jax.data import candidates
from sdpo_jax.data.prepared import Dataset, Window, write_dataset
from sdpo_jax.runs.workdir import Run, open_run
from sdpo_jax.system.errors import InputError

ITEMS, PLACES = 40, 10
TITLES = {100 + i: f"title {i}" for i in range(ITEMS)}
QUICK = trainer.Settings(batch_size=64, l2=(1e-6,), epochs=5, learning_rate=1e-2)


def windows(n: int, seed: int) -> list[Window]:
    """The next item is the last one's successor, so histories tell it."""
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(n):
        start, length = rng.integers(ITEMS), rng.integers(3, PLACES + 1)
        items = [100 + int(start + k) % ITEMS for k in range(length + 1)]
        found.append(window(items[:-1], items[-1]))
    return found


def dataset() -> Dataset:
    splits = {
        name: candidates.independent(windows(n, seed), TITLES, 0, name)
        for seed, (name, n) in enumerate({"train": 512, "val": 80, "test": 80}.items())
    }
    return dataset_of(splits, TITLES)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("baselines") / "data"
    write_dataset(path, dataset())
    return str(path)


@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_learns_what_comes_next_and_keeps_what_it_learned(name, folder, tmp_path):
    first = run(name, folder, tmp_path, settings=QUICK)
    assert [(s["decoder"], s["rank"]) for s in first] == [
        ("score", "candidates"),
        ("score", "catalogue"),
    ]
    assert first[0]["hit_ratio_at_1"] > 0.5 and first[1]["hit_ratio_at_5"] > 0.5
    again = run(name, folder, tmp_path, limit=20, candidates_only=True, settings=QUICK)
    assert again[0]["n"] == 20 and again[0]["validation_by_l2"] == first[0]["validation_by_l2"]
    with pytest.raises(InputError, match="another data set or other settings"):
        run(name, folder, tmp_path, settings=trainer.Settings(seed=1))


@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_reads_histories_as_long_as_those_of_the_data(name):
    data = dataset()
    short = dataclasses.replace(data, meta=data.meta | {"history": 4})
    network = _recipe(name, short, QUICK, morec.Text()).make(nnx.Rngs(0))
    assert network(np.zeros((2, 4), np.int32)).shape == (2, ITEMS)


@pytest.mark.parametrize("name", NETWORKS)
def test_scores_do_not_depend_on_the_batch_nor_without_a_key_on_chance(name):
    network = NETWORKS[name](ITEMS, rngs=nnx.Rngs(0))
    history = arrays(dataset(), windows(8, 5)).history_BT
    whole = network(history)
    assert whole.shape == (8, ITEMS)
    np.testing.assert_allclose(network(history[3:4])[0], whole[3], atol=1e-5)
    assert not np.allclose(network(history, nnx.Rngs(dropout=1)), whole, atol=1e-3)


@pytest.mark.parametrize("name", ["gru4rec", "sasrec"])
def test_padding_changes_nothing(name):
    network = NETWORKS[name](ITEMS, rngs=nnx.Rngs(0))
    padded = np.full((1, PLACES), ITEMS, np.int32)
    padded[0, -3:] = short = (3, 5, 7)
    alone = network(np.array([short], np.int32))
    np.testing.assert_allclose(network(padded), alone, atol=1e-5)


def test_the_best_l2_and_epoch_of_validation_are_kept():
    data = dataset()
    train, validation = (arrays(data, data.splits[name]) for name in ("train", "val"))
    lines = []
    settings = trainer.Settings(1e-2, 64, l2=(10.0, 1e-6), epochs=30, patience=2)
    recipe = trainer.Recipe(lambda rngs: NETWORKS["gru4rec"](ITEMS, rngs=rngs))
    found = trainer.fit(recipe, train, validation, settings, lines.append)
    assert found.l2 == 1e-6 and found.hit_ratio == max(found.tried.values())
    assert set(found.tried) == {"10", "1e-06"}
    strong = [line for line in lines if line.startswith("L2 10 ")]
    assert len(strong) < 30, "no early stop"
    graphdef, _ = nnx.split(NETWORKS["gru4rec"](ITEMS, rngs=nnx.Rngs(0)))
    ranks = trainer.ranks(trainer.Scores(graphdef)(found.state, validation.history_BT), validation)
    assert np.mean(np.array(ranks) == 1) == found.hit_ratio


def test_l2_pulls_every_weight_by_its_share():
    """One epoch of one batch from a gradient worked by hand: that of cross entropy plus l2 * w."""
    data = dataset()
    train = arrays(data, data.splits["train"][:4])
    graphdef, state = nnx.split(NETWORKS["gru4rec"](ITEMS, dropout=0.0, rngs=nnx.Rngs(0)))
    sgd = optax.sgd(1.0)

    def after(l2):
        copy = jax.tree.map(lambda x: x + 0, state)
        batch = (train.history_BT[None], train.target_B[None])
        return trainer.make_epoch(graphdef, sgd)(
            copy, sgd.init(copy), jax.random.key(0), l2, *batch
        )[0]

    pulled = jax.tree.map(lambda a, b: a - b, after(0.0), after(0.5))
    jax.tree.map(lambda p, w: np.testing.assert_allclose(p, 0.5 * w, atol=1e-5), pulled, state)


def test_popularity_counts_training_targets():
    assert trivial.popularity(np.array([2, 0, 2]), 4).tolist() == [1, 0, 2, 0]


def test_the_floor_is_where_it_must_be(folder, tmp_path):
    summary, catalogue = run("random", folder, tmp_path)
    assert summary["hit_ratio_at_1"] < 0.2 and catalogue["stage"] == "random"
    assert run("random", folder, tmp_path)[0]["hit_ratio_at_1"] == summary["hit_ratio_at_1"]
    run("popularity", folder, tmp_path, candidates_only=True)
    assert {p.name for p in (tmp_path / "eval").glob("*.json")} == {
        "random-candidates.json",
        "random-catalogue.json",
        "popularity-candidates.json",
    }


def test_a_training_that_diverges_is_told_and_nothing_is_kept(folder, tmp_path):
    with pytest.raises(InputError, match="L2 nan, epoch 1: found a loss of nan"):
        run("gru4rec", folder, tmp_path, settings=dataclasses.replace(QUICK, l2=(float("nan"),)))
    assert not [*tmp_path.rglob("*.safetensors")] and not (tmp_path / "eval").exists()


def test_an_option_may_be_written_with_hyphens(folder, tmp_path):
    command = [
        "-m",
        "sdpo_jax.baselines",
        "--model=popularity",
        f"--dataset={folder}",
        f"--workdir={tmp_path}",
        "--limit=5",
        "--candidates-only",
    ]
    subprocess.run([sys.executable, *command], cwd=ROOT, timeout=120, check=True)
    written = [path.name for path in (tmp_path / "eval").glob("*.json")]
    assert written == ["popularity-candidates.json"]


def test_output_that_nobody_reads_ends_without_a_traceback(folder, tmp_path):
    """As `| head -1` does it, which is gone after the first line."""
    command = ["-m", "sdpo_jax.baselines", "--model=popularity", f"--dataset={folder}"]
    with subprocess.Popen(
        [sys.executable, *command, f"--workdir={tmp_path}"],
        cwd=ROOT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        process.stdout.close()
        assert (process.stderr.read(), process.wait(120)) == ("", 1)


def test_what_is_written_has_the_keys_of_an_evaluation(folder, tmp_path):
    run("popularity", folder, tmp_path)
    summary = json.loads((tmp_path / "eval" / "popularity-candidates.json").read_text())
    assert summary["candidates"] == 20 and summary["n"] == 80 and summary["valid_ratio"] == 1
    assert {
        "hit_ratio_at_1",
        "hit_ratio_at_1_ci95",
        "hit_ratio_at_5",
        "hit_ratio_at_10",
        "ndcg_at_5",
        "ndcg_at_10",
        "mrr",
        "protocol",
        "split",
        "seed",
        "dataset_fingerprint",
        "seconds",
    } <= summary.keys()
    catalogue = json.loads((tmp_path / "eval" / "popularity-catalogue.json").read_text())
    shares = (
        *(f"hit_ratio_at_{k}" for k in (1, 5, 10, 20)),
        "mrr",
        *(f"ndcg_at_{k}" for k in (5, 10, 20)),
    )
    for name in shares:
        low, high = catalogue[f"{name}_ci95"]
        assert 0 <= low <= catalogue[name] <= high <= 1
    same = {"stage", "step", "decoder", "split", "n", "users", "seed", "dataset_fingerprint"}
    assert {key: catalogue[key] for key in same} == {key: summary[key] for key in same}


def test_the_catalogue_is_all_items_but_the_history_s(folder, tmp_path):
    _, summary = run("popularity", folder, tmp_path)
    lines = (tmp_path / "eval" / "popularity-catalogue.jsonl").read_text().splitlines()
    predictions, data = [json.loads(line) for line in lines], dataset()
    counts = np.bincount([w.target for w in data.splits["train"]], minlength=100 + ITEMS)
    for prediction, w in zip(predictions, data.splits["test"], strict=True):
        allowed = [i for i in TITLES if i not in w.history or i == w.target]
        better = [i for i in allowed if i != w.target and counts[i] >= counts[w.target]]
        assert prediction["rank"] == 1 + len(better) and prediction["hit"] == (not better)
        assert set(prediction["top"]) <= set(allowed) and len(prediction["top"]) == 10
        assert [title for title, _ in prediction["ranked"]] == [
            TITLES[item] for item in prediction["top"]
        ]
        assert counts[prediction["top"]].tolist() == sorted(counts[allowed], reverse=True)[:10]
    tops = np.array([prediction["top"] for prediction in predictions])
    assert summary["items"] == ITEMS and summary["coverage_at_10"] == len({*tops.flat}) / ITEMS
    assert summary["mean_popularity_at_10"] == pytest.approx(counts[tops].mean())
    _, random = run("random", folder, tmp_path)
    assert random["gini_at_10"] < summary["gini_at_10"] < 1
    assert random["coverage_at_10"] == 1 > summary["coverage_at_10"]
    assert random["mean_popularity_at_10"] < summary["mean_popularity_at_10"]


def test_the_catalogue_is_all_items_where_one_was_had_before(tmp_path):
    """If a history were left out but for its target, the target would be told."""
    data = dataset()
    first = data.splits["test"][0]
    again = window((first.target, *first.history), first.target, first.candidates)
    splits = data.splits | {"test": [again, *data.splits["test"][1:]]}
    write_dataset(tmp_path / "data", dataset_of(splits, TITLES))
    run("popularity", str(tmp_path / "data"), tmp_path)
    lines = (tmp_path / "eval" / "popularity-catalogue.jsonl").read_text().splitlines()
    counts = np.bincount([w.target for w in data.splits["train"]], minlength=100 + ITEMS)
    for line, w in zip(lines, splits["test"], strict=True):
        better = [i for i in TITLES if i != w.target and counts[i] >= counts[w.target]]
        assert json.loads(line)["rank"] == 1 + len(better)


def test_wrong_splits_runs_and_networks_are_refused(folder, tmp_path):
    with pytest.raises(InputError, match=r"--split: found test_all, expected .* train, val, test"):
        run("random", folder, tmp_path, split="test_all")
    config = tiny_run.config_of(dataset="", model="")
    open_run(Run(tmp_path / "run", config, {"dataset": "0"}, (), ()))
    with pytest.raises(InputError, match="put back the dataset that the run was trained with"):
        run("random", folder, tmp_path / "run")
    (tmp_path / "broken" / "baselines").mkdir(parents=True)
    (tmp_path / "broken" / "baselines" / "gru4rec.safetensors").write_bytes(b"no tensors")
    with pytest.raises(InputError, match=r"gru4rec\.safetensors: found .*remove it"):
        run("gru4rec", folder, tmp_path / "broken", settings=QUICK)


def test_a_workdir_that_cannot_be_written_is_refused_before_training(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(trainer, "fit", lambda *_: pytest.fail("trained"))
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="Not a directory: choose another --workdir"):
        run("sasrec", folder, tmp_path / "file")


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
