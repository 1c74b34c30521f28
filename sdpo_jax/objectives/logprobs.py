"""Log-probabilities of every candidate answer given its prompt, in two layouts.

A batch holds
  prompt_BP        int32, padded on the left, so that the last column is the last prompt token;
  prompt_mask_BP   bool, True on tokens;
  answers_BCA      int32, each answer ends in EOS, padded on the right;
  answers_mask_BCA bool, True on tokens, EOS included;
  packed_BS        int32, indices into the flattened [C*A] answers of the tokens that are fed to
                   the decoder (every answer token but its last), -1 where an example has fewer;
  slot_RT          int32, for each place of R rows that hold B/R examples each, the index of its
                   token in the row's flattened [B/R, P+S] grid, -1 where a row has fewer tokens.

`shared_prefix` computes the prompt once for all its answers: an answer token sees the prompt and
the earlier tokens of its own answer, and positions of every answer restart at the prompt's length.
A row `[prompt | answer_0 | ... | answer_K | next prompt | ...]` holds real tokens alone; only
attention and the head see the padded grid `[prompt_BP | packed_BS]`. `padded` feeds C full rows a
prompt, as the official code does; it is the oracle. Both put the head on positions that predict an
answer token and on no other: the last prompt token predicts the first token of all C answers, and
EOS is a target, never an input.
"""

import functools

import jax
import jax.numpy as jnp

from sdpo_jax.models.attention import attend, attend_causal, causal_mask, near
from sdpo_jax.models.decoder import Decoder

Batch = dict[str, jax.Array]
Keys = tuple[jax.Array, jax.Array]  # k_BSGH, v_BSGH


def prompt_positions(prompt_mask_BP: jax.Array) -> jax.Array:
    """Positions of left-padded prompt tokens, [B, P]; padding gets 0."""
    return jnp.maximum(jnp.cumsum(prompt_mask_BP, -1) - 1, 0)


@jax.custom_vjp
def _token_logp(logits_BYV: jax.Array, place_BZ: jax.Array, token_BZ: jax.Array) -> jax.Array:
    """Log-probs [B, Z] of tokens, each at its place among Y: logit minus float32 logsumexp.

    The vjp is written by hand so that one array of the logits' size is made, and no more.
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


class PackedAnswers:
    """The S packed answer tokens of an example: what is fed, what it predicts, what it sees."""

    def __init__(self, batch: Batch, window: int | None):
        answers_BCA = batch["answers_BCA"]
        B, C, A = answers_BCA.shape
        flat_BX = answers_BCA.reshape(B, C * A)
        index_BS = jnp.maximum(batch["packed_BS"], 0)
        self.valid_BS = batch["packed_BS"] >= 0
        self.tokens_BS = jnp.take_along_axis(flat_BX, index_BS, 1)
        self.targets_BS = jnp.take_along_axis(flat_BX, jnp.minimum(index_BS + 1, C * A - 1), 1)
        self.candidate_BS = index_BS // A
        mask_BP = batch["prompt_mask_BP"]
        self.positions_BS = mask_BP.sum(-1, keepdims=True) + index_BS % A
        self.prompt_mask_BSP = mask_BP[:, None, :] & near(
            self.positions_BS, prompt_positions(mask_BP), window
        )
        same_BSS = self.candidate_BS[:, :, None] == self.candidate_BS[:, None, :]
        recent_BSS = near(self.positions_BS, self.positions_BS, window)
        self.mask_BSS = causal_mask(self.valid_BS) & same_BSS & recent_BSS

    def attend(self, q_BSNH: jax.Array, prompt: Keys, answers: Keys, dtype) -> jax.Array:
        """Attention of the answer tokens over keys and values of their prompt and of their own."""
        blocks = [(*prompt, self.prompt_mask_BSP), (*answers, self.mask_BSS)]
        return attend(q_BSNH, blocks, dtype)

    def logp(self, decoder: Decoder, last_BD: jax.Array, hidden_BSD: jax.Array, batch: Batch):
        """Sums token log-probs into `logp_BC`; `last_BD`: hidden state of the last prompt token."""
        first_BC = batch["answers_BCA"][:, :, 0]
        C, S = first_BC.shape[1], hidden_BSD.shape[1]
        logits_BYV = decoder.logits(jnp.concatenate([last_BD[:, None], hidden_BSD], 1))
        # The last prompt token predicts the first token of all C answers.
        place_Z = jnp.concatenate([jnp.zeros(C, jnp.int32), 1 + jnp.arange(S)])
        tokens_BZ = jnp.concatenate([first_BC, self.targets_BS], 1)
        logp_BZ = _token_logp(logits_BYV, jnp.broadcast_to(place_Z, tokens_BZ.shape), tokens_BZ)
        rest_BS = jnp.where(self.valid_BS, logp_BZ[:, C:], 0.0)
        # A sum, not a product with a one-hot: accelerators round the operands of products.
        owned_BSC = self.candidate_BS[..., None] == jnp.arange(C)
        return logp_BZ[:, :C] + jnp.where(owned_BSC, rest_BS[..., None], 0.0).sum(1)


@jax.custom_vjp
def _pick(x_RX: jax.Array, index_RY: jax.Array, inverse_RX: jax.Array) -> jax.Array:
    """`x_RX[..., index_RY]` row by row, zeros where the index is -1; [R, X, ...] -> [R, Y, ...].

    No place is picked twice, so the transpose is a pick by the inverse index, not a scatter.
    """
    index = jnp.expand_dims(index_RY, range(2, x_RX.ndim))
    return jnp.where(index >= 0, jnp.take_along_axis(x_RX, jnp.maximum(index, 0), 1), 0)


def _pick_forward(x_RX, index_RY, inverse_RX):
    return _pick(x_RX, index_RY, inverse_RX), (index_RY, inverse_RX)


def _pick_backward(indices, g_RY):
    index_RY, inverse_RX = indices
    return _pick(g_RY, inverse_RX, index_RY), None, None


_pick.defvjp(_pick_forward, _pick_backward)


class Rows:
    """Moves values between rows of real tokens [R, T, ...] and the padded grid [B, P+S, ...]."""

    def __init__(self, slot_RT: jax.Array, valid_BX: jax.Array):
        valid_RX = valid_BX.reshape(slot_RT.shape[0], -1)
        self.slot_RT = slot_RT
        self.place_RX = jnp.where(valid_RX, jnp.cumsum(valid_RX, -1) - 1, -1)
        self.grid = valid_BX.shape

    def pack(self, x_BX: jax.Array) -> jax.Array:
        x_RX = x_BX.reshape(*self.place_RX.shape, *x_BX.shape[2:])
        return _pick(x_RX, self.slot_RT, self.place_RX)

    def spread(self, x_RT: jax.Array) -> jax.Array:
        x_RX = _pick(x_RT, self.place_RX, self.slot_RT)
        return x_RX.reshape(*self.grid, *x_RT.shape[2:])


def shared_prefix_logp(decoder: Decoder, batch: Batch, dropout_keys_R=None) -> jax.Array:
    """Sequence log-probs `logp_BC` in nats, each prompt computed once.

    `dropout_keys_R`: one key a row of `slot_RT`, or None for no dropout.
    """
    window = decoder.config.window
    packed = PackedAnswers(batch, window)
    mask_BP = batch["prompt_mask_BP"]
    P = mask_BP.shape[1]
    rows = Rows(batch["slot_RT"], jnp.concatenate([mask_BP, packed.valid_BS], 1))

    def attention(q, k, v, cache):
        q, k, v = rows.spread(q), rows.spread(k), rows.spread(v)
        prompt = attend_causal(q[:, :P], k[:, :P], v[:, :P], mask_BP, decoder.dtype, window)
        answers = packed.attend(q[:, P:], (k[:, :P], v[:, :P]), (k[:, P:], v[:, P:]), decoder.dtype)
        return rows.pack(jnp.concatenate([prompt, answers], 1)), None

    tokens_RT = rows.pack(jnp.concatenate([batch["prompt_BP"], packed.tokens_BS], 1))
    positions_RT = rows.pack(jnp.concatenate([prompt_positions(mask_BP), packed.positions_BS], 1))
    hidden_RTD, _ = decoder(tokens_RT, positions_RT, attention, None, dropout_keys_R)
    hidden_BXD = rows.spread(hidden_RTD)
    return packed.logp(decoder, hidden_BXD[:, P - 1], hidden_BXD[:, P:], batch)


def padded_hidden(decoder: Decoder, batch: Batch, dropout_keys_R=None):
    """C full rows a prompt, R = B*C: their hidden states, and the answers with their mask.

    Returns hidden_RTD, answers_RA, answers_mask_RA; the last A of the T = P+A-1 places predict the
    answer's tokens.
    """
    answers_BCA, answers_mask_BCA = batch["answers_BCA"], batch["answers_mask_BCA"]
    B, C, A = answers_BCA.shape
    mask_RP = jnp.repeat(batch["prompt_mask_BP"], C, 0)
    answers_RA = answers_BCA.reshape(B * C, A)
    answers_mask_RA = answers_mask_BCA.reshape(B * C, A)
    tokens_RT = jnp.concatenate([jnp.repeat(batch["prompt_BP"], C, 0), answers_RA[:, :-1]], 1)
    mask_RT = jnp.concatenate([mask_RP, answers_mask_RA[:, 1:]], 1)

    def attention(q, k, v, cache):
        return attend_causal(q, k, v, mask_RT, decoder.dtype, decoder.config.window), None

    if dropout_keys_R is not None:
        split = functools.partial(jax.random.split, num=B * C // len(dropout_keys_R))
        dropout_keys_R = jax.vmap(split)(dropout_keys_R).reshape(-1)
    hidden_RTD, _ = decoder(tokens_RT, prompt_positions(mask_RT), attention, None, dropout_keys_R)
    return hidden_RTD, answers_RA, answers_mask_RA


def padded_logp(decoder: Decoder, batch: Batch, dropout_keys_R=None) -> jax.Array:
    """The same `logp_BC` from C full rows a prompt: K+1 times the prompt's work, and the oracle."""
    hidden_RTD, answers_RA, answers_mask_RA = padded_hidden(decoder, batch, dropout_keys_R)
    A = answers_RA.shape[1]
    place_RA = jnp.broadcast_to(jnp.arange(A), answers_RA.shape)
    logp_RA = _token_logp(decoder.logits(hidden_RTD[:, -A:]), place_RA, answers_RA)
    logp_RA = jnp.where(answers_mask_RA, logp_RA, 0.0)
    return logp_RA.sum(-1).reshape(batch["answers_BCA"].shape[:2])


LAYOUTS = {"shared_prefix": shared_prefix_logp, "padded": padded_logp}
