"""MoRec: the encoder is BERT, what is trained and kept of it, that titles are what it goes by."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from damage import cases, damage, fresh, put, told_or_done
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file
from tiny import GOLDEN, dataset_of, edit_config, hf_folder, window

from sdpo_jax.baselines import bert, morec, trainer
from sdpo_jax.baselines.__main__ import run
from sdpo_jax.baselines.windows import arrays
from sdpo_jax.data.prepared import Window, write_dataset
from sdpo_jax.system.errors import InputError
from sdpo_jax.system.wheels import ENCODER, cache_folder

GENRES, EACH, OLD = "abcdefgh", 8, 6  # items of a genre, and how many of them training sees
TITLES = {i: f"{GENRES[i // EACH] * 5} {i % EACH}" for i in range(len(GENRES) * EACH)}
QUICK = trainer.Settings(batch_size=64, l2=(1e-6,), epochs=3, learning_rate=1e-2)


def windows(n: int, seed: int, *, new: bool) -> list[Window]:
    """Three known items of a genre, then one of the next: known, or never seen in training."""
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(n):
        genre, place = rng.integers(len(GENRES)), rng.integers(*(OLD, EACH) if new else (0, OLD))
        history = [int(genre * EACH + i) for i in rng.permutation(OLD)[:3]]
        target = int((genre + 1) % len(GENRES) * EACH + place)
        others = [i for i in TITLES if TITLES[i][0] != TITLES[target][0]]
        shown = (target, *(int(i) for i in rng.permutation(others)[:19]))
        found.append(window(history, target, shown))
    return found


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    splits = {
        "train": windows(512, 0, new=False),
        "val": windows(64, 1, new=True),
        "test": windows(64, 2, new=True),
    }
    data = dataset_of(splits, TITLES)
    path = tmp_path_factory.mktemp("morec") / "data"
    write_dataset(path, data)
    return str(path), data


@pytest.fixture(scope="session")
def encoder(tmp_path_factory):
    return hf_folder(tmp_path_factory.mktemp("encoder") / "hf", "bert")


def test_hidden_states_equal_transformers(encoder):
    golden = np.load(GOLDEN / "bert" / "hidden.npz")
    there = np.arange(golden["tokens"].shape[1]) < golden["lengths"][:, None]
    model = bert.read_bert(encoder)
    hidden = np.asarray(model(jnp.where(there, golden["tokens"], model.config.V)))
    np.testing.assert_allclose(hidden[there], golden["hidden"][there], atol=1e-5, rtol=0)


def test_neither_padding_nor_the_batch_changes_a_title(encoder):
    model = bert.read_bert(encoder)
    tokens = bert.title_tokens(encoder, ["a", "the longest of them", "b c"], model.config)
    assert tokens.shape == (3, 19) and (tokens[0] < model.config.V).sum() == 1
    vectors = morec.encode_all(model, tokens)
    wider = np.pad(tokens, ((0, 0), (0, 5)), constant_values=model.config.V)
    np.testing.assert_allclose(morec.encode_all(model, wider), vectors, atol=1e-5)
    alone = morec.encode_all(model, tokens[:1, :1])
    np.testing.assert_allclose(vectors[0], alone[0], atol=1e-5)


def test_a_checkpoint_of_the_first_spelling_with_heads_is_the_same(encoder, tmp_path):
    shutil.copytree(encoder, tmp_path / "old")

    def old(name):
        if "LayerNorm" in name:
            name = name.replace(".weight", ".gamma").replace(".bias", ".beta")
        return f"bert.{name}"

    tensors = load_file(encoder / "model.safetensors")
    spelt = {old(name): tensor for name, tensor in tensors.items()}
    spelt["cls.predictions.bias"] = np.zeros(64, np.float32)
    spelt["bert.embeddings.position_ids"] = np.arange(24)[None]
    save_file(spelt, tmp_path / "old" / "model.safetensors")
    jax.tree.map(
        np.testing.assert_array_equal,
        *(nnx.state(bert.read_bert(folder)) for folder in (encoder, tmp_path / "old")),
    )


def test_titles_are_enough_for_items_that_training_never_saw(dataset, encoder, tmp_path):
    path, _ = dataset
    text = morec.Text(str(encoder))
    (summary,) = run("morec", path, tmp_path, settings=QUICK, candidates_only=True, text=text)
    assert summary["hit_ratio_at_1"] > 0.6 and summary["encoder"] == str(encoder)
    again = run("morec", path, tmp_path, settings=QUICK, limit=20, text=text)
    assert again[0]["validation_by_l2"] == summary["validation_by_l2"]

    tensors = load_file(tmp_path / "baselines" / "morec.safetensors")
    assert not any("text" in name for name in tensors), "the frozen vectors are kept"
    shutil.copytree(encoder, tmp_path / "other")
    weights = load_file(encoder / "model.safetensors")
    weights["embeddings.word_embeddings.weight"][0, 0] += 1
    save_file(weights, tmp_path / "other" / "model.safetensors")
    with pytest.raises(InputError, match="another data set or other settings"):
        run("morec", path, tmp_path, settings=QUICK, text=morec.Text(str(tmp_path / "other")))


def test_frozen_vectors_are_neither_trained_nor_under_l2(dataset, encoder):
    """The step's gradient and L2 are those of the trained part."""
    recipe = morec.recipe(list(TITLES.values()), morec.Text(str(encoder)), 1e-2)
    graphdef, trained, frozen = nnx.split(recipe.make(nnx.Rngs(0)), nnx.Param, ...)
    (vectors,) = jax.tree.leaves(frozen)
    before = np.array(vectors)
    assert vectors.shape == (len(TITLES), 32)
    assert vectors.shape not in [leaf.shape for leaf in jax.tree.leaves(trained)]
    train = arrays(dataset[1], dataset[1].splits["train"][:8])
    epoch = trainer.make_epoch(graphdef, recipe.optimizer, frozen)
    start = jax.tree.map(jnp.copy, trained)
    batch = (train.history_BT[None], train.target_B[None])
    moved, _, _ = epoch(start, recipe.optimizer.init(start), jax.random.key(0), 1e-3, *batch)
    jax.tree.map(lambda new, old: np.any(new != old) or pytest.fail("not trained"), moved, trained)
    np.testing.assert_array_equal(vectors, before)


def test_an_encoder_can_be_trained_too_more_slowly(dataset, encoder, tmp_path):
    text, once = morec.Text(str(encoder), trained=True), trainer.Settings(epochs=1, l2=(0.0,))
    (summary,) = run("morec", dataset[0], tmp_path, settings=once, candidates_only=True, text=text)
    assert summary["encoder_trained"]
    kept = load_file(tmp_path / "baselines" / "morec.safetensors")
    before = load_file(encoder / "model.safetensors")["encoder.layer.1.output.dense.weight"].T
    (after,) = (x for name, x in kept.items() if "layers/down/kernel" in name)
    moved = np.abs(after[1] - before).max()
    assert 0 < moved < 3 * morec.ENCODER_LEARNING_RATE, "Adam's two steps are as long as its rate"
    assert not any("tokens" in name for name in kept)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "roberta"}, r"model_type is 'roberta', expected bert: give"),
        ({"hidden_act": "silu"}, r"config\.json: hidden_act: found 'silu', expected one of gelu"),
        (
            {"position_embedding_type": "relative_key"},
            r"found 'relative_key', expected one of absol",
        ),
        ({"is_decoder": True}, r"is_decoder: found True, expected false"),
        ({"num_attention_heads": 5}, r"hidden_size is 32, expected a multiple of the 5 attention"),
        (
            {"num_hidden_layers": 3},
            r"16 tensors do not fit: encoder\.layer\.2\.attention.* is missing",
        ),
        ({"num_hidden_layers": 1}, r"16 tensors do not fit: encoder\.layer\.1\..* is not used"),
        ({"vocab_size": 65}, r"word_embeddings\.weight has shape \[64, 32\], expected \[65, 32\]"),
        ({"type_vocab_size": None}, r"type_vocab_size: found nothing, expected a whole number"),
    ],
)
def test_an_encoder_that_does_not_fit_is_one_line(encoder, tmp_path, change, message):
    shutil.copytree(encoder, tmp_path / "hf")
    edit_config(tmp_path / "hf", **change)
    with pytest.raises(InputError, match=message):
        bert.read_bert(tmp_path / "hf")


def test_wrong_options_and_folders_are_refused(dataset, encoder, tmp_path):
    with pytest.raises(
        InputError, match=r"--encoder=absent: no such folder, nor a name on the Hub"
    ):
        run("morec", dataset[0], tmp_path, text=morec.Text("absent"))
    with pytest.raises(InputError, match="found with --model=sasrec, which reads no titles"):
        run("sasrec", dataset[0], tmp_path, text=morec.Text(trained=True))
    with pytest.raises(InputError, match=r"found no tokenizer\.json nor vocab\.txt: give a whole"):
        run("morec", dataset[0], tmp_path, text=morec.Text(str(GOLDEN / "bert")))
    small = bert.BertConfig(8, 1, 4, 2, 4, 8, 2, "gelu", 1e-12)
    with pytest.raises(InputError, match=r"largest token is \d+ .*, the model has 8 of them"):
        bert.title_tokens(encoder, ["a"], small)


@cases(16)
@given(st.data())
def test_a_damaged_encoder_is_one_line(encoder, case, data):
    file = data.draw(st.sampled_from(sorted(path.name for path in encoder.iterdir())))
    folder = fresh(encoder, case)
    put(folder / file, data.draw(damage(encoder / file)))
    told_or_done(lambda: morec.recipe(["a", "b c"], morec.Text(str(folder)), 1e-3), case.parent)


def test_minilm_gives_the_vectors_of_transformers():
    package, version, _, member = ENCODER[0]
    folder = cache_folder() / f"{package}-{version}"
    if not (folder / "model.safetensors").is_file():
        pytest.skip("MiniLM is not in the cache: the first --model=morec fetches it")
    model = bert.read_bert(folder)
    tokens = bert.title_tokens(folder, ["Toy Story"], model.config)
    assert json.loads((folder / member.split("/")[-1]).read_text())["hidden_size"] == 384
    expected = [-0.16383699, 0.3087115, 0.3848004, 0.3280294]
    np.testing.assert_allclose(bert.encoded(model, tokens)[0, :4], expected, atol=1e-5)
