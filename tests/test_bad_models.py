"""Whatever happens to the files of a model or an adapter ends in one line, or is no harm."""

import json
from pathlib import Path

import pytest
from conftest import tiny_model
from damage import (
    NAMES,
    cases,
    changed_bytes,
    damage,
    fresh,
    put,
    told_of_odd_values,
    told_or_done,
    tree,
)
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file
from test_convert import write_gguf
from tiny import hf_folder

from sdpo_jax.convert import convert
from sdpo_jax.models import store
from sdpo_jax.models.config import DecoderConfig
from sdpo_jax.models.gguf import open_gguf
from sdpo_jax.models.lora import LoraConfig
from sdpo_jax.models.peft import read_adapter, write_adapter
from sdpo_jax.models.store import read_meta
from sdpo_jax.models.tokenizer import load_tokenizer
from sdpo_jax.models.weights import abstract_base, read_base
from sdpo_jax.system.errors import InputError

LORA = LoraConfig(rank=2, alpha=4.0)
FILES = ("config.json", "model.json", "model.json", "tokenizer.json", "tokenizer_config.json")


@pytest.fixture(scope="session")
def sources(tmp_path_factory) -> dict[str, Path]:
    """Hugging Face folders: of two families, and one in shards."""
    folder = tmp_path_factory.mktemp("hf")
    found = {name: hf_folder(folder / name, name) for name in ("llama3", "neox")}
    found["shards"] = shards = hf_folder(folder / "shards")
    tensors = load_file(shards / "model.safetensors")
    (shards / "model.safetensors").unlink()
    weight_map = {name: f"{i % 2}.safetensors" for i, name in enumerate(tensors)}
    for file in set(weight_map.values()):
        part = {name: tensors[name] for name in tensors if weight_map[name] == file}
        save_file(part, shards / file)
    index = shards / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    return found


@pytest.fixture
def unwritten(monkeypatch):
    """Conversion without Orbax's files: all that reads and checks runs."""
    monkeypatch.setattr(store, "write_weights", lambda path, tree: path.mkdir())


@cases(48)
@given(st.data())
def test_a_damaged_model_is_one_line(sources, case, unwritten, data):
    source = sources[data.draw(st.sampled_from(sorted(sources)))]
    file = data.draw(st.sampled_from(sorted(path.name for path in source.iterdir())))
    folder = fresh(source, case)
    put(folder / file, data.draw(damage(source / file)))
    told_or_done(lambda: convert(str(folder), str(case.parent / "out")), case.parent)


@cases(60)
@given(st.data())
def test_a_damaged_converted_model_is_one_line(model_folder, case, data):
    def check():
        read_meta(folder)
        load_tokenizer(folder)
        config = DecoderConfig.read(folder)
        assert abstract_base(config)

    file = data.draw(st.sampled_from(FILES))
    folder = fresh(model_folder, case)
    put(folder / file, data.draw(damage(model_folder / file)))
    told_or_done(check, case.parent)


def config_of(folder: Path) -> None:
    """As much of a model as its config.json alone decides."""
    config = DecoderConfig.read(folder)
    hash(config)
    assert config.rotated % 2 == 0


@pytest.mark.parametrize("name", ["llama3", "neox"])
def test_every_odd_value_of_a_model_config_is_one_line(sources, case, name):
    folder = fresh(sources[name], case)
    told_of_odd_values(folder / "config.json", lambda: config_of(folder))


def test_every_odd_value_of_a_converted_models_facts_is_one_line(model_folder, case):
    folder = fresh(model_folder, case)
    told_of_odd_values(folder / "model.json", lambda: read_meta(folder))


def test_every_odd_value_of_an_adapter_config_is_one_line(adapter, case):
    folder, config = fresh(adapter, case), tiny_model().decoder.config
    (folder / "adapter_model.safetensors").unlink()  # what passes as plain ends there
    told_of_odd_values(folder / "adapter_config.json", lambda: read_adapter(folder, LORA, config))


@pytest.fixture(scope="session")
def gguf(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("gguf")
    write_gguf(hf_folder(folder / "hf"), folder / "m.gguf")
    return folder


@cases(32)
@given(st.data())
def test_a_damaged_gguf_is_one_line(gguf, case, data):
    def check():
        source = open_gguf(path)
        read_base(source, DecoderConfig.from_hf(source.config, source.where))
        source.write_tokenizer(case.parent / "out")

    path = fresh(gguf, case) / "m.gguf"
    path.write_bytes(data.draw(changed_bytes(path.read_bytes(), 2000)))
    (case.parent / "out").mkdir()
    told_or_done(check, case.parent)


@pytest.fixture(scope="session")
def adapter(tmp_path_factory) -> Path:
    folder, model = tmp_path_factory.mktemp("peft"), tiny_model()
    write_adapter(folder, nnx.to_pure_dict(model.lora), LORA, model.decoder.config, "base")
    return folder


@cases(40)
@given(st.data())
def test_a_damaged_adapter_is_one_line(adapter, case, data):
    file = data.draw(st.sampled_from(("adapter_config.json", "adapter_model.safetensors")))
    folder = fresh(adapter, case)
    put(folder / file, data.draw(damage(adapter / file)))
    config = tiny_model().decoder.config
    tree_of = told_or_done(lambda: read_adapter(folder, LORA, config), case.parent)
    if tree_of:
        assert set(tree_of["layers"]) == set(LORA.targets)


@pytest.mark.parametrize("dtype", ["F8_E4M3", "U64", "BOOL", "F4"])
def test_an_adapter_of_any_dtype_is_taken_or_one_line(adapter, case, dtype):
    folder = fresh(adapter, case)
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes().replace(b'"F32"', f'"{dtype}"'.encode().ljust(5), 1))
    told_or_done(lambda: read_adapter(folder, LORA, tiny_model().decoder.config), case.parent)


@pytest.mark.parametrize("name", NAMES)
def test_any_name_of_a_model_that_is_not_there_is_one_line(name, tmp_path):
    path = tmp_path / "x" / "y" / "z" / name / "w"
    for call in (
        lambda: convert(str(path), str(tmp_path / "out")),
        lambda: read_meta(path),
        lambda: read_adapter(path, LORA, tiny_model().decoder.config),
    ):
        with pytest.raises(InputError):
            told_or_done(call, tmp_path) or call()
    assert tree(tmp_path) == {}


def test_tokens_beyond_the_vocabulary_are_refused(sources, case, unwritten):
    folder = fresh(sources["llama3"], case)
    content = json.loads((folder / "tokenizer.json").read_text())
    content["model"]["vocab"]["+"] = 10**6
    (folder / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(InputError, match=r"largest token is 1000000 \('\+'\), the model has"):
        convert(str(folder), str(case.parent / "out"))


def test_sizes_that_no_memory_holds_are_one_line(sources, case, unwritten):
    folder = fresh(sources["llama3"], case)
    config = json.loads((folder / "config.json").read_text())
    for changes in (
        {"num_hidden_layers": 10**9},
        {"hidden_size": 2**40},
        {"vocab_size": 2**20},
        {
            "num_hidden_layers": 1024,
            "intermediate_size": 2**20,
            "hidden_size": 2**20,
            "num_attention_heads": 2**10,
            "num_key_value_heads": 1,
            "head_dim": 2**10,
        },
    ):
        (folder / "config.json").write_text(json.dumps(config | changes))
        told_or_done(lambda: convert(str(folder), str(case.parent / "out")), case.parent)
