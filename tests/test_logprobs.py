"""Shared-prefix log-probs against the padded rows, which compute the same thing the long way."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import collate_padded, random_batch, random_examples, random_segments, tiny_model
from flax import nnx

from sdpo_jax.models.lora import dropout
from sdpo_jax.objectives.logprobs import LAYOUTS, padded_logp, shared_prefix_logp
from sdpo_jax.training.step import preference_objective, sft_objective, sums

SDPO = functools.partial(preference_objective, beta=1.0)


def value_and_gradient(model, layout, batch):
    def loss(lora):
        logp_BMC = LAYOUTS[layout](nnx.merge(model.graphdef, lora, model.base), batch)
        objective = SDPO if logp_BMC.shape[2] > 1 else sft_objective
        return sums(objective, logp_BMC, batch)["loss"], logp_BMC

    (_, logp_BMC), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(model.lora)
    return logp_BMC, np.concatenate([np.ravel(x) for x in jax.tree.leaves(gradient)])


MAKE = pytest.mark.parametrize("make", [random_examples, random_segments])


@MAKE
@pytest.mark.parametrize(("C", "rows"), [(1, 1), (2, 1), (4, 2), (16, 6)])
def test_layouts_give_the_same_log_probs_and_gradients(model, C, rows, make):
    batch = random_batch(B=6, C=C, seed=C, rows=rows, make=make)
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
    answer = batch["answers_BMCA"][batch["answers_mask_BMCA"]]
    assert answer[-1] == 2
    row = dict(batch)
    logp = jax.jit(lambda batch: padded_logp(model.decoder, batch))
    total = 0.0
    for i, token in enumerate(answer):
        text = np.concatenate([prompt, answer[:i]])[None]
        row["prompt_BP"], row["prompt_mask_BP"] = text, np.ones_like(text, bool)
        row["place_BM"] = np.array([[text.shape[1] - 1]])
        row["answers_BMCA"] = np.array([[[[token]]]])
        row["answers_mask_BMCA"] = np.ones((1, 1, 1, 1), bool)
        total += float(logp(row)[0, 0, 0])
    np.testing.assert_allclose(shared_prefix_logp(model.decoder, batch), [[[total]]], atol=1e-4)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_answer_is_bit_identical_when_another_one_changes(model, layout):
    batch = random_batch(B=3, C=4, seed=7)
    changed = dict(batch, answers_BMCA=batch["answers_BMCA"].copy())
    changed["answers_BMCA"][:, :, 2] = np.where(
        batch["answers_mask_BMCA"][:, :, 2], (batch["answers_BMCA"][:, :, 2] + 31) % 97, 0
    )
    logp = jax.jit(lambda batch: LAYOUTS[layout](model.decoder, batch))
    before, after = np.asarray(logp(batch)), np.asarray(logp(changed))
    np.testing.assert_array_equal(before[..., [0, 1, 3]], after[..., [0, 1, 3]])
    assert (before[..., 2] != after[..., 2]).all()


def test_a_target_is_bit_identical_when_what_follows_or_another_branch_changes(model):
    """Later titles, and the rejected titles of all other targets, in the same lengths."""
    rng = np.random.default_rng(1)
    examples = [e for e in random_segments(rng, 12, 3, M=6) if e.M > 3]
    target = 2

    def other(ids):
        return np.where(ids == 2, 2, (ids + 31 - 3) % 94 + 3).astype(np.int32)

    def change(e):
        kept = e.places[target] + len(e.answers_MC[target][0])
        answers = tuple(
            of
            if m == target
            else tuple(other(a) if c or m > target else a for c, a in enumerate(of))
            for m, of in enumerate(e.answers_MC)
        )
        prompt = np.concatenate([e.prompt[:kept], other(e.prompt[kept:])])
        return dataclasses.replace(e, prompt=prompt, answers_MC=answers)

    logp = jax.jit(lambda batch: shared_prefix_logp(model.decoder, batch))
    before = np.asarray(logp(collate_padded(examples)))
    after = np.asarray(logp(collate_padded([change(e) for e in examples])))
    np.testing.assert_array_equal(before[:, target], after[:, target])
    assert (before[:, target + 1] != after[:, target + 1]).any(-1).all()


def test_places_where_no_target_is_have_log_prob_zero(model):
    batch = random_batch(B=4, C=2, make=random_segments)
    absent_BM = batch["place_BM"] < 0
    assert absent_BM.any()
    for layout in LAYOUTS.values():
        assert not np.asarray(layout(model.decoder, batch))[absent_BM].any()


@MAKE
def test_padding_tokens_change_nothing(model, make):
    batch = random_batch(B=3, C=2, make=make)
    noise = {
        "prompt_BP": np.where(batch["prompt_mask_BP"], batch["prompt_BP"], 55),
        "answers_BMCA": np.where(batch["answers_mask_BMCA"], batch["answers_BMCA"], 55),
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
    logp = jax.jit(lambda keys_W: shared_prefix_logp(decoder, batch, keys_W))
    logp = [logp(jax.random.key(k)[None]) for k in (0, 0, 1)]
    np.testing.assert_array_equal(logp[0], logp[1])
    assert not np.array_equal(logp[0], logp[2])


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.001])
def test_dropout_keeps_the_mean_and_loses_its_share(rate):
    x_WTJ = jnp.ones((2, 500, 211))  # a width that four does not divide
    dropped_WTJ = dropout(x_WTJ, jax.random.split(jax.random.key(0)), rate)
    assert (dropped_WTJ == 0).mean() == pytest.approx(max(rate, 1 / 256), abs=0.003)
    assert dropped_WTJ.mean() == pytest.approx(1, abs=0.01)
    assert not np.array_equal(dropped_WTJ[0], dropped_WTJ[1])
