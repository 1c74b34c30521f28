"""Beam search over the titles of a catalogue, after a prefilled prompt.

No length is normalized: a title's score is the log-probability of its tokens, end included. Letters
beside those of `sdpo_jax.system.sharding`: X nodes of the trie, Y titles, Z continuations; beams
are candidates, C, and Q of them are computed at once.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from sdpo_jax.evaluation.catalogue import NEVER, Catalogue
from sdpo_jax.evaluation.decode import Prefix
from sdpo_jax.models.attention import attend, near
from sdpo_jax.models.decoder import Decoder
from sdpo_jax.objectives.logprobs import prompt_positions

CPU_ROWS = 32  # beams of all prompts that a CPU computes at once


def beams_at_once(batch_size: int, width: int, platform: str) -> int:
    """How many beams of a prompt are computed together.

    Most beams are whole titles after a few steps. A CPU gains by leaving those out, in parts that
    are large enough to be products; other devices compute all beams in the time of one.
    """
    return min(width, max(1, CPU_ROWS // batch_size)) if platform == "cpu" else width


def beam_search(
    decoder: Decoder,
    prefix: Prefix,
    catalogue: Catalogue,
    allowed_BY: jax.Array,
    width: int,
    at_once: int = 0,
    needed: jax.Array | int | None = None,
) -> tuple[jax.Array, jax.Array]:
    """The `width` titles that beam search finds among those allowed: places and log-probs, [B, C].

    The most likely first; where there are fewer, the place is -1. With `width` at least the number
    of titles no beginning is ever left out, so the result is exact.

    Args:
      decoder: the model.
      prefix: of `decode.prefill`.
      catalogue: the titles.
      allowed_BY: which of them may be found.
      width: C.
      at_once: Q, see `beams_at_once`; 0: all.
      needed: how many of the best are asked for; None: all. The search gives up beams that cannot
        be among them and ends when they are titles. What comes after them may be no title: -1.
    """
    C, A, B = width, catalogue.path_YA.shape[1], len(prefix.mask_BP)
    L, G, H = (prefix.keys_LBPGH.shape[axis] for axis in (0, 3, 4))
    open_BX = _open(catalogue, allowed_BY)
    live = functools.partial(_live, catalogue, C if needed is None else needed)
    step = functools.partial(_step, decoder, prefix, catalogue, open_BX, at_once or C, live)

    def goes_on(carry):
        t, logp_BC, node_BC, _, _ = carry
        return (t < A) & live(logp_BC, node_BC).any()

    logp_BC, node_BC = _roots(decoder.logits(prefix.last_BD[:, None])[:, 0], catalogue, open_BX, C)
    slot_BCA = jnp.zeros((B, C, A), jnp.int32).at[:, :, 0].set(jnp.arange(C))
    cache = (jnp.zeros((L, B, A, C, G, H), prefix.keys_LBPGH.dtype),) * 2
    carry = (jnp.int32(0), logp_BC, node_BC, slot_BCA, cache)
    _, logp_BC, node_BC, _, _ = jax.lax.while_loop(goes_on, step, carry)
    title_BC = jnp.where(logp_BC > NEVER / 2, catalogue.leaf_X[node_BC], -1)
    return title_BC, logp_BC


def _live(catalogue: Catalogue, needed, logp_BC: jax.Array, node_BC: jax.Array) -> jax.Array:
    """[B, C]: beams that are no titles yet and may still be among the `needed` best.

    Beams are in order and a log-prob only falls, so one that has as many titles before it never is.
    """
    title_BC = catalogue.leaf_X[node_BC] >= 0
    before_BC = jnp.cumsum(title_BC, -1)
    return ~title_BC & (logp_BC > NEVER / 2) & (before_BC < needed)


def _step(
    decoder: Decoder,
    prefix: Prefix,
    catalogue: Catalogue,
    open_BX: jax.Array,
    Q: int,
    live: Callable[[jax.Array, jax.Array], jax.Array],
    carry,
):
    """One token more for the beams that are `live`, Q of each prompt at once."""
    t, logp_BC, node_BC, slot_BCA, cache = carry
    (B, C), degree = node_BC.shape, 1 + catalogue.degree
    live_BC = live(logp_BC, node_BC)
    order_BC = jnp.argsort(~live_BC, -1, stable=True)  # live beams first
    kept_BC = jnp.where(live_BC, NEVER, logp_BC)  # a title stays what it is, as one given up does
    next_logp = jnp.full((B, C, degree), NEVER).at[:, :, 0].set(kept_BC)
    next_node = jnp.zeros((B, C, degree), jnp.int32).at[:, :, 0].set(node_BC)

    def part(carry):
        i, next_logp, next_node, cache = carry
        beam_BQ = jax.lax.dynamic_slice_in_dim(order_BC, i * Q, Q, 1)
        node_BQ, logp_BQ = (jnp.take_along_axis(x, beam_BQ, 1) for x in (node_BC, logp_BC))
        slot_BQA = jnp.take_along_axis(slot_BCA, beam_BQ[..., None], 1)
        logits_BQV, new = _forward(decoder, prefix, catalogue, t, node_BQ, slot_BQA, cache, C)
        prompts_B1 = jnp.arange(B)[:, None]
        cache = tuple(
            old.at[:, prompts_B1, t, beam_BQ].set(x.astype(old.dtype))
            for old, x in zip(cache, new, strict=True)
        )
        logp, node = _continue(logits_BQV, logp_BQ, node_BQ, catalogue, open_BX)
        next_logp = next_logp.at[prompts_B1, beam_BQ, 1:].set(logp)
        next_node = next_node.at[prompts_B1, beam_BQ, 1:].set(node)
        return i + 1, next_logp, next_node, cache

    most = live_BC.sum(-1).max()
    carry = (jnp.int32(0), next_logp, next_node, cache)
    _, next_logp, next_node, cache = jax.lax.while_loop(
        lambda carry: carry[0] * Q < most, part, carry
    )
    beams_BCZ = jnp.broadcast_to(jnp.arange(C)[:, None], next_node.shape)
    flat = (x.reshape(B, -1) for x in (next_logp, next_node, beams_BCZ))
    logp_BC, node_BC, parent_BC = _best(C, *flat)
    slot_BCA = jnp.take_along_axis(slot_BCA, parent_BC[..., None], 1)
    slot_BCA = slot_BCA.at[:, :, t + 1].set(jnp.arange(C), mode="drop")
    return t + 1, logp_BC, node_BC, slot_BCA, cache


def _forward(
    decoder: Decoder, prefix: Prefix, catalogue: Catalogue, t, node_BQ, slot_BQA, cache, C
):
    """Logits [B, Q, V] after beams' latest tokens, and those tokens' keys and values.

    `slot_BQA`: the place among C in which each beam's token of an earlier step was computed.
    """
    A, window = slot_BQA.shape[2], decoder.config.window
    B, Q = node_BQ.shape
    now_BQ = jnp.broadcast_to((prefix.mask_BP.sum(-1) + t)[:, None], (B, Q))
    place_BP = prompt_positions(prefix.mask_BP)
    prompt_mask = prefix.mask_BP[:, None] & near(now_BQ, place_BP, window)
    own_mask = slot_BQA[..., None] == jnp.arange(C)
    own_mask &= (jnp.arange(A) < t)[:, None]
    if window is not None:
        own_mask &= (t - jnp.arange(A) < window)[:, None]
    own_mask = own_mask.reshape(B, Q, A * C)
    itself = jnp.broadcast_to(jnp.eye(Q, dtype=bool), (B, Q, Q))

    def attention(q, k, v, layer):
        k_prompt, v_prompt, keys, values = layer
        flat: Any = (x.reshape(B, A * C, *x.shape[3:]) for x in (keys, values))
        seen = [(k_prompt, v_prompt, prompt_mask), (*flat, own_mask), (k, v, itself)]
        return attend(q, seen, decoder.dtype), (k, v)

    layers = (prefix.keys_LBPGH, prefix.values_LBPGH, *cache)
    hidden_BQD, new = decoder(catalogue.token_X[node_BQ], now_BQ, attention, layers)
    return decoder.logits(hidden_BQD), new


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


def _continue(logits_BQV, logp_BQ, node_BQ, catalogue: Catalogue, open_BX):
    """The children that may follow each beam: log-prob and node, [B, Q, degree]."""
    first_BQ, last_BQ = catalogue.first_X[node_BQ], catalogue.first_X[node_BQ + 1]
    index = first_BQ[..., None] + jnp.arange(catalogue.degree)
    child = catalogue.children[jnp.minimum(index, len(catalogue.children) - 1)]
    sums_BQ = jax.nn.logsumexp(logits_BQV, -1)
    logit = jnp.take_along_axis(logits_BQV, catalogue.token_X[child], -1)
    open_child = jax.vmap(lambda open_X, child_QZ: open_X[child_QZ])(open_BX, child)
    live_BQ = (logp_BQ > NEVER / 2) & (catalogue.leaf_X[node_BQ] < 0)
    there = (index < last_BQ[..., None]) & open_child & live_BQ[..., None]
    logp = jnp.where(there, logp_BQ[..., None] + logit - sums_BQ[..., None], NEVER)
    return logp, child
