"""Log-probabilities of every answer given its prompt, in two layouts.

An example is a prompt, M places in it where an answer begins, and C answers for each. A batch holds
  prompt_BP          int32, padded on the left, so that the last column is the last prompt token;
  prompt_mask_BP     bool, True on tokens;
  place_BM           int32, the prompt's column that predicts the first token of a target's answers,
                     -1 where an example has fewer targets;
  answers_BMCA       int32, each answer ends in its end token, padded on the right;
  answers_mask_BMCA  bool, True on tokens, the end included;
  packed_BS          int32, indices into the flattened [M*C*A] answers of the tokens that are fed
                     beside the prompt: every token but the last of each answer that is not part of
                     the prompt; -1 where an example has fewer;
  head_BQ            int32, the prompt's columns that predict an answer token, -1 where fewer;
  predictor_BMCA     int32, for each answer token the index of what predicts it: below Q a place of
                     head_BQ, from Q on a place of packed_BS;
  slot_WT            int32, for each place of W rows that hold B/W examples each, the index of its
                     token in the row's flattened [B/W, P+S] grid, -1 where a row has fewer tokens.

The paper's prompt has M = 1, and all of its answers are fed beside it. In a history, each title is
a target: the chosen answers are part of the prompt, so only the rejected ones are fed beside it.

`shared_prefix` computes the prompt once for all its answers: an answer token sees the prompt up to
its target's place and the earlier tokens of its own answer, and its position continues from that
place. A row `[prompt | answers | next prompt | ...]` has real tokens only; attention and the head
see the padded grid `[prompt_BP | packed_BS]`. `padded` feeds M * C full rows per example, as the
official code does, and is the oracle. Both compute logits only where an answer token is predicted,
and an answer's end is a target, never an input.

Letters beside those of `sdpo_jax.system.sharding`: X places of the grid, P + S. Y and Z are
explained where they are used.
"""

import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp

from sdpo_jax.models.attention import attend, attend_causal, block_cuts, near
from sdpo_jax.models.decoder import Decoder

Batch = dict[str, Any]  # arrays of numpy or of JAX
KeyValues = tuple[jax.Array, jax.Array]  # k_BSGH, v_BSGH


def prompt_positions(prompt_mask_BP: jax.Array) -> jax.Array:
    """Positions of left-padded prompt tokens, [B, P]; padding gets 0."""
    return jnp.maximum(jnp.cumsum(prompt_mask_BP, -1) - 1, 0)


@jax.custom_vjp
def _token_logp(logits_BYV: jax.Array, place_BZ: jax.Array, token_BZ: jax.Array) -> jax.Array:
    """Log-probs [B, Z] of tokens, each at its place among Y: logit minus float32 logsumexp.

    The vjp is written by hand, so that only one array of the logits' size is made.
    """
    return _token_logp_forward(logits_BYV, place_BZ, token_BZ)[0]


def _token_logp_forward(logits_BYV, place_BZ, token_BZ):
    sums_BY = jax.nn.logsumexp(logits_BYV, -1)
    logit_BZ = jax.vmap(lambda logits, *index: logits[index])(logits_BYV, place_BZ, token_BZ)
    logp_BZ = logit_BZ - jnp.take_along_axis(sums_BY, place_BZ, 1)
    return logp_BZ, (logits_BYV, sums_BY, place_BZ, token_BZ)


def _token_logp_backward(residuals, g_BZ):
    logits_BYV, sums_BY, place_BZ, token_BZ = residuals

    def one(logits_YV, sums_Y, place_Z, token_Z, g_Z):
        g_Y = jnp.zeros_like(sums_Y).at[place_Z].add(g_Z)
        softmax_YV = jnp.exp(logits_YV - sums_Y[:, None])
        return (-g_Y[:, None] * softmax_YV).at[place_Z, token_Z].add(g_Z)

    return jax.vmap(one)(logits_BYV, sums_BY, place_BZ, token_BZ, g_BZ), None, None


_token_logp.defvjp(_token_logp_forward, _token_logp_backward)


def answers_logp(logits_BYV: jax.Array, predictor_BMCA: jax.Array, batch: Batch) -> jax.Array:
    """Sums token log-probs into `logp_BMC`; `predictor_BMCA`: the place among Y for each token."""
    shape = batch["answers_BMCA"].shape
    place_BZ, token_BZ = (x.reshape(shape[0], -1) for x in (predictor_BMCA, batch["answers_BMCA"]))
    logp_BMCA = _token_logp(logits_BYV, place_BZ, token_BZ).reshape(shape)
    return jnp.where(batch["answers_mask_BMCA"], logp_BMCA, 0.0).sum(-1)


class PackedAnswers:
    """The S answer tokens of an example that are fed beside its prompt, and what they see."""

    def __init__(self, batch: Batch, window: int | None):
        B, _, C, A = batch["answers_BMCA"].shape
        index_BS = jnp.maximum(batch["packed_BS"], 0)
        mask_BP = batch["prompt_mask_BP"]
        positions_BP = prompt_positions(mask_BP)
        self.window, self.longest = window, A
        self.valid_BS = batch["packed_BS"] >= 0
        self.tokens_BS = jnp.take_along_axis(batch["answers_BMCA"].reshape(B, -1), index_BS, 1)
        self.answer_BS = index_BS // A
        place_BS = jnp.take_along_axis(batch["place_BM"], self.answer_BS // C, 1)
        begin_BS = jnp.take_along_axis(positions_BP, jnp.maximum(place_BS, 0), 1)
        self.positions_BS = begin_BS + 1 + index_BS % A
        before_BSP = jnp.arange(mask_BP.shape[1]) <= place_BS[..., None]
        self.prompt_mask_BSP = (
            mask_BP[:, None, :] & before_BSP & near(self.positions_BS, positions_BP, window)
        )

    def own_mask(self, queries: slice, keys: slice) -> jax.Array:
        """[B, queries, keys]: the earlier tokens of the same answer, and the token itself."""
        answer_BS, positions_BS, S = self.answer_BS, self.positions_BS, self.answer_BS.shape[1]
        same = answer_BS[:, queries, None] == answer_BS[:, None, keys]
        earlier = jnp.arange(S)[queries, None] >= jnp.arange(S)[None, keys]
        recent = near(positions_BS[:, queries], positions_BS[:, keys], self.window)
        return same & earlier & recent & self.valid_BS[:, None, keys]

    def attend(self, q_BSNH: jax.Array, prompt: KeyValues, answers: KeyValues, dtype) -> jax.Array:
        """Attention over keys and values of the prompt and of the own answer, [B, S, N*H].

        Queries run in blocks. An answer has at most A - 1 tokens side by side, so a block
        needs only the keys of its own places and of the A - 2 before it.
        """
        k_BSGH, v_BSGH = answers
        out = [jnp.zeros((q_BSNH.shape[0], 0, q_BSNH.shape[2] * q_BSNH.shape[3]), q_BSNH.dtype)]
        for a, b in itertools.pairwise(block_cuts(q_BSNH.shape[1])):
            queries, keys = slice(a, b), slice(max(0, a - self.longest + 2), b)
            own = (k_BSGH[:, keys], v_BSGH[:, keys], self.own_mask(queries, keys))
            seen = [(*prompt, self.prompt_mask_BSP[:, queries]), own]
            out.append(attend(q_BSNH[:, queries], seen, dtype))
        return jnp.concatenate(out, 1)


@jax.custom_vjp
def _pick(x_WX: jax.Array, index_WY: jax.Array, inverse_WX: jax.Array) -> jax.Array:
    """`x_WX[..., index_WY]` row by row, zeros where the index is -1; [W, X, ...] -> [W, Y, ...].

    No place is picked twice, so the gradient is a pick by `inverse_WX`, not a scatter. It is wrong
    unless that is the inverse of `index_WY`.
    """
    index = jnp.expand_dims(index_WY, range(2, x_WX.ndim))
    return jnp.where(index >= 0, jnp.take_along_axis(x_WX, jnp.maximum(index, 0), 1), 0)


def _pick_forward(x_WX, index_WY, inverse_WX):
    return _pick(x_WX, index_WY, inverse_WX), (index_WY, inverse_WX)


def _pick_backward(indices, g_WY):
    index_WY, inverse_WX = indices
    return _pick(g_WY, inverse_WX, index_WY), None, None


_pick.defvjp(_pick_forward, _pick_backward)


def _inverse(index_BY: jax.Array, X: int) -> jax.Array:
    """[B, X]: the place in `index_BY` of each of X numbers, -1 where it is not there."""
    places_BY = jnp.where(index_BY >= 0, index_BY, X)  # out of range: dropped

    def one(places_Y):
        return jnp.full(X, -1).at[places_Y].set(jnp.arange(len(places_Y)), mode="drop")

    return jax.vmap(one)(places_BY)


class Rows:
    """Moves values between rows of real tokens [W, T, ...] and the padded grid [B, P+S, ...].

    X: places of an example in the grid; Y: places of all examples of a row.
    """

    def __init__(self, slot_WT: jax.Array, valid_BX: jax.Array):
        valid_WY = valid_BX.reshape(slot_WT.shape[0], -1)
        self.slot_WT = slot_WT
        self.place_WY = jnp.where(valid_WY, jnp.cumsum(valid_WY, -1) - 1, -1)
        self.grid = valid_BX.shape

    def pack(self, x_BX: jax.Array) -> jax.Array:
        x_WY = x_BX.reshape(*self.place_WY.shape, *x_BX.shape[2:])
        return _pick(x_WY, self.slot_WT, self.place_WY)

    def unpack(self, x_WT: jax.Array) -> jax.Array:
        x_WY = _pick(x_WT, self.place_WY, self.slot_WT)
        return x_WY.reshape(*self.grid, *x_WT.shape[2:])


def shared_prefix_logp(decoder: Decoder, batch: Batch, dropout_keys_W=None) -> jax.Array:
    """Sequence log-probs `logp_BMC` in nats, each prompt computed once; 0 where no target is.

    `dropout_keys_W`: one key per row of `slot_WT`, or None for no dropout.
    """
    window = decoder.config.window
    packed = PackedAnswers(batch, window)
    mask_BP, head_BQ = batch["prompt_mask_BP"], batch["head_BQ"]
    P = mask_BP.shape[1]
    rows = Rows(batch["slot_WT"], jnp.concatenate([mask_BP, packed.valid_BS], 1))

    def attention(q, k, v, _):  # rows -> grid -> rows; there is no cache
        q, k, v = rows.unpack(q), rows.unpack(k), rows.unpack(v)
        prompt = attend_causal(
            q[:, :P], k[:, :P], v[:, :P], mask_BP, decoder.dtype, window, decoder.fused
        )
        answers = packed.attend(q[:, P:], (k[:, :P], v[:, :P]), (k[:, P:], v[:, P:]), decoder.dtype)
        return rows.pack(jnp.concatenate([prompt, answers], 1)), None

    tokens_WT = rows.pack(jnp.concatenate([batch["prompt_BP"], packed.tokens_BS], 1))
    positions_WT = rows.pack(jnp.concatenate([prompt_positions(mask_BP), packed.positions_BS], 1))
    hidden_WTD, _ = decoder(tokens_WT, positions_WT, attention, None, dropout_keys_W)
    hidden_BXD = rows.unpack(hidden_WTD)
    head_BQD = _pick(hidden_BXD[:, :P], head_BQ, _inverse(head_BQ, P))
    logits_BYV = decoder.logits(jnp.concatenate([head_BQD, hidden_BXD[:, P:]], 1))
    return answers_logp(logits_BYV, batch["predictor_BMCA"], batch)


def prompts_apart(batch: Batch) -> tuple[jax.Array, jax.Array]:
    """The prompt of each target alone, up to its place: tokens and mask, [B, M, P]."""
    place_BM, P = batch["place_BM"], batch["prompt_BP"].shape[1]
    from_BMP = jnp.arange(P) - (P - 1 - place_BM[..., None])  # the place becomes the last column
    index_BMP = jnp.maximum(from_BMP, 0)

    def moved(x_BP):
        return jnp.take_along_axis(x_BP[:, None], index_BMP, 2)

    there_BMP = (from_BMP >= 0) & (place_BM >= 0)[..., None]
    return moved(batch["prompt_BP"]), moved(batch["prompt_mask_BP"]) & there_BMP


def padded_hidden(decoder: Decoder, batch: Batch, dropout_keys_W=None):
    """M*C full rows per example, Z = B*M*C: their hidden states, and the answers with their mask.

    Returns hidden_ZTD, answers_ZA, answers_mask_ZA; the last A of T = P+A-1 places predict the
    answer's tokens.
    """
    B, M, C, A = batch["answers_BMCA"].shape
    prompt_ZP, mask_ZP = (jnp.repeat(x.reshape(B * M, -1), C, 0) for x in prompts_apart(batch))
    answers_ZA = batch["answers_BMCA"].reshape(-1, A)
    answers_mask_ZA = batch["answers_mask_BMCA"].reshape(-1, A)
    tokens_ZT = jnp.concatenate([prompt_ZP, answers_ZA[:, :-1]], 1)
    mask_ZT = jnp.concatenate([mask_ZP, answers_mask_ZA[:, 1:]], 1)

    def attention(q, k, v, _):
        return attend_causal(q, k, v, mask_ZT, decoder.dtype, decoder.config.window), None

    if dropout_keys_W is not None:
        split = functools.partial(jax.random.split, num=B * M * C // len(dropout_keys_W))
        dropout_keys_W = jax.vmap(split)(dropout_keys_W).reshape(-1)
    hidden_ZTD, _ = decoder(tokens_ZT, prompt_positions(mask_ZT), attention, None, dropout_keys_W)
    return hidden_ZTD, answers_ZA, answers_mask_ZA


def padded_logp(decoder: Decoder, batch: Batch, dropout_keys_W=None) -> jax.Array:
    """The same `logp_BMC` from full rows: M * C times the prompt's work, and the oracle."""
    hidden_ZTD, answers_ZA, answers_mask_ZA = padded_hidden(decoder, batch, dropout_keys_W)
    A = answers_ZA.shape[1]
    place_ZA = jnp.broadcast_to(jnp.arange(A), answers_ZA.shape)
    logp_ZA = _token_logp(decoder.logits(hidden_ZTD[:, -A:]), place_ZA, answers_ZA)
    logp_ZA = jnp.where(answers_mask_ZA, logp_ZA, 0.0)
    return logp_ZA.sum(-1).reshape(batch["answers_BMCA"].shape[:3])


LAYOUTS = {"shared_prefix": shared_prefix_logp, "padded": padded_logp}
