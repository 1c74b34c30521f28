"""Softmax attention over blocks of keys, with a vjp that stores no attention weights.

Shape letters are declared in `sdpo_jax.system.sharding`; here X is T * N/G: the queries that share
a key/value head, and Z the keys of a block.
"""

import functools
import itertools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from sdpo_jax.models.product import contract, transposed

KeyBlock = tuple[jax.Array, jax.Array, jax.Array]
CAUSAL_BLOCK = 128  # queries; smaller blocks skip more of the future but are more operations


def block_cuts(T: int) -> list[int]:
    """Where blocks of T queries begin, and T: at multiples of what devices compute at once."""
    return [*range(0, T, CAUSAL_BLOCK), T]


def near(queries_BT: jax.Array, keys_BZ: jax.Array, window: int | None) -> jax.Array:
    """[B, T, Z]: which keys a query at these positions may see, looking `window` positions back.

    The query's own position counts as one of them; None is no limit.
    """
    distance_BTZ = queries_BT[:, :, None] - keys_BZ[:, None, :]
    return jnp.ones_like(distance_BTZ, bool) if window is None else distance_BTZ < window


def causal_mask(mask_BT: jax.Array, window: int | None = None) -> jax.Array:
    """[B, T, T]: a query sees the real tokens up to itself, `window` of them at most."""
    T = mask_BT.shape[1]
    place_1T = jnp.arange(T)[None]
    return jnp.tril(near(place_1T, place_1T, window)) & mask_BT[:, None, :]


def attend_causal(
    q_BTNH,
    k_BTGH,
    v_BTGH,
    mask_BT: jax.Array,
    dtype,
    window: int | None = None,
    fused: bool = False,
) -> jax.Array:
    """Attention of every token over the real ones up to itself, [B, T, N*H].

    Queries run in blocks, each over the keys from its window's beginning to its end, so neither
    the future nor what lies too far back is computed. `fused`: cuDNN's kernel instead, which needs
    operands of two bytes and keeps no scores in memory.
    """
    T, causal_BTT = mask_BT.shape[1], causal_mask(mask_BT, window)
    if fused:
        q_BTNH, k_BTGH, v_BTGH = (x.astype(dtype) for x in (q_BTNH, k_BTGH, v_BTGH))
        out_BTNH = jax.nn.dot_product_attention(
            q_BTNH, k_BTGH, v_BTGH, mask=causal_BTT[:, None], implementation="cudnn"
        )
        return out_BTNH.reshape(*out_BTNH.shape[:2], -1)
    out = []
    for a, b in itertools.pairwise(block_cuts(T)):
        first = 0 if window is None else max(0, a - window + 1)
        keys = (k_BTGH[:, first:b], v_BTGH[:, first:b], causal_BTT[:, a:b, first:b])
        out.append(attend(q_BTNH[:, a:b], [keys], dtype))
    return jnp.concatenate(out, 1)


def attend(q_BTNH: jax.Array, blocks: Sequence[KeyBlock], dtype) -> jax.Array:
    """Softmax attention of `q_BTNH` over the concatenation of key blocks, softmax in float32.

    A block is (k_BZGH, v_BZGH, mask_BTZ); the mask is True where a query sees a key. A padded
    query sees nothing and gets a finite mean, which is never read. Returns [B, T, N*H].
    """
    B, T, N, H = q_BTNH.shape
    G = blocks[0][0].shape[2]
    q_BGTnH = (q_BTNH * H**-0.5).reshape(B, T, G, N // G, H).transpose(0, 2, 1, 3, 4)
    keys = tuple(k_BZGH.transpose(0, 2, 1, 3) for k_BZGH, _, _ in blocks)
    values = tuple(v_BZGH.transpose(0, 2, 1, 3) for _, v_BZGH, _ in blocks)
    masks = tuple(jnp.repeat(mask_BTZ, N // G, 1)[:, None] for _, _, mask_BTZ in blocks)
    out_BGXH: Any = _attend(q_BGTnH.reshape(B, G, -1, H), keys, values, masks, dtype)
    return out_BGXH.reshape(B, G, T, N // G, H).transpose(0, 2, 1, 3, 4).reshape(B, T, N * H)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _attend(q_BGXH, keys, values, masks, dtype):
    return _forward(q_BGXH, keys, values, masks, dtype)[0]


def _scores(q_BGXH, k_BGZH, mask_B1XZ, dtype) -> jax.Array:
    scores_BGXZ = contract("bgxh,bgzh->bgxz", q_BGXH, k_BGZH, dtype, jnp.float32)
    return jnp.where(mask_B1XZ, scores_BGXZ, -1e30)


def _forward(q_BGXH, keys, values, masks, dtype):
    scores = [_scores(q_BGXH, k, mask, dtype) for k, mask in zip(keys, masks, strict=True)]
    largest = functools.reduce(jnp.maximum, (s.max(-1, keepdims=True) for s in scores))
    weights = [jnp.exp(s - largest) for s in scores]
    total = sum(w.sum(-1, keepdims=True) for w in weights)
    out_BGXH: Any = sum(
        contract("bgxz,bgzh->bgxh", w, v, dtype, jnp.float32)
        for w, v in zip(weights, values, strict=True)
    )
    out_BGXH = checkpoint_name((out_BGXH / total).astype(q_BGXH.dtype), "attention")
    logsumexp = checkpoint_name(largest + jnp.log(total), "attention")
    return out_BGXH, (q_BGXH, keys, values, masks, out_BGXH, logsumexp)


def _backward(dtype, residuals, g_BGXH):
    """Dao et al. 2022, arXiv 2205.14135, appendix B.2: weights from scores and their logsumexp."""
    q_BGXH, keys, values, masks, out_BGXH, logsumexp = residuals
    mean = (g_BGXH.astype(jnp.float32) * out_BGXH).sum(-1, keepdims=True)
    dq_BGXH, d_keys, d_values = jnp.float32(0), [], []
    for k, v, mask in zip(keys, values, masks, strict=True):
        weights = jnp.exp(_scores(q_BGXH, k, mask, dtype) - logsumexp)
        d_weights = contract("bgxh,bgzh->bgxz", g_BGXH, v, dtype, jnp.float32)
        d_scores = weights * (d_weights - mean)
        dq_BGXH += contract("bgxz,bgzh->bgxh", d_scores, k, dtype)
        # The narrow matrix on the left, or XLA:CPU would transpose the wide one.
        d_keys.append(transposed(contract("bgxh,bgxz->bghz", q_BGXH, d_scores, dtype)))
        d_values.append(transposed(contract("bgxh,bgxz->bghz", g_BGXH, weights, dtype)))
    return dq_BGXH.astype(q_BGXH.dtype), tuple(d_keys), tuple(d_values), None


_attend.defvjp(_forward, _backward)
