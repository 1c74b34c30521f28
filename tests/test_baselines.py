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
