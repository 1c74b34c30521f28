"""Ranking a whole catalogue of titles after a prefilled prompt: exactly, and by beam search.

Both read a prefix of `sdpo_jax.evaluation.decode` and the titles' trie. No length is normalized: a
title's score is the log-probability of its tokens, end included. Letters beside
those of `sdpo_jax.system.sharding`: X nodes, Y titles, Z pieces, as in `title_trie`, or, in the
beam, Z continuations; beams are candidates, C.
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
HEAD_BLOCK = 128  # tokens whose logits are computed at once


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
        "path_YA",
        "node_ZS",
        "seen_ZWT",
        "mask_ZWQT",
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
    path_YA: jax.Array
    node_ZS: jax.Array
    seen_ZWT: jax.Array
    mask_ZWQT: jax.Array
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
    """Log-probs `logp_BY` of every title: each inner node of the trie is computed once."""
    root_B = jax.nn.logsumexp(decoder.logits(prefix.last_BD[:, None])[:, 0], -1)
    sums_BX = jnp.zeros((len(root_B), catalogue.token_X.shape[0])).at[:, 0].set(root_B)
    D = prefix.last_BD.shape[1]
    hidden_BXD = jnp.zeros((*sums_BX.shape, D), prefix.last_BD.dtype)
    hidden_BXD = hidden_BXD.at[:, 0].set(prefix.last_BD)

    def piece(carry, arrays):
        sums_BX, hidden_BXD = carry
        node_S, seen_WT, mask_WQT = arrays
        hidden_BSD = _piece_hidden(decoder, prefix, catalogue, node_S, seen_WT, mask_WQT)
        # The root is no piece's node: places that a piece lacks are dropped.
        where_S = jnp.where(node_S > 0, node_S, catalogue.token_X.shape[0])
        sums_BS = _head_sums(decoder, hidden_BSD)
        sums_BX = sums_BX.at[:, where_S].set(sums_BS, mode="drop")
        return (sums_BX, hidden_BXD.at[:, where_S].set(hidden_BSD, mode="drop")), None

    arrays = (catalogue.node_ZS, catalogue.seen_ZWT, catalogue.mask_ZWQT)
    (sums_BX, hidden_BXD), _ = jax.lax.scan(piece, (sums_BX, hidden_BXD), arrays)
    logit_BX = decoder.logits_of(hidden_BXD[:, catalogue.parent_X], catalogue.token_X)
    logp_BX = (logit_BX - sums_BX[:, catalogue.parent_X]).at[:, 0].set(0.0)

    def title(total_BY, path_Y):
        return total_BY + logp_BX[:, path_Y], None

    start = jnp.zeros((len(root_B), catalogue.path_YA.shape[0]))
    return jax.lax.scan(title, start, catalogue.path_YA.T)[0]


def _piece_hidden(decoder, prefix, catalogue, node_S, seen_WT, mask_WQT) -> jax.Array:
    """Hidden states [B, S, D] of a piece's nodes, block by block as rows of their own."""
    B, P = prefix.mask_BP.shape
    W, Q, T = mask_WQT.shape
    positions_BS = prefix.mask_BP.sum(-1, keepdims=True) + catalogue.depth_X[node_S] - 1
    window = decoder.config.window
    near_BSP = near(positions_BS, prompt_positions(prefix.mask_BP), window)
    prompt_mask = (prefix.mask_BP[:, None] & near_BSP).reshape(B * W, Q, P)
    own_positions_BWT = positions_BS[:, seen_WT]
    own_mask = mask_WQT & near(
        positions_BS.reshape(B * W, Q), own_positions_BWT.reshape(B * W, T), window
    ).reshape(B, W, Q, T)

    def blocks(x_BSGH):  # the keys of each block
        return x_BSGH[:, seen_WT].reshape(B * W, T, *x_BSGH.shape[2:])

    def attention(q, k, v, prompt):
        k_prompt, v_prompt = (jnp.repeat(x, W, 0) for x in prompt)
        seen = [
            (k_prompt, v_prompt, prompt_mask),
            (blocks(k), blocks(v), own_mask.reshape(B * W, Q, T)),
        ]
        out = attend(q.reshape(B * W, Q, *q.shape[2:]), seen, decoder.dtype)
        return out.reshape(B, W * Q, -1), None

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
    decoder: Decoder, prefix: Prefix, catalogue: Catalogue, allowed_BY: jax.Array, width: int
) -> tuple[jax.Array, jax.Array]:
    """The `width` titles that beam search finds among those allowed: places and log-probs, [B, C].

    The most likely first; where there are fewer, the place is -1. With `width` at least the number
    of titles no beginning is ever left out, so the result is exact.
    """
    C, A, B = width, catalogue.path_YA.shape[1], len(prefix.mask_BP)
    L, G, H = (prefix.keys_LBPGH.shape[axis] for axis in (0, 3, 4))
    window, length_B = decoder.config.window, prefix.mask_BP.sum(-1)
    place_BP = prompt_positions(prefix.mask_BP)
    open_BX = _open(catalogue, allowed_BY)

    def step(carry):
        t, logp_BC, node_BC, slot_BCA, cache = carry
        now_BC = jnp.broadcast_to((length_B + t)[:, None], (B, C))
        prompt_mask = prefix.mask_BP[:, None] & near(now_BC, place_BP, window)
        # The token of a beam at each earlier step lies in the slot of the beam that it had then.
        own_mask = slot_BCA[..., None] == jnp.arange(C)
        own_mask &= (jnp.arange(A) <= t)[:, None]
        if window is not None:
            own_mask &= (t - jnp.arange(A) < window)[:, None]
        own_mask = own_mask.reshape(B, C, A * C)

        def attention(q, k, v, layer):
            k_prompt, v_prompt, keys, values = layer
            keys, values = (
                jax.lax.dynamic_update_slice_in_dim(old, new[:, None].astype(old.dtype), t, 1)
                for old, new in ((keys, k), (values, v))
            )
            flat = (x.reshape(B, A * C, G, H) for x in (keys, values))
            seen = [(k_prompt, v_prompt, prompt_mask), (*flat, own_mask)]
            return attend(q, seen, decoder.dtype), (keys, values)

        layers = (prefix.keys_LBPGH, prefix.values_LBPGH, *cache)
        tokens_BC = catalogue.token_X[node_BC]
        hidden_BCD, cache = decoder(tokens_BC, now_BC, attention, layers)
        next_logp, next_node = _continue(
            decoder.logits(hidden_BCD), logp_BC, node_BC, catalogue, open_BX
        )
        beams_BCZ = jnp.broadcast_to(jnp.arange(C)[:, None], next_node.shape)
        flat = (x.reshape(B, -1) for x in (next_logp, next_node, beams_BCZ))
        logp_BC, node_BC, parent_BC = _best(C, *flat)
        slot_BCA = jnp.take_along_axis(slot_BCA, parent_BC[..., None], 1)
        slot_BCA = slot_BCA.at[:, :, t + 1].set(jnp.arange(C), mode="drop")
        return t + 1, logp_BC, node_BC, slot_BCA, cache

    def goes_on(carry):
        t, logp_BC, node_BC, _, _ = carry
        inner = (catalogue.leaf_X[node_BC] < 0) & (logp_BC > NEVER / 2)
        return (t < A) & inner.any()

    logp_BC, node_BC = _roots(decoder.logits(prefix.last_BD[:, None])[:, 0], catalogue, open_BX, C)
    slot_BCA = jnp.zeros((B, C, A), jnp.int32).at[:, :, 0].set(jnp.arange(C))
    cache = (jnp.zeros((L, B, A, C, G, H), prefix.keys_LBPGH.dtype),) * 2
    carry = (jnp.int32(0), logp_BC, node_BC, slot_BCA, cache)
    _, logp_BC, node_BC, _, _ = jax.lax.while_loop(goes_on, step, carry)
    title_BC = jnp.where(logp_BC > NEVER / 2, catalogue.leaf_X[node_BC], -1)
    return title_BC, logp_BC


def _best(
    C: int, logp_BZ: jax.Array, node_BZ: jax.Array, parent_BZ: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The C best continuations: log-prob, node, and the beam that each continues, [B, C]."""
    logp_BC, at_BC = jax.lax.top_k(logp_BZ, C)
    node_BC, parent_BC = (jnp.take_along_axis(x, at_BC, 1) for x in (node_BZ, parent_BZ))
    return logp_BC, jnp.where(logp_BC > NEVER / 2, node_BC, 0), parent_BC


def _roots(
    logits_BV: jax.Array, catalogue: Catalogue, open_BX: jax.Array, C: int
) -> tuple[jax.Array, jax.Array]:
    """The C best first tokens of titles: log-prob and node, [B, C]."""
    root_BV = jax.nn.log_softmax(logits_BV)
    roots = catalogue.children[: catalogue.roots]
    logp_BZ = jnp.where(open_BX[:, roots], root_BV[:, catalogue.token_X[roots]], NEVER)
    node_BZ = jnp.broadcast_to(roots, logp_BZ.shape)
    if (missing := C - catalogue.roots) > 0:
        logp_BZ = jnp.pad(logp_BZ, ((0, 0), (0, missing)), constant_values=NEVER)
        node_BZ = jnp.pad(node_BZ, ((0, 0), (0, missing)))
    logp_BC, node_BC, _ = _best(C, logp_BZ, node_BZ, node_BZ)
    return logp_BC, node_BC


def _open(catalogue: Catalogue, allowed_BY: jax.Array) -> jax.Array:
    """[B, X]: the nodes with which an allowed title begins."""
    leaf_X = catalogue.leaf_X
    counted_BX = jnp.where(leaf_X >= 0, allowed_BY[:, jnp.maximum(leaf_X, 0)], False)
    before = jnp.pad(jnp.cumsum(counted_BX, 1, dtype=jnp.int32), ((0, 0), (1, 0)))
    X = leaf_X.shape[0]
    return before[:, catalogue.end_X] > before[:, jnp.arange(X)]


def _continue(logits_BCV, logp_BC, node_BC, catalogue: Catalogue, open_BX):
    """What may follow each beam, [B, C, 1 + degree]: itself where it is a title, else children."""
    first_BC, last_BC = catalogue.first_X[node_BC], catalogue.first_X[node_BC + 1]
    index = first_BC[..., None] + jnp.arange(catalogue.degree)
    child = catalogue.children[jnp.minimum(index, len(catalogue.children) - 1)]
    sums_BC = jax.nn.logsumexp(logits_BCV, -1)
    logit = jnp.take_along_axis(logits_BCV, catalogue.token_X[child], -1)
    open_child = jax.vmap(lambda open_X, child_CZ: open_X[child_CZ])(open_BX, child)
    finished_BC = catalogue.leaf_X[node_BC] >= 0
    live_BC = (logp_BC > NEVER / 2) & ~finished_BC
    there = (index < last_BC[..., None]) & open_child & live_BC[..., None]
    logp = jnp.where(there, logp_BC[..., None] + logit - sums_BC[..., None], NEVER)
    kept = jnp.where(finished_BC, logp_BC, NEVER)
    return (
        jnp.concatenate([kept[..., None], logp], -1),
        jnp.concatenate([node_BC[..., None], child], -1),
    )
