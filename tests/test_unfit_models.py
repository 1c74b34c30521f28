"""Models as other tools saved them: quantized, tokens without a row, tokenizers without an end."""

import importlib.util
import json

import numpy as np
import pytest
import sentencepiece
from test_convert import Q0, edit_tensors
from tiny import edit_config, hf_folder
from transformers.utils import is_sentencepiece_available

from sdpo_jax.convert import convert
from sdpo_jax.models.tokenizer import load_tokenizer
from sdpo_jax.system.errors import InputError


@pytest.fixture
def folder(tmp_path):
    return hf_folder(tmp_path / "hf")


@pytest.mark.parametrize(
    ("told", "config", "suffix"),
    [
        ("gptq", {"quant_method": "gptq", "bits": 4}, ".qweight"),
        ("awq", {"quant_method": "awq", "w_bit": 4}, ".qzeros"),
        ("bitsandbytes", {"quant_method": "bitsandbytes", "load_in_4bit": True}, ".absmax"),
        ("fp8", {"quant_method": "fp8"}, ".weight_scale_inv"),
        ("model.layers.0.self_attn.q_proj.W_q", {"bits": 4}, ".W_q"),
        ("model.layers.0.self_attn.q_proj.SCB", None, ".SCB"),
        ("model.layers.0.self_attn.q_proj.weight", None, ".weight"),
    ],
)
def test_a_quantized_model_is_named_as_such(folder, tmp_path, told, config, suffix):
    edit_config(folder, quantization_config=config)
    name = Q0.removesuffix(".weight") + suffix
    edit_tensors(folder, lambda tensors: tensors.update({name: np.zeros(4, np.int32)}))
    with pytest.raises(InputError, match=f"found a quantized model .'{told}") as error:
        convert(str(folder), str(tmp_path / "out"))
    assert len(str(error.value)) < 400 and not (tmp_path / "out").exists()


def test_a_merged_model_whose_config_still_says_quantized_is_taken(folder, tmp_path):
    convert(str(folder), str(tmp_path / "plain"))
    edit_config(folder, quantization_config={"quant_method": "bitsandbytes"})
    convert(str(folder), str(tmp_path / "out"))


def tokenizer_files(folder, change):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        content = json.loads((folder / name).read_text())
        change(name, content)
        (folder / name).write_text(json.dumps(content))


@pytest.fixture
def full(folder):
    """The folder with a tokenizer that has a token for each row of the model."""

    def change(file, content):
        if file == "tokenizer.json":
            vocab, V = content["model"]["vocab"], V_of(folder)
            vocab |= {f"[{token}]": token for token in range(len(vocab), V)}

    tokenizer_files(folder, change)
    return folder


def V_of(folder):
    return json.loads((folder / "config.json").read_text())["vocab_size"]


def add_token(folder, name, role):
    """A special token beyond the model's table, as Llama-2 was first released with."""
    V = V_of(folder)
    entry = {
        "id": V,
        "content": name,
        "special": True,
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
        "normalized": False,
    }

    def change(file, content):
        if file == "tokenizer.json":
            content["added_tokens"].append(entry)
            padding = {
                "strategy": {"Fixed": 8},
                "direction": "Right",
                "pad_to_multiple_of": None,
                "pad_id": V,
                "pad_type_id": 0,
                "pad_token": name,
            }
            content["padding"] = padding if role == "pad_token" else None
        else:
            content[role] = name
            content["added_tokens_decoder"] = {str(V): {k: entry[k] for k in entry if k != "id"}}

    tokenizer_files(folder, change)
    (folder / "added_tokens.json").write_text(json.dumps({name: V}))
    (folder / "special_tokens_map.json").write_text(json.dumps({role: {"content": name}}))


def test_a_padding_token_without_a_row_is_left_out_and_told(full, tmp_path, capsys):
    plain, out = tmp_path / "plain", tmp_path / "out"
    convert(str(full), str(plain))
    add_token(full, "<pad>", "pad_token")
    convert(str(full), str(out))
    assert "left out the token '<pad>'" in capsys.readouterr().out
    found, usual = load_tokenizer(out), load_tokenizer(plain)
    assert found.get_vocab() == usual.get_vocab()
    assert found("a <pad> b").input_ids == usual("a <pad> b").input_ids
    assert "<pad>" not in "".join(path.read_text() for path in out.glob("*.json"))


@pytest.mark.parametrize("role", ["eos_token", "bos_token", "image_token"])
def test_a_token_without_a_row_that_is_needed_is_named(full, tmp_path, role):
    add_token(full, "<|end|>", role)
    with pytest.raises(InputError, match=r"largest token is \d+ \('<\|end\|>'\), the model has"):
        convert(str(full), str(tmp_path / "out"))


@pytest.mark.parametrize(
    ("eos", "said"),
    [
        ("", "found the EOS token ''"),
        (None, "found the EOS token None"),
        ("<|im_end|>", r"largest token is \d+ \('<\|im_end\|>'\)"),
    ],
)
def test_a_tokenizer_without_an_end_of_answers_is_refused(full, tmp_path, eos, said):
    def change(file, content):
        if file == "tokenizer_config.json":
            content["eos_token"] = eos

    tokenizer_files(full, change)
    with pytest.raises(InputError, match=said):
        convert(str(full), str(tmp_path / "out"))


def test_a_sentencepiece_file_alone_leads_to_the_package_it_needs(folder, tmp_path, monkeypatch):
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer.model").write_bytes(b"no model")
    assert is_sentencepiece_available()  # which transformers keeps: other tests need the package
    find = importlib.util.find_spec
    without = {"sentencepiece": lambda *_: None}
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda name, *more: without.get(name, find)(name, *more)
    )
    with pytest.raises(InputError, match=r"pip install 'sdpo_jax\[sentencepiece\]'"):
        load_tokenizer(folder)


def test_a_sentencepiece_file_alone_is_read_with_that_package(folder, tmp_path):
    texts = ["heat", "alien", "the thing", "taxi driver", "twelve monkeys", "quiz", "big fish job"]
    (tmp_path / "text").write_text("\n".join(texts))
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "text"),
        model_prefix=str(folder / "tokenizer"),
        model_type="bpe",
        vocab_size=V_of(folder),
        hard_vocab_limit=False,
        minloglevel=2,
    )
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer"}')
    convert(str(folder), str(tmp_path / "out"))
    found = load_tokenizer(tmp_path / "out")
    expected = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    for text in texts:
        assert found.encode(text, add_special_tokens=False) == expected.encode(text)
        assert found.decode(expected.encode(text)) == text
