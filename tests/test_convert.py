"""Conversion keeps every weight, and a broken model is one line that names what is wrong."""

import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from flax.traverse_util import flatten_dict
from safetensors.numpy import load_file, save_file
from tiny import edit_config, hf_folder

from sdpo_jax.convert import convert
from sdpo_jax.models.base_weights import read_weights
from sdpo_jax.models.config import DecoderConfig
from sdpo_jax.models.gguf import NAMES, open_gguf, unpermute
from sdpo_jax.models.lora import LoraConfig
from sdpo_jax.models.store import load_model
from sdpo_jax.models.weights import open_hf, read_base
from sdpo_jax.system.errors import InputError

Q0, HEAD = "model.layers.0.self_attn.q_proj.weight", "lm_head.weight"


@pytest.fixture
def folder(tmp_path):
    return hf_folder(tmp_path / "hf")


def edit_tensors(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return tensors


def flat_base(source):
    tree, dtype = read_base(source, DecoderConfig.from_hf(source.config, source.where))
    return flatten_dict(tree, sep="/"), dtype


def write_gguf(folder, path, **overrides):
    """The golden model `new` as a GGUF file: rows of q and k in interleaved RoPE order."""
    gguf = pytest.importorskip("gguf")
    names = {hf: ours for ours, hf in NAMES.items()}
    writer = gguf.GGUFWriter(path, overrides.get("arch", "llama"))
    writer.add_block_count(2)
    writer.add_context_length(128)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(40)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-6)
    for name, array in load_file(folder / "model.safetensors").items():
        parts = name.removesuffix(".weight").split(".")
        layered = parts[1] == "layers"
        short = names[".".join(parts[3:] if layered else parts)]
        if short in ("attn_q", "attn_k"):
            heads = 4 if short == "attn_q" else 2
            array = array.reshape(heads, 2, -1, 32).swapaxes(1, 2).reshape(array.shape)
        prefix = f"blk.{parts[2]}." if layered else ""
        writer.add_tensor(f"{prefix}{short}.weight", np.ascontiguousarray(array))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_gguf_and_safetensors_of_one_model_give_the_same_arrays(folder, tmp_path):
    ours, dtype = flat_base(open_gguf(write_gguf(folder, tmp_path / "m.gguf")))
    expected, _ = flat_base(open_hf(folder))
    assert dtype == "float32" and ours.keys() == expected.keys()
    for name, array in ours.items():
        np.testing.assert_array_equal(array, expected[name], err_msg=name)


def test_unpermute_undoes_the_interleaving_of_one_head():
    interleaved = np.array([[0], [3], [1], [4], [2], [5]])
    assert unpermute(interleaved, 1)[:, 0].tolist() == [0, 1, 2, 3, 4, 5]


def test_shards_give_the_same_arrays_as_one_file(folder):
    expected, _ = flat_base(open_hf(folder))
    tensors = load_file(folder / "model.safetensors")
    names = sorted(tensors)
    parts = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, part in parts.items():
        save_file({name: tensors[name] for name in part}, folder / file)
    (folder / "model.safetensors").unlink()
    index = {"weight_map": {name: file for file, part in parts.items() for name in part}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    for name, array in flat_base(open_hf(folder))[0].items():
        np.testing.assert_array_equal(array, expected[name], err_msg=name)
    (folder / "b.safetensors").unlink()
    with pytest.raises(InputError, match=r"names files that are not there \(b.safetensors\)"):
        open_hf(folder)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_the_stored_dtype_is_kept_and_cast_when_loaded(folder, tmp_path, dtype):
    def narrow(tensors):
        for name in tensors:
            tensors[name] = tensors[name].astype(jnp.dtype(dtype))

    edit_tensors(folder, narrow)
    meta = convert(str(folder), str(tmp_path / "model"))
    assert meta["dtype"] == dtype
    model = load_model(tmp_path / "model", LoraConfig(rank=2), dtype=jnp.float32)
    stored = flat_base(open_hf(folder))[0]
    for name, array in flatten_dict(nnx.to_pure_dict(model.base), sep="/").items():
        assert array.dtype == jnp.float32
        np.testing.assert_array_equal(array, stored[name].astype(np.float32), err_msg=name)
    assert meta["parameters"] == sum(leaf.size for leaf in jax.tree.leaves(model.base))


def test_buffers_of_old_checkpoints_and_a_stored_tied_head_are_let_through(folder):
    def add(tensors):
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(4, np.float32)
        tensors[HEAD] = tensors["model.embed_tokens.weight"].copy()

    edit_tensors(folder, add)
    assert "head" not in flat_base(open_hf(folder))[0]
    edit_tensors(folder, lambda tensors: tensors.update({HEAD: tensors[HEAD] + 1}))
    with pytest.raises(InputError, match="tie_word_embeddings true"):
        flat_base(open_hf(folder))


def test_the_adapter_starts_from_the_seed_with_no_effect(folder, tmp_path):
    convert(str(folder), str(tmp_path / "model"))

    def adapter(seed):
        model = load_model(tmp_path / "model", LoraConfig(rank=2), dtype=jnp.bfloat16, seed=seed)
        return nnx.to_pure_dict(model.lora)["layers"]["q"]

    first, again, other = adapter(0), adapter(0), adapter(1)
    assert first["a"].shape == (2, 32, 2) and first["a"].dtype == jnp.float32
    np.testing.assert_array_equal(first["a"], again["a"])
    assert not np.array_equal(first["a"], other["a"])
    assert not np.any(first["b"]) and np.abs(first["a"]).max() <= 32**-0.5


def test_arrays_go_where_the_shardings_say(folder, tmp_path):
    convert(str(folder), str(tmp_path / "model"))
    mesh = jax.make_mesh((1,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    asked = []

    def place(variable):
        asked.append(variable.letters)
        return jax.NamedSharding(mesh, jax.P())

    model = load_model(tmp_path / "model", LoraConfig(), dtype=jnp.float32, shardings=place)
    assert {"VD", "DN", "DR"} <= set(asked)
    for leaf in jax.tree.leaves((model.lora, model.base)):
        assert leaf.sharding == jax.NamedSharding(mesh, jax.P())


def test_the_same_conversion_again_writes_nothing_and_another_is_refused(folder, tmp_path):
    output = tmp_path / "model"
    first = convert(str(folder), str(output))
    before = {path: path.stat().st_mtime_ns for path in output.rglob("*")}
    assert convert(str(folder), str(output)) == first
    assert {path: path.stat().st_mtime_ns for path in output.rglob("*")} == before
    with pytest.raises(InputError, match="found another model"):
        convert(str(hf_folder(tmp_path / "hf2", "llama-old")), str(output))
    (output / "model.json").write_text("{}")
    with pytest.raises(InputError, match="did not write"):
        convert(str(folder), str(output))


def cut_file(name, keep):
    def damage(folder):
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[: int(len(content) * keep)])

    return damage


DAMAGE = {
    "cut safetensors": (cut_file("model.safetensors", 0.7), "model.safetensors: found broken"),
    "cut header": (cut_file("model.safetensors", 0.005), "model.safetensors: found broken"),
    "cut config": (cut_file("config.json", 0.5), "config.json: found"),
    "config is a list": (lambda f: (f / "config.json").write_text("[]"), "found a list"),
    "no config": (lambda f: (f / "config.json").unlink(), "config.json: No such file"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "no model.safetensors"),
    "only .bin": (
        lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"),
        "found only .bin/.pth weights",
    ),
    "no tokenizer": (lambda f: (f / "tokenizer.json").unlink(), "found no tokenizer"),
    "cut tokenizer": (cut_file("tokenizer.json", 0.5), "found no tokenizer"),
    "missing tensor": (lambda f: edit_tensors(f, lambda t: t.pop(Q0)), f"{Q0} is missing"),
    "extra tensor": (
        lambda f: edit_tensors(f, lambda t: t.update({"x.bias": np.ones(3, np.float32)})),
        "x.bias is not used",
    ),
    "wrong shape": (
        lambda f: edit_tensors(f, lambda t: t.update({Q0: np.ones((32, 31), np.float32)})),
        rf"{Q0} has shape \[32, 31\], expected \[32, 32\]",
    ),
    "integers": (
        lambda f: edit_tensors(f, lambda t: t.update({Q0: np.ones((32, 32), np.int8)})),
        f"found a quantized model .'{Q0}'., expected one whose weights are float32",
    ),
    "two at once": (
        lambda f: edit_tensors(
            f, lambda t: (t.pop(Q0), t.update({"x.bias": np.ones(3, np.float32)}))
        ),
        f"2 tensors do not fit: {Q0} is missing; x.bias is not used",
    ),
    "another family": (lambda f: edit_config(f, model_type="bert"), "model_type is 'bert'"),
    "rope scaling": (
        lambda f: edit_config(f, rope_parameters={"rope_type": "yarn", "rope_theta": 1e4}),
        "rope_type is 'yarn'",
    ),
    "a key missing": (lambda f: edit_config(f, vocab_size=None), "vocab_size"),
    "other sizes": (lambda f: edit_config(f, num_hidden_layers=3), "9 tensors do not fit"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_broken_model_is_one_line_and_nothing_is_written(folder, tmp_path, name):
    damage, message = DAMAGE[name]
    damage(folder)
    with pytest.raises(InputError, match=message) as error:
        convert(str(folder), str(tmp_path / "out" / "model"))
    assert str(folder) in str(error.value)
    assert not list(tmp_path.glob("out/*")) and not list(tmp_path.glob("out/.*"))


@pytest.mark.parametrize("keep", [0.0, 0.0005, 0.005, 0.02, 0.5, 0.999])
def test_a_cut_gguf_is_told(folder, tmp_path, keep):
    path = write_gguf(folder, tmp_path / "m.gguf")
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * keep)])
    with pytest.raises(InputError, match=r"m\.gguf: found no readable GGUF"):
        convert(str(path), str(tmp_path / "model"))


def test_a_gguf_of_another_family_or_tokenizer_is_told(folder, tmp_path):
    with pytest.raises(InputError, match=r"general\.architecture is 'gpt2', expected 'llama'"):
        convert(str(write_gguf(folder, tmp_path / "a.gguf", arch="gpt2")), str(tmp_path / "model"))
    with pytest.raises(InputError, match=r"tokenizer\.ggml\.model/pre is None/None"):
        convert(str(write_gguf(folder, tmp_path / "b.gguf")), str(tmp_path / "model"))
    assert not (tmp_path / "model").exists()


def test_gguf_without_its_package_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    with pytest.raises(InputError, match=r"pip install -e '\.\[quickstart\]'"):
        convert(str(tmp_path / "m.gguf"), str(tmp_path / "model"))


def test_a_path_that_is_no_model_is_told(folder, tmp_path):
    for path, message in (
        (tmp_path / "absent", "no such folder or file"),
        (folder / "config.json", "expected a folder or a .gguf file"),
        (tmp_path, "found no model.safetensors"),
    ):
        with pytest.raises(InputError, match=message):
            convert(str(path), str(tmp_path / "model"))


def test_loading_what_is_not_converted_names_the_command(folder, tmp_path):
    for path in (tmp_path / "absent", folder):
        with pytest.raises(InputError, match=r"python -m sdpo_jax\.convert --model=PATH"):
            load_model(path, LoraConfig(), dtype=jnp.float32)


def test_loading_a_broken_folder_is_told(folder, tmp_path):
    output = tmp_path / "model"
    convert(str(folder), str(output))
    config = json.loads((output / "config.json").read_text())
    edit_config(output, intermediate_size=41)
    with pytest.raises(InputError, match=r"layers/gate/kernel is float32\[2, 32, 40\], expected"):
        load_model(output, LoraConfig(), dtype=jnp.float32)
    (output / "config.json").write_text(json.dumps(config))
    path = next(path for path in (output / "weights").rglob("d/*") if path.is_file())
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(InputError, match=f"{path.name}: found 50, expected [0-9]+ bytes"):
        load_model(output, LoraConfig(), dtype=jnp.float32)
    with pytest.raises(InputError, match="absent: found unreadable weights"):
        next(read_weights(output / "absent", {}))


def test_a_disk_without_room_is_one_line_and_nothing_is_written(folder, tmp_path):
    command = f"{sys.executable} -m sdpo_jax.convert --model={folder} --output={tmp_path}/model"
    run = subprocess.run(
        ["bash", "-c", f"ulimit -f 40; {command}"],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert run.returncode == 2 and run.stderr.count("\n") == 1
    assert "File too large on reserving" in run.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_the_command_ends_with_status_2_and_one_line(folder, tmp_path):
    edit_config(folder, model_type="bert")
    run = subprocess.run(
        [
            sys.executable,
            "-m",
            "sdpo_jax.convert",
            f"--model={folder}",
            f"--output={tmp_path / 'model'}",
        ],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert run.returncode == 2 and run.stdout == ""
    assert run.stderr.count("\n") == 1 and "model_type is 'bert'" in run.stderr
    assert not (tmp_path / "model").exists()
