"""Every family trains, decodes from a cache and shares prompts as Llama does.

The models are the golden ones, whose logits are those of transformers.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import random_examples, random_segments
from flax import nnx
from test_decoder_parity import traced_logits
from tiny import FAMILIES, hf_folder

from sdpo_jax.convert import convert
from sdpo_jax.data.loader import choose_shapes, collate
from sdpo_jax.evaluation import decode
from sdpo_jax.models.lora import LoraConfig
from sdpo_jax.models.store import load_model
from sdpo_jax.objectives.logprobs import padded_logp, shared_prefix_logp
from sdpo_jax.runs.checkpoints import Checkpoints
from sdpo_jax.system import sharding
from sdpo_jax.training.optimizer import make_optimizer
from sdpo_jax.training.step import build_step, make_logp, make_objective

C, EOS = 4, 2
LORA = LoraConfig(rank=2, alpha=4.0)
# `dynamic` stretches with the longest text of a batch, so a text is not the same alone.
ALONE = [name for name in FAMILIES if name != "dynamic"]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    @functools.cache
    def get(name):
        folder = tmp_path_factory.mktemp(name)
        convert(str(hf_folder(folder / "hf", name)), str(folder / "model"))
        return load_model(folder / "model", LORA, dtype=jnp.float32)

    return get


def noisy(lora, seed=1):
    leaves, structure = jax.tree.flatten(lora)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    added = [x + 0.1 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)]
    return jax.tree.unflatten(structure, added)


def make_batch(seed=0, B=3):
    """Prompts of up to 20 tokens, which is longer than mistral's window of 5."""
    rng = np.random.default_rng(seed)
    examples = random_examples(rng, B, C, P=20, A=7, V=64)
    batch = collate(examples, choose_shapes([examples])[0])
    return batch | {"reference_logp_BMC": np.zeros((B, 1, C), np.float32)}


@functools.cache
def compiled(logp):
    """(model's parts, batch, weight of each answer) -> `logp_BMC`, gradient of their sum."""

    def loss(lora, graphdef, base, batch, weight_C):
        logp_BMC = logp(nnx.merge(graphdef, lora, base), batch)
        return (logp_BMC * weight_C).sum(), logp_BMC

    return jax.jit(jax.value_and_grad(loss, has_aux=True), static_argnums=1)


def log_probs(logp, model, batch, weight_C):
    (_, logp_BMC), gradient = compiled(logp)(
        noisy(model.lora), model.graphdef, model.base, batch, weight_C
    )
    return logp_BMC, np.concatenate([np.ravel(x) for x in jax.tree.leaves(gradient)])


def assert_same(found, expected):
    np.testing.assert_allclose(found[0], expected[0], atol=1e-4)
    error = np.linalg.norm(found[1] - expected[1])
    assert error <= 1e-4 * np.linalg.norm(expected[1])


@pytest.mark.parametrize("name", FAMILIES)
def test_sharing_the_prompt_changes_neither_log_probs_nor_gradients(models, name):
    batch, weight_C = make_batch(), np.arange(1.0, C + 1)
    shared, rows = (
        log_probs(logp, models(name), batch, weight_C) for logp in (shared_prefix_logp, padded_logp)
    )
    assert_same(shared, rows)


@pytest.mark.parametrize("negatives", [0, 1, 3, 15])
@pytest.mark.parametrize("name", FAMILIES)
def test_nor_does_sharing_a_history_among_all_of_its_targets(models, name, negatives):
    """Histories of up to 30 tokens, which is longer than mistral's window of 5."""
    examples = random_segments(np.random.default_rng(0), 3, 16, M=5, A=5, V=64)
    assert max(example.M for example in examples) > 2

    def batch_of(answers: int):
        cut = [
            dataclasses.replace(e, answers_MC=tuple(of[:answers] for of in e.answers_MC))
            for e in examples
        ]
        return collate(cut, choose_shapes([cut], rows=3)[0], rows=3)

    answers = 1 + negatives
    weight_C = np.arange(1.0, answers + 1)
    shared = log_probs(shared_prefix_logp, models(name), batch_of(answers), weight_C)
    # Compiled once for every number of negatives: those that are left out weigh nothing.
    rows = 16 if name in ALONE else answers
    logp_BMC, gradient = log_probs(
        padded_logp, models(name), batch_of(rows), np.pad(weight_C, (0, rows - answers))
    )
    assert_same(shared, (logp_BMC[..., :answers], gradient))


@pytest.mark.parametrize("name", ALONE)
def test_decoding_from_the_cache_equals_full_forward_passes(models, name):
    model, batch = models(name), make_batch(B=2)
    decoder = nnx.merge(model.graphdef, noisy(model.lora), model.base)
    steps = 8
    found = jax.jit(
        lambda batch: decode.greedy(decoder, decode.prefill(decoder, batch), [EOS], steps)
    )(batch)
    full = jax.jit(lambda tokens: traced_logits(decoder, tokens, np.ones(tokens.shape, bool)))
    for b, tokens in enumerate(np.asarray(found)):
        text = batch["prompt_BP"][b][batch["prompt_mask_BP"][b]].tolist()
        expected = []
        while len(expected) < steps and EOS not in expected:
            padded = np.zeros((1, 32), np.int32)
            padded[0, : len(text) + len(expected)] = [*text, *expected]
            expected.append(int(full(padded)[0, len(text) + len(expected) - 1].argmax()))
        assert tokens[: len(expected)].tolist() == expected


@pytest.mark.parametrize("name", ALONE)
def test_scores_from_the_cache_equal_those_of_full_rows(models, name):
    model, batch = models(name), make_batch(seed=2)
    decoder = nnx.merge(model.graphdef, noisy(model.lora), model.base)
    found = jax.jit(lambda b: decode.score(decoder, decode.prefill(decoder, b), b))(batch)
    expected = jax.jit(lambda b: padded_logp(decoder, b))(batch)
    np.testing.assert_allclose(found, expected, atol=1e-4)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_step_of_sdpo_starts_at_log_c_falls_and_resumes(models, name, tmp_path):
    model, batch = models(name), make_batch(B=4)
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    logp = make_logp(model.graphdef, "shared_prefix")
    batch["reference_logp_BMC"] = jax.jit(logp)(model.lora, model.base, batch)
    batches = {key: jnp.asarray(x)[None] for key, x in batch.items()}
    optimizer = make_optimizer(0.02, 20, warmup=0.05, clip=1.0, weight_decay=0.0)
    step, first = build_step(logp, make_objective("sdpo"), optimizer, model.lora, mesh)
    template = jax.tree.map(jnp.copy, first)

    def run(state, steps):
        losses = []
        for _ in range(steps):
            state, metrics = step(state, model.base, batches)
            losses.append(float(metrics["loss"]))
        return state, losses

    state, losses = run(first, 6)
    assert losses[0] == pytest.approx(np.log(C), abs=1e-5)
    assert losses[-1] < losses[0] - 0.01
    checkpoints = Checkpoints(tmp_path / name)
    checkpoints.save(state, {}, 1.0)
    checkpoints.wait()
    _, unbroken = run(state, 3)
    restored, _ = checkpoints.restore(6, template)
    checkpoints.close()
    assert run(restored, 3)[1] == unbroken
