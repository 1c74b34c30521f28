"""Shared-prefix log-probs against the padded rows, which compute the same thing the long way."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import random_batch, tiny_model
from flax import nnx

from sdpo_jax.objectives.logprobs import LAYOUTS, padded_logp, shared_prefix_logp
from sdpo_jax.objectives.losses import sdpo_loss


def value_and_gradient(model, layout, batch):
    def loss(lora):
        logp_BC = LAYOUTS[layout](nnx.merge(model.graphdef, lora, model.base), batch)
        return sdpo_loss(logp_BC, batch["reference_logp_BC"], 1.0).mean(), logp_BC

    (_, logp_BC), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(model.lora)
    return logp_BC, np.concatenate([np.ravel(x) for x in jax.tree.leaves(gradient)])


@pytest.mark.parametrize(("C", "rows"), [(1, 1), (4, 1), (4, 2), (4, 6)])
def test_layouts_give_the_same_log_probs_and_gradients(model, C, rows):
    batch = random_batch(B=6, C=C, seed=C, rows=rows)
    shared, shared_gradient = value_and_gradient(model, "shared_prefix", batch)
    padded, padded_gradient = value_and_gradient(model, "padded", batch)
    np.testing.assert_allclose(shared, padded, atol=1e-4)
    error = np.linalg.norm(shared_gradient - padded_gradient)
    assert error <= 1e-4 * max(np.linalg.norm(padded_gradient), 1e-6)


@pytest.mark.parametrize("remat", ["cheap", "full", "least"])
def test_remat_changes_no_gradient(remat):
    batch = random_batch(B=2, C=3)
    _, plain = value_and_gradient(tiny_model(), "shared_prefix", batch)
    _, again = value_and_gradient(tiny_model(remat=remat), "shared_prefix", batch)
    np.testing.assert_allclose(again, plain, rtol=1e-5, atol=1e-7)


def test_log_prob_is_the_sum_over_answer_tokens_and_eos(model):
    """One example by hand: full forward, log-softmax, gather."""
    batch = random_batch(B=1, C=1, seed=3)
    prompt = batch["prompt_BP"][batch["prompt_mask_BP"]]
    answer = batch["answers_BCA"][batch["answers_mask_BCA"]]
    assert answer[-1] == 2
    row = dict(batch)
    logp = jax.jit(lambda batch: padded_logp(model.decoder, batch))
    total = 0.0
    for i, token in enumerate(answer):
        text = np.concatenate([prompt, answer[:i]])[None]
        row["prompt_BP"], row["prompt_mask_BP"] = text, np.ones_like(text, bool)
        row["answers_BCA"] = np.array([[[token]]])
        row["answers_mask_BCA"] = np.ones((1, 1, 1), bool)
        total += float(logp(row)[0, 0])
    np.testing.assert_allclose(shared_prefix_logp(model.decoder, batch), [[total]], atol=1e-4)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_answer_is_bit_identical_when_another_one_changes(model, layout):
    batch = random_batch(B=3, C=4, seed=7)
    changed = dict(batch, answers_BCA=batch["answers_BCA"].copy())
    changed["answers_BCA"][:, 2] = np.where(
        batch["answers_mask_BCA"][:, 2], (batch["answers_BCA"][:, 2] + 31) % 97, 0
    )
    logp = jax.jit(lambda batch: LAYOUTS[layout](model.decoder, batch))
    before, after = np.asarray(logp(batch)), np.asarray(logp(changed))
    np.testing.assert_array_equal(before[:, [0, 1, 3]], after[:, [0, 1, 3]])
    assert (before[:, 2] != after[:, 2]).all()


def test_padding_tokens_change_nothing(model):
    batch = random_batch(B=3, C=2)
    noise = {
        "prompt_BP": np.where(batch["prompt_mask_BP"], batch["prompt_BP"], 55),
        "answers_BCA": np.where(batch["answers_mask_BCA"], batch["answers_BCA"], 55),
    }
    logp = jax.jit(lambda batch: shared_prefix_logp(model.decoder, batch))
    np.testing.assert_array_equal(logp(batch), logp(batch | noise))


def test_the_frozen_base_gets_no_gradient(model):
    """Its cotangent is None in the vjp, so that asking for it gives zeros and costs nothing."""
    batch = random_batch(B=1, C=2)

    def loss(base):
        return shared_prefix_logp(nnx.merge(model.graphdef, model.lora, base), batch).sum()

    gradient = nnx.to_pure_dict(jax.jit(jax.grad(loss))(model.base))
    assert not jnp.any(gradient["layers"]["q"]["kernel"])


def test_dropout_is_a_function_of_its_key():
    batch, decoder = random_batch(B=2, C=2), tiny_model(dropout=0.5).decoder
    logp = jax.jit(lambda keys_R: shared_prefix_logp(decoder, batch, keys_R))
    logp = [logp(jax.random.key(k)[None]) for k in (0, 0, 1)]
    np.testing.assert_array_equal(logp[0], logp[1])
    assert not np.array_equal(logp[0], logp[2])
