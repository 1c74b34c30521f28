"""Titles and prompts through the three kinds of tokenizer that the families have."""

import dataclasses
import json

import numpy as np
import pytest
from tiny import tiny_dataset
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from sdpo_jax.data import prompts
from sdpo_jax.data.tokens import Encoder, check_titles
from sdpo_jax.models.tokenizer import load_tokenizer
from sdpo_jax.system.errors import InputError

SPECIAL = ("<unk>", "<s>", "</s>")
TITLES = {0: "Heat", 1: "Amélie", 2: "10,000 Maniacs", 3: "Léon: The Professional"}


def vocab_of(pieces) -> dict[str, int]:
    return {piece: i for i, piece in enumerate(dict.fromkeys((*SPECIAL, *pieces)))}


def sentencepiece() -> Tokenizer:
    """As Llama 1/2 and Mistral: a space before the text, bytes for what is unknown, BOS."""
    pieces = [*(f"<0x{i:02X}>" for i in range(256)), "▁", *"abcdefghijklmnopqrstuvwxyz", "H", "He"]
    tokenizer = Tokenizer(
        models.BPE(vocab_of(pieces), [("H", "e")], byte_fallback=True, unk_token="<unk>")
    )
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    return tokenizer


def byte_level(bos: bool = False) -> Tokenizer:
    """As Llama 3 (with BOS) and Pythia (without)."""
    tokenizer = Tokenizer(models.BPE(vocab_of(pre_tokenizers.ByteLevel.alphabet()), []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", 1)]
        )
    return tokenizer


KINDS = {
    "sentencepiece": sentencepiece,
    "byte-level with BOS": lambda: byte_level(bos=True),
    "byte-level": byte_level,
}


@pytest.fixture
def encoder(tmp_path):
    def make(kind, titles=TITLES) -> Encoder:
        tokenizer = KINDS[kind]()
        tokenizer.add_special_tokens(list(SPECIAL))
        tokenizer.save(str(tmp_path / "tokenizer.json"))
        names = dict(zip(("unk_token", "bos_token", "eos_token"), SPECIAL, strict=True))
        names["tokenizer_class"] = "PreTrainedTokenizerFast"
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(names))
        data = tiny_dataset()
        data = dataclasses.replace(data, titles=data.titles | titles)
        return Encoder(data, load_tokenizer(tmp_path), ["{history}{candidates}"], 0, 512)

    return make


@pytest.mark.parametrize("kind", KINDS)
def test_titles_come_back_and_end_in_eos_without_bos(encoder, kind):
    made = encoder(kind)
    check_titles(made.dataset.titles, made.tokenizer)
    for item, title in TITLES.items():
        ids = made.answer(item)
        assert ids[-1] == made.tokenizer.eos_token_id and 1 not in ids
        assert made.tokenizer.decode(ids[:-1]) == title


@pytest.mark.parametrize(
    ("kind", "bos"), [("sentencepiece", True), ("byte-level with BOS", True), ("byte-level", False)]
)
def test_a_prompt_begins_with_bos_exactly_where_the_tokenizer_has_one(encoder, kind, bos):
    made = encoder(kind)
    (example,) = made.examples("train", [0], [[0, 1]])
    assert (example.prompt[0] == 1) == bos and (example.prompt == 1).sum() == bos


@pytest.mark.parametrize("kind", ["sentencepiece", "byte-level with BOS", "byte-level"])
def test_a_chat_prompt_is_what_transformers_makes_of_it(encoder, kind):
    """Where no BOS is put before a text, that of the chat format stays: SmolLM2's begins a turn."""
    made = encoder(kind)
    made.tokenizer.chat_template = "{{ bos_token }}user: {{ messages[0]['content'] }}\nassistant:"
    data, tokenizer = made.dataset, made.tokenizer
    templates = [prompts.in_chat("[HistoryHere], then one of [CansHere]", tokenizer)]
    chat = Encoder(data, tokenizer, templates, 0, 512)
    (example,) = chat.examples("train", [0], [[0, 1]])
    window = chat.window("train", 0)
    history, candidates = (
        ", ".join(data.titles[item] for item in items)
        for items in (window.history, window.candidates)
    )
    message = {"role": "user", "content": f"{history}, then one of {candidates}"}
    whole = tokenizer.apply_chat_template([message], tokenize=True, return_dict=False)
    assert example.prompt.tolist() == whole and whole.count(1) == 1


@pytest.mark.parametrize("kind", KINDS)
def test_titles_of_a_history_come_back_and_end_in_a_line_break(encoder, kind):
    shown = encoder(kind)
    data, tokenizer = shown.dataset, shown.tokenizer
    made = Encoder(data, tokenizer, ["Seen:\n[HistoryHere]\n"], 0, 512, prompt="history")
    for item, title in TITLES.items():
        ids = made.answer(item)
        assert tokenizer.decode(ids[-1:]) == "\n" and made.end not in ids[:-1]
        assert tokenizer.decode(ids[:-1]) == title
    (example,) = made.examples("train", [0], [[0, 1]])
    assert example.prompt.tolist().count(1) == len(made.bos) == shown.bos.count(1)
    text = tokenizer.decode(example.prompt, skip_special_tokens=True)
    lines = [data.titles[item] for item in made.window("train", 0).history]
    assert [line.strip() for line in text.split("\n")] == ["Seen:", *lines, ""]


def test_a_history_needs_a_tokenizer_with_a_line_break(encoder):
    made = encoder("byte-level")
    model = models.WordLevel(vocab_of("abc"), unk_token="<unk>")
    made.tokenizer.backend_tokenizer.model = model
    with pytest.raises(InputError, match=r"config\.prompt is 'history'.*prompt=candidates"):
        Encoder(made.dataset, made.tokenizer, ["[HistoryHere]\n"], 0, 512, prompt="history")


def test_a_sentencepiece_title_begins_with_its_space(encoder):
    """The official code tokenizes titles by themselves, so each gets the space of a text."""
    made = encoder("sentencepiece")
    assert made.tokenizer.convert_ids_to_tokens(made.answer(0)[:3].tolist()) == ["▁", "He", "a"]


def test_prompt_and_answer_are_joined_as_ids_never_as_text(encoder):
    made = encoder("byte-level")
    (example,) = made.examples("train", [0], [[0]])
    text = made.prompt_text("train", 0)
    alone = made.tokenizer(text, add_special_tokens=False).input_ids
    np.testing.assert_array_equal(example.prompt, alone)


@pytest.mark.parametrize(
    ("title", "words"), [("", "encodes to"), ("</s>", "encodes to"), ("a</s>b", "encodes to")]
)
def test_a_title_of_nothing_or_of_special_tokens_is_told(encoder, title, words):
    with pytest.raises(InputError, match=words) as error:
        check_titles({7: title}, encoder("byte-level").tokenizer)
    assert "item 7" in str(error.value)


def test_a_title_that_the_tokenizer_changes_is_told(encoder, tmp_path):
    encoder("byte-level")
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFD(), normalizers.StripAccents()])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(InputError, match=r"1 titles .*item 1: 'Amélie' comes back as 'Amelie'"):
        check_titles({0: "Heat", 1: "Amélie"}, load_tokenizer(tmp_path))
