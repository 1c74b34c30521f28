"""The log-probability of every title of a catalogue after a prefilled prompt.

It reads a prefix of `sdpo_jax.evaluation.decode` and the titles' trie. No length is normalized: a
title's score is the log-probability of its tokens, end included. Letters beside those of
`sdpo_jax.system.sharding`: X nodes, Y titles, Z pieces, as in `title_trie`.
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
        "forced_X",
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
    forced_X: jax.Array
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
