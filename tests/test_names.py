"""The names that other programs rely on: commands, options, files, keys, Python."""

import inspect
import json
import re
import subprocess
import sys
from pathlib import Path

import httpx
import jax.numpy as jnp
import pytest
import servers
import tiny_run
from trainers import ROOT, environment

from sdpo_jax import Recommender
from sdpo_jax.evaluate import evaluate
from sdpo_jax.export import export
from sdpo_jax.objectives.losses import sdpo_loss
from sdpo_jax.runs.config import RunConfig

OPTIONS = {
    "prepare": ("dataset", "source", "output", "candidates", "seed"),
    "convert": ("model", "output"),
    "train": ("config", "workdir"),
    "evaluate": ("workdir", "stage", "split", "decoder", "limit", "follow", "rank", "beams"),
    "export": ("workdir", "stage", "format", "output"),
    "baselines": ("model", "dataset", "workdir"),
    "leakcheck": ("dataset",),
    "recommend": ("workdir", "bundle", "history", "k", "candidates", "json"),
    "serve": ("workdir", "bundle", "port"),
}
KEYS = {
    "prompt": ("candidates", "history"),
    "negatives": ("shown", "uniform", "popularity", "hard"),
    "tune": ("lora", "full"),
    "redraw": (True, False),
    "history": (10,),
}
TARGETS = ("setup", "quickstart", "test", "aot", "gpu")
OF_CATALOGUE = (
    *(f"hit_ratio_at_{k}" for k in (1, 5, 10, 20)),
    *(f"ndcg_at_{k}" for k in (5, 10, 20)),
    *("mrr", "n", "coverage_at_10", "gini_at_10", "mean_popularity_at_10"),
)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return tiny_run.history_run(tmp_path_factory.mktemp("run"), "sdpo")


def sdpo(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "sdpo_jax", *arguments],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.mark.parametrize("command", OPTIONS)
def test_a_command_has_its_options(command):
    text = sdpo(command, "--helpfull").stdout
    assert not [name for name in OPTIONS[command] if not re.search(rf"--(\[no\])?{name}\b", text)]


def test_keys_of_the_config_have_their_values():
    for key, values in KEYS.items():
        for value in values:
            made = RunConfig.of(RunConfig().to_dict() | {key: value})
            assert getattr(made, key) == value


def test_an_evaluation_leaves_its_files_with_their_keys(run):
    evaluate(run, ["sdpo"], "test", ["score"])
    assert (run / "eval" / "sdpo-2-score.json").exists()
    evaluate(run, ["sdpo"], "test", ["beam"], rank="catalogue", beams=5)
    summary = json.loads((run / "eval" / "sdpo-2-beam-catalogue.json").read_text())
    assert set(OF_CATALOGUE) <= set(summary)


def test_the_shell_recommends_from_a_run_and_a_bundle_as_python_does(run, tmp_path):
    bundle = export(run, "sdpo", "bundle", tmp_path / "bundle")
    for source, recommender in (
        (f"--workdir={run}", Recommender.from_workdir(run, stage="sdpo")),
        (f"--bundle={bundle}", Recommender.from_bundle(bundle)),
    ):
        done = sdpo("recommend", source, "--history=heat; alien", "--k=3", "--json")
        assert done.returncode == 0, done.stderr
        found = [(one["title"], one["score"]) for one in json.loads(done.stdout)["items"]]
        expected = recommender.recommend(["heat", "alien"], k=3)
        assert [title for title, _ in found] == [title for title, _ in expected]
    done = sdpo("recommend", f"--workdir={run}", "--history=heat", "--candidates=up; jaws")
    assert done.returncode == 0 and "up" in done.stdout and "jaws" in done.stdout


def test_python_has_its_calls(run):
    model = Recommender.from_model(run.parent / "model", adapter=None)
    assert len(model.score("heat\n", ["up", "jaws"])) == 2
    ranked = model.rank(["heat"], ["up", "jaws"])
    assert {title for title, _ in ranked} == {"up", "jaws"} and ranked[0][1] >= ranked[1][1]
    of_run = Recommender.from_workdir(run, stage="sdpo")
    listed = of_run.recommend(["heat"], k=10, exclude_seen=True, items=None)
    assert len(listed) == 9 and listed == sorted(listed, key=lambda pair: -pair[1])


def test_the_loss_works_on_any_leading_axes():
    policy_BC = jnp.array([[-1.0, -2.0, -3.0], [-2.0, -1.0, -4.0]])
    loss_B = sdpo_loss(policy_BC, jnp.zeros_like(policy_BC), 1.0)
    assert loss_B.shape == (2,)
    loss_AB = sdpo_loss(policy_BC[None], jnp.zeros_like(policy_BC)[None], 1.0)
    assert loss_AB.shape == (1, 2) and (loss_AB[0] == loss_B).all()
    assert list(inspect.signature(sdpo_loss).parameters)[2] == "beta"


def test_a_server_answers_on_its_paths(run):
    with servers.served(run) as (address, _), httpx.Client(base_url=address) as client:
        assert client.get("/healthz").status_code == 200
        assert client.get("/items").json()["items"]
        assert "<html" in client.get("/").text
        asked = {"history": ["heat"], "k": 10, "exclude_seen": True, "items": None}
        (first, *_) = client.post("/recommend", json=asked, timeout=60).json()["items"]
        assert set(first) == {"id", "title", "score"}


def test_make_has_its_targets():
    text = Path(ROOT / "Makefile").read_text(encoding="utf-8")
    assert not [name for name in TARGETS if not re.search(rf"^{name}:", text, re.MULTILINE)]
