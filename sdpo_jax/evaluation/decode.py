"""Three decoders over one prefilled prompt.

`prefill` runs the prompt once and stores its keys and values; `score`, `greedy` and `trie` read
them. All take a batch as `sdpo_jax.objectives.logprobs` describes it, and are pure functions for
the caller to jit. Shape letters are declared in `sdpo_jax.system.sharding`; A counts the tokens
that may be generated, and Y places with logits.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from sdpo_jax.models.attention import attend, attend_causal, near
from sdpo_jax.models.decoder import Decoder
from sdpo_jax.objectives.logprobs import Batch, PackedAnswers, answers_logp, prompt_positions


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Prefix:
    """Keys and values of every layer for the prompt, and the last prompt token's hidden state."""

    keys_LBPGH: jax.Array
    values_LBPGH: jax.Array
    mask_BP: jax.Array
    last_BD: jax.Array


# (logits_BV, number of the new token, state) -> (token_B, done_B, state)
Choose = Callable[[jax.Array, jax.Array | int, Any], tuple[jax.Array, jax.Array, Any]]


def prefill(decoder: Decoder, batch: Batch) -> Prefix:
    """Runs the prompts once."""
    mask_BP = batch["prompt_mask_BP"]

    def attention(q, k, v, _):
        # `attend` multiplies in this dtype: a wider cache would change nothing.
        kept = (k.astype(decoder.dtype), v.astype(decoder.dtype))
        dtype, window = decoder.dtype, decoder.config.window
        return attend_causal(q, k, v, mask_BP, dtype, window, decoder.fused), kept

    hidden_BPD, (keys, values) = decoder(batch["prompt_BP"], prompt_positions(mask_BP), attention)
    return Prefix(keys, values, mask_BP, hidden_BPD[:, -1])


def score(decoder: Decoder, prefix: Prefix, batch: Batch) -> jax.Array:
    """Log-probs `logp_BMC` of all answers in one pass; equal to `shared_prefix_logp`.

    Each example has one target, at its prompt's end.
    """
    packed = PackedAnswers(batch, decoder.config.window)

    def attention(q, k, v, prompt):
        return packed.attend(q, prompt, (k, v), decoder.dtype), None

    cache = (prefix.keys_LBPGH, prefix.values_LBPGH)
    hidden_BSD, _ = decoder(packed.tokens_BS, packed.positions_BS, attention, cache)
    logits_BYV = decoder.logits(jnp.concatenate([prefix.last_BD[:, None], hidden_BSD], 1))
    return answers_logp(logits_BYV, batch["predictor_BMCA"], batch)


def greedy(decoder: Decoder, prefix: Prefix, ends: Sequence[int], max_new_tokens: int) -> jax.Array:
    """The most likely token at every step, `tokens_BA`; after one of `ends` the first of them."""
    end, all_ends = ends[0], jnp.array(ends)

    def choose(logits_BV, i, state):
        tokens_BA, done_B = state
        token_B = jnp.where(done_B, end, jnp.argmax(logits_BV, -1)).astype(jnp.int32)
        done_B |= jnp.isin(token_B, all_ends)
        return token_B, done_B, (tokens_BA.at[:, i].set(token_B), done_B)

    B = prefix.last_BD.shape[0]
    start = (jnp.full((B, max_new_tokens), end, jnp.int32), jnp.zeros(B, bool))
    return _generate(decoder, prefix, choose, start, max_new_tokens)[0]


def trie(decoder: Decoder, prefix: Prefix, answers_BCA: jax.Array) -> jax.Array:
    """Greedy decoding among the tokens that continue a candidate; the candidate's index, [B].

    A candidate is alive while its tokens equal those generated. An example is done when one is
    left, at the latest at the end of one of two answers with a common beginning.
    """

    def choose(logits_BV, i, alive_BC):
        next_BC = jax.lax.dynamic_index_in_dim(answers_BCA, i, 2, keepdims=False)
        logit_BC = jnp.take_along_axis(logits_BV, next_BC, -1)
        best_B1 = jnp.argmax(jnp.where(alive_BC, logit_BC, -jnp.inf), -1, keepdims=True)
        token_B1 = jnp.take_along_axis(next_BC, best_B1, -1)
        alive_BC &= next_BC == token_B1
        return token_B1[:, 0], alive_BC.sum(-1) == 1, alive_BC

    B, C, A = answers_BCA.shape
    alive_BC = _generate(decoder, prefix, choose, jnp.ones((B, C), bool), A)
    return jnp.argmax(alive_BC, -1)


def _generate(decoder: Decoder, prefix: Prefix, choose: Choose, state: Any, steps: int) -> Any:
    """Chooses up to `steps` tokens, until every example is done; returns `choose`'s last state.

    New tokens have their own cache of `steps` places, so the prompt's is never copied.
    """
    length_B, window = prefix.mask_BP.sum(-1), decoder.config.window
    L, B, _, G, H = prefix.keys_LBPGH.shape
    place_BP = prompt_positions(prefix.mask_BP)

    def step(carry):
        i, token_B, _, state, cache = carry
        now_B1 = (length_B + i)[:, None]
        new_BA = length_B[:, None] + jnp.arange(steps)
        prompt_mask_B1P = prefix.mask_BP[:, None] & near(now_B1, place_BP, window)
        seen_B1A = near(now_B1, new_BA, window) & (jnp.arange(steps) <= i)

        def attention(q, k, v, layer):
            k_prompt, v_prompt, keys_BAGH, values_BAGH = layer
            keys_BAGH = _put(keys_BAGH, k, i)
            values_BAGH = _put(values_BAGH, v, i)
            blocks = [(k_prompt, v_prompt, prompt_mask_B1P), (keys_BAGH, values_BAGH, seen_B1A)]
            return attend(q, blocks, decoder.dtype), (keys_BAGH, values_BAGH)

        layers = (prefix.keys_LBPGH, prefix.values_LBPGH, *cache)
        hidden_B1D, cache = decoder(token_B[:, None], now_B1, attention, layers)
        logits_BV = decoder.logits(hidden_B1D)[:, 0]
        return (i + 1, *choose(logits_BV, i + 1, state), cache)

    def goes_on(carry):
        i, _, done_B, _, _ = carry
        return (i + 1 < steps) & ~done_B.all()

    first = choose(decoder.logits(prefix.last_BD[:, None])[:, 0], 0, state)
    cache = (jnp.zeros((L, B, steps, G, H), prefix.keys_LBPGH.dtype),) * 2
    return jax.lax.while_loop(goes_on, step, (0, *first, cache))[3]


def _put(cache_BAGH: jax.Array, new_B1GH: jax.Array, i: jax.Array) -> jax.Array:
    new_B1GH = new_B1GH.astype(cache_BAGH.dtype)
    return jax.lax.dynamic_update_slice_in_dim(cache_BAGH, new_B1GH, i, 1)
