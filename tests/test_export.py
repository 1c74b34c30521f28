"""What export writes is what was trained, whole or not at all."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from flax.traverse_util import flatten_dict
from safetensors.numpy import load_file
from tiny_run import LORA, adapters, finish, make_run, model_of, save

from sdpo_jax import export as exporting
from sdpo_jax.convert import convert
from sdpo_jax.export import export
from sdpo_jax.models.peft import read_adapter
from sdpo_jax.models.store import load_model
from sdpo_jax.system import sharding
from sdpo_jax.system.errors import InputError

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    run = make_run(tmp_path_factory.mktemp("export"))
    save(run, "sft", 3, adapters(model_of(run), 3))
    finish(run, "sft", 3)
    return run


def flat(state) -> dict[str, np.ndarray]:
    return {k: np.asarray(x) for k, x in flatten_dict(nnx.to_pure_dict(state), sep="/").items()}


def test_an_adapter_comes_back_from_peft_files_bit_for_bit(run, tmp_path):
    folder = export(run, "sft", "peft", tmp_path / "out")
    model = model_of(run)
    expected, found = flat(adapters(model, 3)), read_adapter(folder, LORA, model.config)
    for name, array in flatten_dict(found, sep="/").items():
        np.testing.assert_array_equal(array, expected.pop(name), err_msg=name)
    assert not expected


def test_peft_files_have_the_names_that_peft_expects(run, tmp_path):
    folder = export(run, "sft", "peft", tmp_path / "out")
    tensors = load_file(folder / "adapter_model.safetensors")
    key = "base_model.model.model.layers.1.self_attn.v_proj.lora_{}.weight"
    assert tensors[key.format("A")].shape == (2, 32)
    assert tensors[key.format("B")].shape == (16, 2)
    assert len(tensors) == 2 * 2 * 2
    content = json.loads((folder / "adapter_config.json").read_text())
    assert (content["r"], content["lora_alpha"]) == (2, 4)
    assert content["target_modules"] == ["q_proj", "v_proj"]
    assert content["base_model_name_or_path"].endswith("hf")


@pytest.mark.parametrize("shard", ["5GB", 20_000])
def test_the_merged_model_is_base_plus_adapter_in_bfloat16(run, tmp_path, monkeypatch, shard):
    monkeypatch.setattr(exporting, "SHARD", shard)
    folder = export(run, "sft", "merged", tmp_path / "out")
    assert len(list(folder.glob("*.safetensors"))) == (1 if shard == "5GB" else 2)
    convert(str(folder), str(tmp_path / "again"))
    merged = load_model(tmp_path / "again", LORA, dtype=jnp.float32)
    model = model_of(run)
    base, lora, found = flat(model.base), flat(adapters(model, 3)), flat(merged.base)
    assert set(found) == set(base)
    for name, array in base.items():
        module = name.removesuffix("/kernel")
        if f"{module}/a" in lora:
            array = array + LORA.scale * np.einsum(
                "lir,lro->lio", lora[f"{module}/a"], lora[f"{module}/b"]
            )
        np.testing.assert_allclose(found[name], array, rtol=2**-7, atol=1e-6, err_msg=name)
    assert json.loads((folder / "config.json").read_text())["dtype"] == "bfloat16"


def test_the_card_tells_data_protocol_and_metrics(run, tmp_path):
    summary = {
        "stage": "sft",
        "step": 3,
        "decoder": "greedy",
        "rank": "candidates",
        "split": "test",
        "n": 11,
        "hit_ratio_at_1": 0.25,
        "hit_ratio_at_1_ci95": [0.1, 0.5],
        "valid_ratio": 1.0,
    }
    (run / "eval").mkdir()
    (run / "eval" / "sft-3-greedy.json").write_text(json.dumps(summary))
    ranking = {"decoder": "beam", "rank": "catalogue", "hit_ratio_at_10": 0.5, "ndcg_at_10": 0.375}
    path = run / "eval" / "sft-3-beam-catalogue.json"
    path.write_text(json.dumps(summary | ranking))
    card = (export(run, "sft", "peft", tmp_path / "out") / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: peft") and "[HistoryHere]" in card
    rows = (
        "| test | candidates | greedy | 0.2500 [0.1000, 0.5000] | – | – | 1.0000 | 11 |",
        "| test | catalogue | beam | 0.2500 [0.1000, 0.5000] | 0.5000 | 0.3750 | 1.0000 | 11 |",
    )
    for words in ("drawn for a test", *rows):
        assert words in card


def test_a_run_of_eight_devices_is_exported_with_one(run, tmp_path):
    """The adapter was saved from eight devices here; the process that exports has one."""
    mesh = sharding.make_mesh(2, 2, 2)
    place = sharding.placement(mesh)
    spread = jax.tree.map(
        lambda variable: variable.replace(jax.device_put(variable[...], place(variable))),
        adapters(model_of(run), 3),
        is_leaf=lambda leaf: isinstance(leaf, nnx.Variable),
    )
    save(run, "sdpo", 2, spread)
    finish(run, "sdpo", 2)
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "sdpo_jax.export",
            f"--workdir={run}",
            "--stage=sdpo",
            f"--output={tmp_path / 'out'}",
        ],
        cwd=ROOT,
        env=os.environ | {"JAX_NUM_CPU_DEVICES": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    expected = flat(adapters(model_of(run), 3))
    found = flatten_dict(read_adapter(tmp_path / "out", LORA, model_of(run).config), sep="/")
    for name, array in expected.items():
        np.testing.assert_array_equal(found[name], array)


def test_the_base_alone_is_merged_from_nothing(run, tmp_path):
    folder = export(run, "base", "merged", tmp_path / "out")
    convert(str(folder), str(tmp_path / "again"))
    found = flat(load_model(tmp_path / "again", LORA, dtype=jnp.float32).base)
    for name, array in flat(model_of(run).base).items():
        np.testing.assert_allclose(found[name], array, rtol=2**-7, atol=1e-6)


def test_what_cannot_be_exported_is_told_and_nothing_is_left(run, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("mine")
    for stage, output, words in (
        ("base", "out", "--stage: found 'base'"),
        ("sft", "full", "found something in"),
    ):
        with pytest.raises(InputError, match=words):
            export(run, stage, "peft", tmp_path / output)
    assert [path.name for path in tmp_path.iterdir()] == ["full"]
