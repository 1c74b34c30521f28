"""Decoding from a prefilled prompt equals full forward passes, token by token."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sdpo_jax.data.loader import Shape, collate
from sdpo_jax.data.tokens import Example
from sdpo_jax.evaluation import decode
from sdpo_jax.models.attention import attend, causal_mask
from sdpo_jax.models.config import DecoderConfig
from sdpo_jax.models.decoder import Decoder
from sdpo_jax.models.lora import LoraConfig
from sdpo_jax.objectives.logprobs import padded_logp

EOS, V, P = 2, 12, 11
CONFIG = DecoderConfig(V=V, L=2, D=16, N=4, G=2, H=8, F=24, tied=True)
ANSWERS = ([5, 6, 7, EOS], [5, 6, EOS], [5, EOS], [8, EOS], [9, 3, 3, 3, 3, EOS])


def random_model():
    """A decoder with weights wide enough for varied generations and an adapter that counts."""
    decoder = Decoder(CONFIG, LoraConfig(rank=2), rngs=nnx.Rngs(0))
    rng = np.random.default_rng(1)
    graphdef, state = nnx.split(decoder)
    noisy = jax.tree.map(lambda x: x + 0.4 * rng.standard_normal(x.shape, np.float32), state)
    return nnx.merge(graphdef, noisy)


MODEL = random_model()


def make_batch(prompts, answers=ANSWERS, P=P):
    answers = [np.array(a, np.int32) for a in answers]
    examples = [Example.single(np.array(p, np.int32), answers) for p in prompts]
    shape = Shape(P, examples[0].packed + 2, Q=1, M=1, A=max(map(len, answers)), T=600)
    return collate(examples, shape)


@pytest.fixture(scope="module")
def prompts():
    rng = np.random.default_rng(0)
    return [rng.integers(3, V, size).tolist() for size in (7, 1, 4, 9, 6, 5)]


@functools.cache
def compiled(function):
    if function is padded_logp:
        return jax.jit(functools.partial(function, MODEL))
    return jax.jit(lambda b, *a: function(MODEL, decode.prefill(MODEL, b), *a))


def greedy_20(decoder, prefix, ends):
    return decode.greedy(decoder, prefix, ends, 20)


def greedy(batch, eos=EOS):
    return np.asarray(compiled(greedy_20)(batch, np.atleast_1d(eos))).tolist()


def trie(batch):
    return np.asarray(compiled(decode.trie)(batch, batch["answers_BMCA"][:, 0])).tolist()


def score(batch):
    return np.asarray(compiled(decode.score)(batch, batch))


@jax.jit
def all_logits(tokens_1T):
    T = tokens_1T.shape[1]
    causal = causal_mask(jnp.ones((1, T), bool))

    def attention(q, k, v, _):
        return attend(q, [(k, v, causal)], MODEL.dtype), None

    hidden, _ = MODEL(tokens_1T, jnp.arange(T)[None], attention)
    return MODEL.logits(hidden)[0]


def next_logits(tokens):
    """Logits after `tokens`, from a forward pass over all of them."""
    padded = np.zeros((1, 32), np.int32)
    padded[0, : len(tokens)] = tokens
    return np.asarray(all_logits(padded)[len(tokens) - 1])


def slow_greedy(prompt, steps=20):
    tokens = []
    while len(tokens) < steps and EOS not in tokens:
        tokens.append(int(next_logits([*prompt, *tokens]).argmax()))
    return tokens + [EOS] * (steps - len(tokens))


def slow_trie(prompt):
    tokens, alive = [], list(range(len(ANSWERS)))
    while len(alive) > 1:
        logits = next_logits([*prompt, *tokens])
        tokens.append(max((ANSWERS[c][len(tokens)] for c in alive), key=lambda t: logits[t]))
        alive = [c for c in alive if ANSWERS[c][: len(tokens)] == tokens]
    return alive[0]


def test_cached_greedy_equals_full_forward_passes(prompts):
    expected = [slow_greedy(prompt) for prompt in prompts]
    assert greedy(make_batch(prompts)) == expected
    assert len({tuple(row) for row in expected}) > 2, "the model answers every prompt alike"


def test_greedy_stops_at_eos(prompts):
    """Whatever the model says first is declared the EOS: nothing may follow it."""
    first = int(next_logits(prompts[0]).argmax())
    assert greedy(make_batch(prompts), first)[0] == [first] * 20
    # Any of several tokens ends it, and after it comes the first of them.
    assert greedy(make_batch(prompts), [V + 1, first])[0] == [first] + [V + 1] * 19


def test_greedy_ends_after_twenty_tokens(prompts):
    tokens = greedy(make_batch(prompts), V + 1)  # an EOS that never comes
    assert {len(row) for row in tokens} == {20} and max(map(max, tokens)) < V


def test_constrained_greedy_equals_full_forward_passes(prompts):
    assert trie(make_batch(prompts)) == [slow_trie(prompt) for prompt in prompts]


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 2, 0)])
def test_candidates_that_begin_alike_are_told_apart(prompts, order):
    """Answers that are each other's beginnings: only EOS separates them."""
    chosen = trie(make_batch(prompts, [ANSWERS[c] for c in order]))
    for prompt, index in zip(prompts, chosen, strict=True):
        second = next_logits([*prompt, 5])[[6, EOS]]
        third = next_logits([*prompt, 5, 6])[[7, EOS]]
        assert order[index] == (2 if second[1] > second[0] else 1 if third[1] > third[0] else 0)


@pytest.mark.parametrize("answers", [ANSWERS, ([EOS], [5, EOS])], ids=["long", "one token"])
def test_scores_from_the_cache_equal_those_of_full_rows(prompts, answers):
    batch = make_batch(prompts, answers)
    np.testing.assert_allclose(score(batch), compiled(padded_logp)(batch), rtol=1e-5)


def test_the_batch_and_its_padding_do_not_matter(prompts):
    together = make_batch(prompts)
    tokens, logp_BMC = greedy(together), score(together)
    for i, prompt in enumerate(prompts):
        alone = make_batch([prompt], P=P + 4)
        assert greedy(alone) == [tokens[i]]
        np.testing.assert_allclose(score(alone)[0], logp_BMC[i], rtol=1e-5)
