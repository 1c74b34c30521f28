"""Attention in blocks with its own vjp against plain softmax attention differentiated by JAX."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sdpo_jax.models import attention

B, T, N, G, H = 2, 9, 4, 2, 6


def draw(seed: int, *shape: int) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape)


def plain(q_BTNH, k_BZGH, v_BZGH, mask_BTZ):
    """Keys repeated over the queries' heads, one softmax."""
    k_BZNH, v_BZNH = (jnp.repeat(x, N // G, 2) for x in (k_BZGH, v_BZGH))
    scores_BNTZ = jnp.einsum("btnh,bznh->bntz", q_BTNH, k_BZNH) * H**-0.5
    weights = jax.nn.softmax(jnp.where(mask_BTZ[:, None], scores_BNTZ, -1e30))
    return jnp.einsum("bntz,bznh->btnh", weights, v_BZNH).reshape(B, -1, N * H)


def value_and_gradients(function, *args):
    weight = draw(9, B, T, N * H)  # so that no row's cotangent is constant
    return jax.value_and_grad(lambda *a: (function(*a) * weight).sum(), (0, 1, 2))(*args)


def assert_close(found, expected):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), found, expected)


def test_two_blocks_of_keys_are_one_softmax_with_its_gradients():
    q, k, v = draw(0, B, T, N, H), draw(1, B, 7, G, H), draw(2, B, 7, G, H)
    mask = jax.random.bernoulli(jax.random.key(3), 0.6, (B, T, 7)).at[..., 5].set(True)

    def blocks(q, k, v):
        cut = [(k[:, a:b], v[:, a:b], mask[..., a:b]) for a, b in ((0, 4), (4, 7))]
        return attention.attend(q, cut, jnp.float32)

    found = value_and_gradients(blocks, q, k, v)
    assert_close(found, value_and_gradients(lambda *a: plain(*a, mask), q, k, v))


@pytest.mark.parametrize("window", [None, 1, 3, 5])
@pytest.mark.parametrize("block", [2, 4, 100])
def test_causal_blocks_of_any_size_are_the_whole(block, window, monkeypatch):
    monkeypatch.setattr(attention, "CAUSAL_BLOCK", block)
    q, k, v = draw(0, B, T, N, H), draw(1, B, T, G, H), draw(2, B, T, G, H)
    mask = jnp.ones((B, T), bool)

    def causal(q, k, v):
        return attention.attend_causal(q, k, v, mask, jnp.float32, window)

    whole = attention.causal_mask(mask, window)
    found = value_and_gradients(causal, q, k, v)
    assert_close(found, value_and_gradients(lambda *a: plain(*a, whole), q, k, v))


def test_a_query_that_sees_nothing_stays_finite_and_leaves_no_gradient():
    q, k, v = draw(0, B, T, N, H), draw(1, B, 5, G, H), draw(2, B, 5, G, H)
    mask = jnp.ones((B, T, 5), bool).at[:, 0].set(False)

    def loss(q, k, v):
        return attention.attend(q, [(k, v, mask)], jnp.float32)[:, 1:].sum()

    gradients = jax.grad(loss, (0, 1, 2))(q, k, v)
    assert all(np.isfinite(g).all() for g in gradients)
    assert not gradients[0][:, 0].any()


def test_no_weights_are_kept_for_the_backward_pass():
    """What a layer scan stacks is linear in the tokens: nothing of [T, S] is among it."""
    q, k, v = draw(0, B, T, N, H), draw(1, B, 50, G, H), draw(2, B, 50, G, H)
    mask = jnp.ones((B, T, 50), bool)
    _, vjp = jax.vjp(lambda *a: attention.attend(a[0], [(*a[1:], mask)], jnp.float32), q, k, v)
    kept = [x.shape for x in jax.tree.leaves(vjp) if x.dtype == jnp.float32]
    assert kept and all(shape[-2:] != (T * N // G, 50) for shape in kept)
