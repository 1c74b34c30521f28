"""An adapter of PEFT is taken whole, or refused in one line that says what to set."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from conftest import tiny_model
from flax import nnx
from flax.traverse_util import flatten_dict
from safetensors.numpy import load_file, save_file
from tiny import FAMILIES, hf_folder

from sdpo_jax.convert import convert
from sdpo_jax.models.lora import LoraConfig
from sdpo_jax.models.peft import CONFIG, TENSORS, read_adapter, write_adapter
from sdpo_jax.models.store import load_model
from sdpo_jax.system.errors import InputError
from sdpo_jax.train import first_adapter

LORA = LoraConfig(rank=2, alpha=4.0)


@pytest.fixture
def adapter(tmp_path):
    """The folder of TINY's adapter."""
    model = tiny_model()
    write_adapter(tmp_path, nnx.to_pure_dict(model.lora), LORA, model.decoder.config, "base")
    return tmp_path


def read(folder):
    return read_adapter(folder, LORA, tiny_model().decoder.config)


def edit(folder, change):
    tensors = load_file(folder / TENSORS)
    change(tensors)
    save_file(tensors, folder / TENSORS, metadata={"format": "pt"})


def set_key(key, value):
    def damage(folder):
        content = json.loads((folder / CONFIG).read_text())
        (folder / CONFIG).write_text(json.dumps(content | {key: value}))

    return damage


A0 = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
DAMAGE = {
    "another rank": (set_key("r", 8), r"set --config\.lora\.rank=8"),
    "another alpha": (set_key("lora_alpha", 16), r"set --config\.lora\.alpha=16"),
    "dora": (set_key("use_dora", True), "use_dora is True"),
    "rslora": (set_key("use_rslora", True), "use_rslora is True"),
    "saved modules": (set_key("modules_to_save", ["lm_head"]), "modules_to_save is"),
    "biases": (set_key("bias", "all"), "bias is 'all'"),
    "ranks by module": (set_key("rank_pattern", {"q_proj": 4}), "rank_pattern is"),
    "prompt tuning": (set_key("peft_type", "PROMPT_TUNING"), "peft_type is 'PROMPT_TUNING'"),
    "no config": (lambda f: (f / CONFIG).unlink(), "found no adapter_config.json"),
    "pickled": (lambda f: (f / TENSORS).rename(f / "adapter_model.bin"), "save_pretrained"),
    "cut": (lambda f: (f / TENSORS).write_bytes((f / TENSORS).read_bytes()[:99]), "broken"),
    "a missing tensor": (lambda f: edit(f, lambda t: t.pop(A0)), "1 missing, as .*q_proj"),
    "an extra tensor": (
        lambda f: edit(f, lambda t: t.update({"x.lora_A.weight": np.ones((2, 2), np.float32)})),
        "1 not used, as x",
    ),
    "other targets": (
        lambda f: edit(f, lambda t: [t.pop(key) for key in list(t) if "q_proj" not in key]),
        r"--config\.lora\.targets=\"\('q',\)\"",
    ),
    "a wrong shape": (
        lambda f: edit(f, lambda t: t.update({A0: np.ones((3, 16), np.float32)})),
        r"q/a of layer 0 is \[16, 3\], expected \[16, 2\]",
    ),
    "another width": (
        lambda f: edit(
            f,
            lambda t: [
                t.update({key: np.ones((24, 2), np.float32)}) for key in t if "k_proj.lora_B" in key
            ],
        ),
        r"3 tensors .*k/b of layer 0 is \[2, 24\], expected \[2, 8\]",
    ),
    "one dimension": (
        lambda f: edit(f, lambda t: t.update({A0: np.ones(3, np.float32)})),
        r"q/a of layer 0 is \[3\]",
    ),
    "pissa": (set_key("init_lora_weights", "pissa"), "init_lora_weights is 'pissa'"),
    "alora": (set_key("alora_invocation_tokens", [1]), "alora_invocation_tokens is"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_another_adapter_is_refused(adapter, name):
    damage, words = DAMAGE[name]
    damage(adapter)
    with pytest.raises(InputError, match=words) as error:
        read(adapter)
    assert str(adapter) in str(error.value)


def test_an_adapter_saved_under_its_name_is_taken(adapter):
    expected = read(adapter)
    edit(
        adapter,
        lambda t: [
            t.update({key.replace(".weight", ".default.weight"): t.pop(key)}) for key in list(t)
        ],
    )
    for name, array in flatten_dict(read(adapter), sep="/").items():
        np.testing.assert_array_equal(array, flatten_dict(expected, sep="/")[name])


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_writes_and_reads_its_adapter(name, tmp_path):
    convert(str(hf_folder(tmp_path / "hf", name)), str(tmp_path / "model"))
    model = load_model(tmp_path / "model", LORA, dtype=jnp.float32)
    (tmp_path / "peft").mkdir()
    tree = nnx.to_pure_dict(model.lora)
    write_adapter(tmp_path / "peft", tree, LORA, model.config, "base")
    found = flatten_dict(read_adapter(tmp_path / "peft", LORA, model.config), sep="/")
    expected = flatten_dict(tree, sep="/")
    assert found.keys() == expected.keys()
    for key, array in found.items():
        np.testing.assert_array_equal(array, expected[key])


def test_training_starts_from_the_adapter_that_is_named(config, adapter, tmp_path):
    convert(str(hf_folder(tmp_path / "hf")), str(tmp_path / "model"))
    config.lora.rank, config.lora.alpha = 2, 4.0
    model = load_model(tmp_path / "model", LORA, dtype=jnp.float32)
    (tmp_path / "peft").mkdir()
    tree = {
        name: {part: x + 1 for part, x in parts.items()}
        for name, parts in nnx.to_pure_dict(model.lora)["layers"].items()
    }
    write_adapter(tmp_path / "peft", {"layers": tree}, LORA, model.config, "base")
    config.lora.init_from = str(tmp_path / "peft")
    found = nnx.to_pure_dict(first_adapter(config, model))["layers"]
    for name, parts in tree.items():
        np.testing.assert_array_equal(found[name]["b"], parts["b"])
    config.lora.init_from = ""
    assert first_adapter(config, model) is model.lora
