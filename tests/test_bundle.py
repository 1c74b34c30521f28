"""Bundles: one folder that recommends without the run, its data or its model."""

import json
import shutil

import jax
import numpy as np
import pytest
import tiny_run

from sdpo_jax.export import export
from sdpo_jax.serving import sources
from sdpo_jax.serving.recommender import Recommender
from sdpo_jax.system.errors import InputError

HISTORY = ["heat", "alien", "up"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return tiny_run.history_run(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def whole(run, tmp_path_factory):
    return export(run, "sft", "bundle", tmp_path_factory.mktemp("bundle") / "whole")


@pytest.fixture(scope="module")
def alone(run, tmp_path_factory):
    output = tmp_path_factory.mktemp("bundle") / "alone"
    return export(run, "sft", "bundle", output, weights="adapter")


def test_a_bundle_recommends_as_its_run_does(run, whole, alone):
    expected = Recommender.from_workdir(run, "sft").recommend(HISTORY, k=5)
    adapter = Recommender.from_bundle(alone, run.parent / "model")
    assert adapter.recommend(HISTORY, k=5) == expected  # the same numbers
    merged = Recommender.from_bundle(whole)
    assert merged.stage == "sft" and merged.settings.prompt == "history"
    found = merged.recommend(HISTORY, k=5)  # merged in bfloat16
    assert [s for _, s in found] == pytest.approx([s for _, s in expected], rel=0.05)
    assert (whole / "README.md").read_text().startswith("---")
    assert not list(whole.rglob("*train*"))


def test_a_changed_missing_or_added_file_is_refused_by_name(whole, tmp_path):
    def damaged(change) -> str:
        folder = tmp_path / f"copy-{len(list(tmp_path.iterdir()))}"
        shutil.copytree(whole, folder)
        change(folder)
        with pytest.raises(InputError) as error:
            Recommender.from_bundle(folder)
        return str(error.value)

    items = damaged(lambda f: (f / "items.jsonl").write_text("{}\n"))
    assert "items.jsonl: found the file changed" in items
    assert "missing" in damaged(lambda f: (f / "README.md").unlink())
    assert "extra: found the file added" in damaged(lambda f: (f / "extra").write_text("x"))
    assert "bundle.json" in damaged(lambda f: (f / "bundle.json").unlink())

    def other_format(folder) -> None:
        meta = json.loads((folder / "bundle.json").read_text())
        (folder / "bundle.json").write_text(json.dumps(meta | {"format": 2}))

    assert "found format 2, expected 1" in damaged(other_format)


def test_an_adapter_alone_needs_the_base_that_it_was_trained_on(run, alone, whole):
    with pytest.raises(InputError, match="expected the converted base beside it: give --model"):
        Recommender.from_bundle(alone)
    with pytest.raises(InputError, match="found another model"):
        Recommender.from_bundle(alone, whole / "model")


def test_a_model_with_a_peft_adapter_ranks_titles_and_a_catalogue_given_to_it(run, tmp_path):
    adapter = export(run, "sft", "peft", tmp_path / "adapter")
    expected = Recommender.from_workdir(run, "sft")
    model, data = run.parent / "model", run.parent / "data"
    found = Recommender.from_model(model, adapter)
    titles = ["jaws", "big", "speed"]
    assert found.rank(HISTORY, titles) == expected.rank(HISTORY, titles)
    with pytest.raises(InputError, match=r"found no catalogue, expected one: give items\.jsonl"):
        found.recommend([1])
    full = Recommender.from_model(model, adapter, catalogue=data)
    assert full.recommend(HISTORY, k=4) == expected.recommend(HISTORY, k=4)
    plain = Recommender.from_model(model).rank(HISTORY, titles)
    assert plain != found.rank(HISTORY, titles)
    content = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(content | {"target_modules": ["x"]}))
    with pytest.raises(InputError, match="found target_modules"):
        Recommender.from_model(model, adapter)


def test_only_what_a_bundle_can_hold_is_exported_as_one(run, tmp_path):
    with pytest.raises(InputError, match="--stage: found 'base', expected sft, sdpo"):
        export(run, "base", "bundle", tmp_path / "x", weights="adapter")
    base = export(run, "base", "bundle", tmp_path / "base")
    found = Recommender.from_bundle(base)
    expected = Recommender.from_workdir(run, "base")
    values = [[score for _, score in one.recommend(HISTORY, k=5)] for one in (found, expected)]
    np.testing.assert_allclose(*values, rtol=0.05)
    assert all(np.isfinite(jax.tree.leaves(values)))


def test_flags_open_a_model_with_its_adapter_as_python_does_and_refuse_what_does_not_fit(
    run, tmp_path
):
    exact = export(run, "sft", "peft", tmp_path / "exact")
    rounded = export(run, "sft", "peft", tmp_path / "rounded", dtype="bfloat16")
    sizes = [(f / "adapter_model.safetensors").stat().st_size for f in (exact, rounded)]
    assert sizes[1] < sizes[0]
    model, data = str(run.parent / "model"), str(run.parent / "data")
    expected = Recommender.from_workdir(run, "sft").recommend(HISTORY, k=5)
    found = Recommender(sources.of_flags("", "", model, str(exact), data))
    assert list(found.source.adapters) == ["base", "adapter"] and found.stage == "adapter"
    assert found.recommend(HISTORY, k=5) == expected
    near = Recommender(sources.of_flags("", "", model, str(rounded), data))
    scores = [s for _, s in near.recommend(HISTORY, k=5)]
    assert scores == pytest.approx([s for _, s in expected], rel=0.02)
    for flags, words in (
        (("", "", "", "", ""), "found none or several of --workdir"),
        ((str(run), "b", "", "", ""), "found none or several of --workdir"),
        ((str(run), "", "", "a", ""), "--adapter, --catalogue: found one without --model"),
        (("", "", model, "", ""), "--catalogue: found nothing beside --model"),
        (("", "", model, "", data, ("sft",)), "--stage: found it without --workdir"),
    ):
        with pytest.raises(InputError, match=words):
            sources.of_flags(*flags)
