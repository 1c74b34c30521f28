"""Ranking a whole catalogue of titles after a prefilled prompt: exactly, and by beam search.

Both read a prefix of `sdpo_jax.evaluation.decode` and the titles' trie. No length is normalized: a
title's score is the log-probability of its tokens, end included. Letters: B prompts, P prompt
tokens, I titles, X nodes of the trie, Z its pieces of S places, W beams, A tokens of the longest
title.
"""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from sdpo_jax.evaluation.decode import Prefix
from sdpo_jax.evaluation.title_trie import Pieces, TitleTrie
from sdpo_jax.models.attention import attend, near
from sdpo_jax.models.decoder import Decoder
from sdpo_jax.objectives.logprobs import prompt_positions

NEVER = -1e30  # the log-prob of what must not be recommended; finite, so that sums stay numbers
HEAD_BLOCK = 128  # places whose logits are there at once


@partial(
    jax.tree_util.register_dataclass,
    data_fields=[
        "token_X",
        "parent_X",
        "depth_X",
        "leaf_X",
        "end_X",
        "first_X",
        "children",
        "path_IA",
        "node_ZS",
        "seen_ZNK",
        "mask_ZNQK",
    ],
    meta_fields=["degree", "roots"],
)
@dataclasses.dataclass(frozen=True)
class Catalogue:
    """Trie and pieces on the device; `degree`: most children of a node below the root, `roots`: the
    root's."""

    token_X: jax.Array
    parent_X: jax.Array
    depth_X: jax.Array
    leaf_X: jax.Array
    end_X: jax.Array
    first_X: jax.Array
    children: jax.Array
    path_IA: jax.Array
    node_ZS: jax.Array
    seen_ZNK: jax.Array
    mask_ZNQK: jax.Array
    degree: int
    roots: int


def to_devices(trie: TitleTrie, pieces: Pieces, placed: Any) -> Catalogue:
    """`placed`: a sharding that every device holds whole."""
    arrays = {**vars(trie), **vars(pieces)}
    counts = trie.first_X[1:] - trie.first_X[:-1]
    return Catalogue(
        **{name: jax.device_put(x, placed) for name, x in arrays.items()},
        degree=max(1, int(counts[1:].max(initial=0))),
        roots=int(counts[0]),
    )


def score_catalogue(decoder: Decoder, prefix: Prefix, catalogue: Catalogue) -> jax.Array:
    """Log-probs `logp_BI` of every title: each inner node of the trie is computed once."""
    root_B = jax.nn.logsumexp(decoder.logits(prefix.last_BD[:, None])[:, 0], -1)
    sums_BX = jnp.zeros((len(root_B), catalogue.token_X.shape[0])).at[:, 0].set(root_B)
    D = prefix.last_BD.shape[1]
    hidden_BXD = jnp.zeros((*sums_BX.shape, D), prefix.last_BD.dtype)
    hidden_BXD = hidden_BXD.at[:, 0].set(prefix.last_BD)

    def piece(carry, arrays):
        sums_BX, hidden_BXD = carry
        node_S, seen_NK, mask_NQK = arrays
        hidden_BSD = _piece_hidden(decoder, prefix, catalogue, node_S, seen_NK, mask_NQK)
        # The root is no piece's node: places that a piece lacks are dropped.
        where_S = jnp.where(node_S > 0, node_S, catalogue.token_X.shape[0])
        sums_BS = _head_sums(decoder, hidden_BSD)
        sums_BX = sums_BX.at[:, where_S].set(sums_BS, mode="drop")
        return (sums_BX, hidden_BXD.at[:, where_S].set(hidden_BSD, mode="drop")), None

    arrays = (catalogue.node_ZS, catalogue.seen_ZNK, catalogue.mask_ZNQK)
    (sums_BX, hidden_BXD), _ = jax.lax.scan(piece, (sums_BX, hidden_BXD), arrays)
    logit_BX = decoder.logits_of(hidden_BXD[:, catalogue.parent_X], catalogue.token_X)
    logp_BX = (logit_BX - sums_BX[:, catalogue.parent_X]).at[:, 0].set(0.0)

    def title(total_BI, path_I):
        return total_BI + logp_BX[:, path_I], None

    start = jnp.zeros((len(root_B), catalogue.path_IA.shape[0]))
    return jax.lax.scan(title, start, catalogue.path_IA.T)[0]


def _piece_hidden(decoder, prefix, catalogue, node_S, seen_NK, mask_NQK) -> jax.Array:
    """Hidden states [B, S, D] of a piece's nodes, block by block as rows of their own."""
    B, P = prefix.mask_BP.shape
    N, Q, K = mask_NQK.shape
    positions_BS = prefix.mask_BP.sum(-1, keepdims=True) + catalogue.depth_X[node_S] - 1
    window = decoder.config.window
    near_BSP = near(positions_BS, prompt_positions(prefix.mask_BP), window)
    prompt_mask = (prefix.mask_BP[:, None] & near_BSP).reshape(B * N, Q, P)
    own_positions_BNK = positions_BS[:, seen_NK]
    own_mask = mask_NQK & near(
        positions_BS.reshape(B * N, Q), own_positions_BNK.reshape(B * N, K), window
    ).reshape(B, N, Q, K)

    def blocks(x_BSGH):  # the keys of each block
        return x_BSGH[:, seen_NK].reshape(B * N, K, *x_BSGH.shape[2:])

    def attention(q, k, v, prompt):
        k_prompt, v_prompt = (jnp.repeat(x, N, 0) for x in prompt)
        seen = [
            (k_prompt, v_prompt, prompt_mask),
            (blocks(k), blocks(v), own_mask.reshape(B * N, Q, K)),
        ]
        out = attend(q.reshape(B * N, Q, *q.shape[2:]), seen, decoder.dtype)
        return out.reshape(B, N * Q, -1), None

    tokens_BS = jnp.broadcast_to(catalogue.token_X[node_S], positions_BS.shape)
    cache = (prefix.keys_LBPGH, prefix.values_LBPGH)
    return decoder(tokens_BS, positions_BS, attention, cache)[0]


def _head_sums(decoder: Decoder, hidden_BSD: jax.Array) -> jax.Array:
    """The logarithm of the softmax's denominator at each place, [B, S], few logits at once."""
    B, S, D = hidden_BSD.shape
    cut = hidden_BSD.reshape(B, S // HEAD_BLOCK, HEAD_BLOCK, D).swapaxes(0, 1)
    sums = jax.lax.map(lambda part: jax.nn.logsumexp(decoder.logits(part), -1), cut)
    return sums.swapaxes(0, 1).reshape(B, S)


def beam(
    decoder: Decoder, prefix: Prefix, catalogue: Catalogue, allowed_BI: jax.Array, width: int
) -> tuple[jax.Array, jax.Array]:
    """The `width` titles that beam search finds among those allowed: places and log-probs, [B, W].

    The most likely first; where there are fewer, the place is -1. With `width` at least the number
    of titles no beginning is ever left out, so the result is exact.
    """
    W, A, B = width, catalogue.path_IA.shape[1], len(prefix.mask_BP)
    L, G, H = (prefix.keys_LBPGH.shape[axis] for axis in (0, 3, 4))
    window, length_B = decoder.config.window, prefix.mask_BP.sum(-1)
    place_BP = prompt_positions(prefix.mask_BP)
    open_BX = _open(catalogue, allowed_BI)

    def step(carry):
        t, logp_BW, node_BW, slot_BWA, cache = carry
        now_BW = jnp.broadcast_to((length_B + t)[:, None], (B, W))
        prompt_mask = prefix.mask_BP[:, None] & near(now_BW, place_BP, window)
        # The token of a beam at each earlier step lies in the slot of the beam that it had then.
        own_mask = slot_BWA[..., None] == jnp.arange(W)
        own_mask &= (jnp.arange(A) <= t)[:, None]
        if window is not None:
            own_mask &= (t - jnp.arange(A) < window)[:, None]
        own_mask = own_mask.reshape(B, W, A * W)

        def attention(q, k, v, layer):
            k_prompt, v_prompt, keys, values = layer
            keys, values = (
                jax.lax.dynamic_update_slice_in_dim(old, new[:, None].astype(old.dtype), t, 1)
                for old, new in ((keys, k), (values, v))
            )
            flat = (x.reshape(B, A * W, G, H) for x in (keys, values))
            seen = [(k_prompt, v_prompt, prompt_mask), (*flat, own_mask)]
            return attend(q, seen, decoder.dtype), (keys, values)

        layers = (prefix.keys_LBPGH, prefix.values_LBPGH, *cache)
        tokens_BW = catalogue.token_X[node_BW]
        hidden_BWD, cache = decoder(tokens_BW, now_BW, attention, layers)
        next_logp, next_node = _continue(
            decoder.logits(hidden_BWD), logp_BW, node_BW, catalogue, open_BX
        )
        beams_BWY = jnp.broadcast_to(jnp.arange(W)[:, None], next_node.shape)
        flat = (x.reshape(B, -1) for x in (next_logp, next_node, beams_BWY))
        logp_BW, node_BW, parent_BW = _best(W, *flat)
        slot_BWA = jnp.take_along_axis(slot_BWA, parent_BW[..., None], 1)
        slot_BWA = slot_BWA.at[:, :, t + 1].set(jnp.arange(W), mode="drop")
        return t + 1, logp_BW, node_BW, slot_BWA, cache

    def goes_on(carry):
        t, logp_BW, node_BW, _, _ = carry
        inner = (catalogue.leaf_X[node_BW] < 0) & (logp_BW > NEVER / 2)
        return (t < A) & inner.any()

    logp_BW, node_BW = _roots(decoder.logits(prefix.last_BD[:, None])[:, 0], catalogue, open_BX, W)
    slot_BWA = jnp.zeros((B, W, A), jnp.int32).at[:, :, 0].set(jnp.arange(W))
    cache = (jnp.zeros((L, B, A, W, G, H), prefix.keys_LBPGH.dtype),) * 2
    carry = (jnp.int32(0), logp_BW, node_BW, slot_BWA, cache)
    _, logp_BW, node_BW, _, _ = jax.lax.while_loop(goes_on, step, carry)
    title_BW = jnp.where(logp_BW > NEVER / 2, catalogue.leaf_X[node_BW], -1)
    return title_BW, logp_BW


def _best(
    W: int, logp_BY: jax.Array, node_BY: jax.Array, parent_BY: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The W best continuations: log-prob, node, and the beam that each continues, [B, W]."""
    logp_BW, at_BW = jax.lax.top_k(logp_BY, W)
    node_BW, parent_BW = (jnp.take_along_axis(x, at_BW, 1) for x in (node_BY, parent_BY))
    return logp_BW, jnp.where(logp_BW > NEVER / 2, node_BW, 0), parent_BW


def _roots(
    logits_BV: jax.Array, catalogue: Catalogue, open_BX: jax.Array, W: int
) -> tuple[jax.Array, jax.Array]:
    """The W best first tokens of titles: log-prob and node, [B, W]."""
    root_BV = jax.nn.log_softmax(logits_BV)
    roots = catalogue.children[: catalogue.roots]
    logp_BY = jnp.where(open_BX[:, roots], root_BV[:, catalogue.token_X[roots]], NEVER)
    node_BY = jnp.broadcast_to(roots, logp_BY.shape)
    if (missing := W - catalogue.roots) > 0:
        logp_BY = jnp.pad(logp_BY, ((0, 0), (0, missing)), constant_values=NEVER)
        node_BY = jnp.pad(node_BY, ((0, 0), (0, missing)))
    logp_BW, node_BW, _ = _best(W, logp_BY, node_BY, node_BY)
    return logp_BW, node_BW


def _open(catalogue: Catalogue, allowed_BI: jax.Array) -> jax.Array:
    """[B, X]: the nodes with which an allowed title begins."""
    leaf_X = catalogue.leaf_X
    counted_BX = jnp.where(leaf_X >= 0, allowed_BI[:, jnp.maximum(leaf_X, 0)], False)
    before_BX = jnp.pad(jnp.cumsum(counted_BX, 1, dtype=jnp.int32), ((0, 0), (1, 0)))
    X = leaf_X.shape[0]
    return before_BX[:, catalogue.end_X] > before_BX[:, jnp.arange(X)]


def _continue(logits_BWV, logp_BW, node_BW, catalogue: Catalogue, open_BX):
    """What may follow each beam, [B, W, 1 + degree]: itself where it is a title, else children."""
    first_BW, last_BW = catalogue.first_X[node_BW], catalogue.first_X[node_BW + 1]
    index = first_BW[..., None] + jnp.arange(catalogue.degree)
    child = catalogue.children[jnp.minimum(index, len(catalogue.children) - 1)]
    sums_BW = jax.nn.logsumexp(logits_BWV, -1)
    logit = jnp.take_along_axis(logits_BWV, catalogue.token_X[child], -1)
    open_child = jax.vmap(lambda open_X, child_WY: open_X[child_WY])(open_BX, child)
    finished_BW = catalogue.leaf_X[node_BW] >= 0
    live_BW = (logp_BW > NEVER / 2) & ~finished_BW
    there = (index < last_BW[..., None]) & open_child & live_BW[..., None]
    logp = jnp.where(there, logp_BW[..., None] + logit - sums_BW[..., None], NEVER)
    kept = jnp.where(finished_BW, logp_BW, NEVER)
    return (
        jnp.concatenate([kept[..., None], logp], -1),
        jnp.concatenate([node_BW[..., None], child], -1),
    )
