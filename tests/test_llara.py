"""LLaRA: a recommender's item vectors as tokens of the prompt, and when training shows them."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import TINY, random_batch, tiny_model
from flax import nnx
from tiny import tiny_dataset
from trainers import NEVER, train

from sdpo_jax.baselines import trainer
from sdpo_jax.baselines.__main__ import run as run_baseline
from sdpo_jax.data.tokens import MARK, Encoder
from sdpo_jax.evaluate import evaluate
from sdpo_jax.export import export
from sdpo_jax.models.item_vectors import fill
from sdpo_jax.models.tokenizer import load_tokenizer
from sdpo_jax.objectives.logprobs import padded_logp, shared_prefix_logp
from sdpo_jax.system.errors import InputError
from sdpo_jax.training.order import curriculum

ITEMS, SIZE = 12, 6


@pytest.fixture(scope="module")
def hybrid():
    """The tiny model with item vectors that are not zero."""
    model = tiny_model(vectors=(ITEMS, SIZE))
    vectors = 0.01 * np.random.default_rng(7).normal(size=(ITEMS, SIZE))
    fill(model.base, vectors, lambda _: jax.sharding.SingleDeviceSharding(jax.devices()[0]))
    return model


def hybrid_batch():
    """A third of the prompts' tokens are items."""
    batch = random_batch(B=4, C=3, rows=2)
    rng = np.random.default_rng(3)
    items = TINY.V + rng.integers(0, ITEMS, batch["prompt_BP"].shape)
    batch["prompt_BP"] = np.where(rng.random(items.shape) < 1 / 3, items, batch["prompt_BP"])
    return batch


def test_text_is_embedded_as_before_and_an_item_by_its_vector(hybrid):
    tokens = jnp.array([[5, TINY.V + 3, 96]])
    found, table = hybrid.decoder.embed(tokens)[0], hybrid.decoder.embedding[...]
    np.testing.assert_array_equal(found[0], table[5])
    np.testing.assert_array_equal(found[2], table[96])
    vectors = hybrid.decoder.vectors
    hidden = jax.nn.gelu(vectors.vectors[...][3] @ vectors.inner[...] + vectors.inner_bias[...])
    expected = vectors.token_rms[...] * (hidden @ vectors.outer[...] + vectors.outer_bias[...])
    np.testing.assert_allclose(found[1], expected, atol=1e-6)


def test_an_item_is_at_first_as_long_as_a_token_however_long_its_vector_is(hybrid):
    items = hybrid.decoder.embed(TINY.V + jnp.arange(ITEMS)[None])
    table = hybrid.decoder.embedding[...]
    assert 0.5 < jnp.std(items) / jnp.std(table) < 2


def test_hybrid_prompts_give_the_log_probs_of_padded_rows_and_train_the_projector(hybrid):
    batch = hybrid_batch()

    def total(lora, layout):
        return layout(nnx.merge(hybrid.graphdef, lora, hybrid.base), batch)

    shared, padded = (total(hybrid.lora, f) for f in (shared_prefix_logp, padded_logp))
    np.testing.assert_allclose(shared, padded, atol=1e-4)
    of_shared, of_padded = (
        jax.grad(lambda lora, f=f: total(lora, f).sum())(hybrid.lora)
        for f in (shared_prefix_logp, padded_logp)
    )
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-4), of_shared, of_padded)
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(of_shared["vectors"]))


@pytest.fixture
def encoder(model_folder):
    templates = ("seen [HistoryHere]\nfrom [CansHere]\n",)
    return Encoder(
        tiny_dataset(), load_tokenizer(model_folder), templates, 0, 512, first_vector=1000
    )


def test_each_title_of_a_hybrid_prompt_is_followed_by_its_item(encoder):
    window = encoder.window("train", 0)
    text, hybrid = encoder.examples("train", [0, 0], [[window.target]] * 2, [False, True])
    items = [int(token) - 1000 for token in hybrid.prompt if token >= 1000]
    assert items == [*window.history, *window.candidates]  # ids are places in this data set
    np.testing.assert_array_equal(hybrid.prompt[hybrid.prompt < 1000], text.prompt)
    end = hybrid.prompt.tolist().index(1000 + window.history[0])
    title = encoder.answer(window.history[0])[:-1]
    np.testing.assert_array_equal(hybrid.prompt[end - len(title) : end], title)


def test_a_mark_in_a_title_is_refused(encoder):
    encoder.dataset.titles[0] = f"a{MARK}1{MARK}"
    with pytest.raises(InputError, match="in a title or prompt"):
        Encoder(encoder.dataset, encoder.tokenizer, encoder.templates, 0, 512)


def test_training_goes_from_texts_to_hybrid_prompts():
    shown = np.array([key.vectors for key in curriculum(range(4000), True, True, 0)])
    assert shown[:40].mean() < 0.1 and 0.45 < shown.mean() < 0.55 and shown[-40:].mean() > 0.9
    assert all(key.vectors for key in curriculum(range(9), True, False, 0))
    assert not any(key.vectors for key in curriculum(range(9), False, True, 0))


def test_a_run_with_item_vectors_trains_resumes_and_is_evaluated(config, tmp_path, capsys):
    settings = trainer.Settings(epochs=1, l2=(1e-6,))
    run_baseline("sasrec", config.dataset, tmp_path / "b", settings=settings)
    config.item_vectors = str(tmp_path / "b" / "baselines" / "sasrec.safetensors")
    config.stages, config.mesh.data = ("sft",), -1
    train(config, tmp_path / "run", NEVER)
    assert "--stage=sft --decoder" in capsys.readouterr().out  # the base cannot read vectors
    (summary,) = evaluate(tmp_path / "run", ["sft"], decoders=["score"])
    assert summary["n"] == 12
    train(config, tmp_path / "run", NEVER)  # finished: the fingerprints fit
    with pytest.raises(InputError, match="found base of a run whose prompts hold item vectors"):
        evaluate(tmp_path / "run", ["base"])
    with pytest.raises(InputError, match="other tools cannot feed them"):
        export(tmp_path / "run", "sft", "peft", tmp_path / "out")
    stored = json.loads((tmp_path / "run" / "config.json").read_text())
    assert set(stored["fingerprints"]) == {"dataset", "model", "item_vectors"}
    run_baseline(
        "sasrec",
        config.dataset,
        tmp_path / "other",
        settings=trainer.Settings(epochs=1, l2=(1e-3,)),
    )
    config.item_vectors = str(tmp_path / "other" / "baselines" / "sasrec.safetensors")
    with pytest.raises(InputError, match="fingerprint of item_vectors was"):
        train(config, tmp_path / "run", NEVER)


def test_vectors_of_nothing_or_of_another_data_set_are_refused(config, tmp_path):
    config.item_vectors = str(tmp_path / "none.safetensors")
    with pytest.raises(InputError, match=r"none\.safetensors: found .*train --model=sasrec"):
        train(config, tmp_path / "run", NEVER)
    assert not (tmp_path / "run").exists()
