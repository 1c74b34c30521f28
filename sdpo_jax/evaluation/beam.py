"""Beam search over the titles of a catalogue, after a prefilled prompt.

No length is normalized: a title's score is the log-probability of its tokens, end included. Letters
beside those of `sdpo_jax.system.sharding`: X nodes of the trie, Y titles, Z continuations. Beams
are candidates, C. Q nodes of each prompt are computed in one pass, and kept in S places.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from sdpo_jax.evaluation.catalogue import NEVER, Catalogue
from sdpo_jax.evaluation.decode import Prefix
from sdpo_jax.models.attention import attend, near
from sdpo_jax.models.decoder import Decoder
from sdpo_jax.objectives.logprobs import prompt_positions

MOST_NODES = 32  # of a prompt in one pass, each of which has logits of the whole vocabulary


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Beams:
    """Nodes and their log-probs, [B, C], the most likely first."""

    logp_BC: jax.Array
    node_BC: jax.Array

    def unfinished(self, catalogue: Catalogue) -> jax.Array:
        """[B, C]: those that are no titles yet."""
        return (catalogue.leaf_X[self.node_BC] < 0) & (self.logp_BC > NEVER / 2)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Computed:
    """The nodes that the model has computed.

    Attributes:
      passes: how many passes computed them.
      place_BX: where a node is kept, -1 before it is computed.
      node_BS: the nodes kept; a free place holds X, the number of nodes.
      keys_LBGSH, values_LBGSH: of their tokens.
      logp_BSZ, child_BSZ: their most likely continuations, given the node.
    """

    passes: jax.Array
    place_BX: jax.Array
    node_BS: jax.Array
    keys_LBGSH: jax.Array
    values_LBGSH: jax.Array
    logp_BSZ: jax.Array
    child_BSZ: jax.Array


def beam_search(
    decoder: Decoder,
    prefix: Prefix,
    catalogue: Catalogue,
    allowed_BY: jax.Array,
    width: int,
    needed: jax.Array | int | None = None,
) -> tuple[jax.Array, jax.Array]:
    """The `width` titles that beam search finds among those allowed: places and log-probs, [B, C].

    The most likely first; where there are fewer, the place is -1. With `width` at least the number
    of titles no beginning is ever left out, so the result is exact.

    The beams are those of a search token by token. Where a pass has room, tokens that must follow a
    node are computed with it (jump-forward decoding: Zheng et al. 2024, arXiv 2312.07104, section
    4), so they need no pass of their own.

    Args:
      decoder: the model.
      prefix: of `decode.prefill`.
      catalogue: the titles.
      allowed_BY: which of them may be found.
      width: C.
      needed: how many of the best are asked for; None: all. The search ends when they are titles.
        What comes after them may be no title: -1.
    """
    Q, needed = min(width, MOST_NODES), width if needed is None else needed
    open_BX = _open(catalogue, allowed_BY)
    root_BV = decoder.logits(prefix.last_BD[:, None])[:, 0]
    beams = _roots(root_BV, catalogue, open_BX, width)

    def goes_on(beams: Beams) -> jax.Array:
        """[B]: a log-prob only falls, so titles that come first remain so."""
        unfinished_BC = beams.unfinished(catalogue)
        before_BC = jnp.cumsum(catalogue.leaf_X[beams.node_BC] >= 0, -1)
        return (unfinished_BC & (before_BC < needed)).any(-1)

    def compute_and_search(carry):
        beams, computed = carry
        node_BQ = _needed_next(catalogue, beams, computed, goes_on(beams), Q)
        computed = _compute(decoder, prefix, catalogue, open_BX, node_BQ, computed)
        beams = jax.lax.while_loop(
            lambda beams: (goes_on(beams) & _ready(catalogue, beams, computed)).any(),
            lambda beams: _step(catalogue, beams, computed, goes_on(beams)),
            beams,
        )
        return beams, computed

    beams, _ = jax.lax.while_loop(
        lambda carry: goes_on(carry[0]).any(),
        compute_and_search,
        (beams, _nothing(prefix, catalogue, width, Q)),
    )
    found_BC = jnp.where(beams.logp_BC > NEVER / 2, catalogue.leaf_X[beams.node_BC], -1)
    return found_BC, beams.logp_BC


def _nothing(prefix: Prefix, catalogue: Catalogue, C: int, Q: int) -> Computed:
    """Room for all that a search may compute: C nodes for each inner one of the longest title."""
    L, B, _, G, H = prefix.keys_LBPGH.shape
    X, Z = len(catalogue.token_X), min(C, catalogue.degree)
    S = Q * -(-C // Q) * max(1, catalogue.path_YA.shape[1] - 1)
    cache = jnp.zeros((L, B, G, S, H), prefix.keys_LBPGH.dtype)
    return Computed(
        passes=jnp.int32(0),
        place_BX=jnp.full((B, X), -1, jnp.int32),
        node_BS=jnp.full((B, S), X, jnp.int32),
        keys_LBGSH=cache,
        values_LBGSH=cache,
        logp_BSZ=jnp.zeros((B, S, Z)),
        child_BSZ=jnp.zeros((B, S, Z), jnp.int32),
    )


def _places(beams: Beams, computed: Computed) -> jax.Array:
    """[B, C]: where the beams' nodes are kept, -1 where they are not computed."""
    return jnp.take_along_axis(computed.place_BX, beams.node_BC, 1)


def _ready(catalogue: Catalogue, beams: Beams, computed: Computed) -> jax.Array:
    """[B]: every beam that is no title yet is computed."""
    return (~beams.unfinished(catalogue) | (_places(beams, computed) >= 0)).all(-1)


def _needed_next(
    catalogue: Catalogue, beams: Beams, computed: Computed, goes_on_B: jax.Array, Q: int
) -> jax.Array:
    """The nodes of the next pass, [B, Q]; X where there are fewer.

    Those of beams come first, then the nodes that must follow them, one token further each time.
    """
    X, A = len(catalogue.token_X), catalogue.path_YA.shape[1]
    further_A1 = jnp.arange(A)[:, None]
    node_BAC = beams.node_BC[:, None] + further_A1  # in preorder, an only child comes next
    known_BAC = further_A1 <= catalogue.forced_X[beams.node_BC][:, None]
    node_BT = jnp.where(known_BAC, node_BAC, 0).reshape(len(goes_on_B), -1)
    wanted_BAC = known_BAC & beams.unfinished(catalogue)[:, None] & goes_on_B[:, None, None]
    wanted_BT = wanted_BAC.reshape(node_BT.shape)
    wanted_BT &= jnp.take_along_axis(computed.place_BX, node_BT, 1) < 0
    first_BQ = jnp.argsort(~wanted_BT, -1, stable=True)[:, :Q]
    return jnp.take_along_axis(jnp.where(wanted_BT, node_BT, X), first_BQ, 1)


def _compute(
    decoder: Decoder,
    prefix: Prefix,
    catalogue: Catalogue,
    open_BX: jax.Array,
    node_BQ: jax.Array,
    computed: Computed,
) -> Computed:
    """One pass of the model over the nodes, and what is kept of it."""
    logits_BQV, (keys, values) = _forward(decoder, prefix, catalogue, node_BQ, computed)
    Q = node_BQ.shape[1]
    start = computed.passes * Q
    place_Q = start + jnp.arange(Q)

    def put(kept: jax.Array, new: jax.Array, axis: int) -> jax.Array:
        return jax.lax.dynamic_update_slice_in_dim(kept, new.astype(kept.dtype), start, axis)

    Z = computed.logp_BSZ.shape[-1]
    logp_BQZ, child_BQZ = _continue(logits_BQV, node_BQ, catalogue, open_BX, Z)
    place = jax.vmap(lambda place_X, node_Q: place_X.at[node_Q].set(place_Q, mode="drop"))
    return Computed(
        passes=computed.passes + 1,
        place_BX=place(computed.place_BX, node_BQ),
        node_BS=put(computed.node_BS, node_BQ, 1),
        keys_LBGSH=put(computed.keys_LBGSH, keys.swapaxes(2, 3), 3),
        values_LBGSH=put(computed.values_LBGSH, values.swapaxes(2, 3), 3),
        logp_BSZ=put(computed.logp_BSZ, logp_BQZ, 1),
        child_BSZ=put(computed.child_BSZ, child_BQZ, 1),
    )


def _forward(
    decoder: Decoder, prefix: Prefix, catalogue: Catalogue, node_BQ: jax.Array, computed: Computed
):
    """Logits [B, Q, V] after the nodes' tokens, and those tokens' keys and values.

    A node sees the prompt, its ancestors and itself. Of a free place anything may come out.
    """
    X, window = len(catalogue.token_X), decoder.config.window
    length_B1 = prefix.mask_BP.sum(-1, keepdims=True)

    def position(node_BZ: jax.Array) -> jax.Array:
        """Small at free places, as RoPE may depend on the largest position."""
        depth_BZ = jnp.where(node_BZ < X, catalogue.depth_X[jnp.minimum(node_BZ, X - 1)], 1)
        return length_B1 + depth_BZ - 1

    now_BQ = position(node_BQ)

    def sees(node_BZ: jax.Array) -> jax.Array:
        """[B, Q, Z]: in preorder, a node's descendants follow it without a gap."""
        end_BZ = catalogue.end_X[jnp.minimum(node_BZ, X - 1)]
        within = (node_BZ[:, None] <= node_BQ[..., None]) & (node_BQ[..., None] < end_BZ[:, None])
        return within & near(now_BQ, position(node_BZ), window)

    prompt_mask = prefix.mask_BP[:, None] & near(now_BQ, prompt_positions(prefix.mask_BP), window)
    kept_mask, own_mask = sees(computed.node_BS), sees(node_BQ)

    def attention(q, k, v, layer):
        k_prompt, v_prompt, keys_BGSH, values_BGSH = layer
        kept = (keys_BGSH.swapaxes(1, 2), values_BGSH.swapaxes(1, 2), kept_mask)
        seen = [(k_prompt, v_prompt, prompt_mask), kept, (k, v, own_mask)]
        return attend(q, seen, decoder.dtype), (k, v)

    layers = (prefix.keys_LBPGH, prefix.values_LBPGH, computed.keys_LBGSH, computed.values_LBGSH)
    token_BQ = catalogue.token_X[jnp.minimum(node_BQ, X - 1)]
    hidden_BQD, new = decoder(token_BQ, now_BQ, attention, layers)
    return decoder.logits(hidden_BQD), new


def _continue(
    logits_BQV: jax.Array, node_BQ: jax.Array, catalogue: Catalogue, open_BX: jax.Array, Z: int
) -> tuple[jax.Array, jax.Array]:
    """The Z most likely children that may follow each node: log-prob and node, [B, Q, Z]."""
    node_BQ = jnp.minimum(node_BQ, len(catalogue.token_X) - 1)
    first_BQ, last_BQ = catalogue.first_X[node_BQ], catalogue.first_X[node_BQ + 1]
    index = first_BQ[..., None] + jnp.arange(catalogue.degree)
    child = catalogue.children[jnp.minimum(index, len(catalogue.children) - 1)]
    sums_BQ = jax.nn.logsumexp(logits_BQV, -1)
    logit = jnp.take_along_axis(logits_BQV, catalogue.token_X[child], -1)
    open_child = jax.vmap(lambda open_X, child_QZ: open_X[child_QZ])(open_BX, child)
    there = (index < last_BQ[..., None]) & open_child
    logp_BQZ, at_BQZ = jax.lax.top_k(jnp.where(there, logit - sums_BQ[..., None], NEVER), Z)
    return logp_BQZ, jnp.take_along_axis(child, at_BQZ, -1)


def _step(catalogue: Catalogue, beams: Beams, computed: Computed, goes_on_B: jax.Array) -> Beams:
    """One token more for the beams of prompts that go on and are ready."""
    C = beams.node_BC.shape[1]
    unfinished_BC, place_BC = beams.unfinished(catalogue), _places(beams, computed)
    of_place = functools.partial(jnp.take_along_axis, indices=place_BC[..., None], axis=1)
    logp_BCZ = beams.logp_BC[..., None] + of_place(computed.logp_BSZ)
    logp_BCZ = jnp.where(unfinished_BC[..., None], logp_BCZ, NEVER)
    kept_BC = jnp.where(unfinished_BC, NEVER, beams.logp_BC)  # a title stays what it is
    logp = jnp.concatenate([kept_BC[..., None], logp_BCZ], -1)
    node = jnp.concatenate([beams.node_BC[..., None], of_place(computed.child_BSZ)], -1)
    best = _best(C, *(x.reshape(len(goes_on_B), -1) for x in (logp, node)))
    moves_B1 = (goes_on_B & _ready(catalogue, beams, computed))[:, None]
    return jax.tree.map(lambda new, old: jnp.where(moves_B1, new, old), best, beams)


def _best(C: int, logp_BZ: jax.Array, node_BZ: jax.Array) -> Beams:
    """The C best of these nodes."""
    logp_BC, at_BC = jax.lax.top_k(logp_BZ, C)
    node_BC = jnp.take_along_axis(node_BZ, at_BC, 1)
    return Beams(logp_BC, jnp.where(logp_BC > NEVER / 2, node_BC, 0))


def _roots(logits_BV: jax.Array, catalogue: Catalogue, open_BX: jax.Array, C: int) -> Beams:
    """The C best first tokens of titles."""
    root_BV = jax.nn.log_softmax(logits_BV)
    roots = catalogue.children[: catalogue.roots]
    logp_BZ = jnp.where(open_BX[:, roots], root_BV[:, catalogue.token_X[roots]], NEVER)
    node_BZ = jnp.broadcast_to(roots, logp_BZ.shape)
    if (missing := C - catalogue.roots) > 0:
        logp_BZ = jnp.pad(logp_BZ, ((0, 0), (0, missing)), constant_values=NEVER)
        node_BZ = jnp.pad(node_BZ, ((0, 0), (0, missing)))
    return _best(C, logp_BZ, node_BZ)


def _open(catalogue: Catalogue, allowed_BY: jax.Array) -> jax.Array:
    """[B, X]: the nodes with which an allowed title begins."""
    leaf_X = catalogue.leaf_X
    counted_BX = jnp.where(leaf_X >= 0, allowed_BY[:, jnp.maximum(leaf_X, 0)], False)
    before = jnp.pad(jnp.cumsum(counted_BX, 1, dtype=jnp.int32), ((0, 0), (1, 0)))
    X = leaf_X.shape[0]
    return before[:, catalogue.end_X] > before[:, jnp.arange(X)]
