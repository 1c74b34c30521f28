"""SASRec: Kang & McAuley, "Self-Attentive Sequential Recommendation", ICDM 2018."""

import jax
import jax.numpy as jnp
from flax import nnx

from sdpo_jax.baselines.networks import SIZE, Items, Vectors, dropout, embed
from sdpo_jax.data.sequences import MAX_HISTORY


class Block(nnx.Module):
    """Self-attention and a point-wise network, each as x + dropout(g(norm(x))) (section III.C)."""

    def __init__(self, size: int, heads: int, dropout: float, *, rngs: nnx.Rngs):
        self.norms = nnx.List(nnx.LayerNorm(size, epsilon=1e-8, rngs=rngs) for _ in range(2))
        self.attention = nnx.MultiHeadAttention(
            heads, size, dropout_rate=dropout, decode=False, keep_rngs=False, rngs=rngs
        )
        self.inner = nnx.Linear(size, size, rngs=rngs)
        self.outer = nnx.Linear(size, size, rngs=rngs)
        self.dropout = dropout

    def __call__(self, x_BTD: jax.Array, mask: jax.Array, rngs: nnx.Rngs | None) -> jax.Array:
        normed_BTD = self.norms[0](x_BTD)
        seen_BTD = self.attention(normed_BTD, mask=mask, deterministic=rngs is None, rngs=rngs)
        x_BTD += dropout(seen_BTD, self.dropout, rngs)
        inner_BTD = dropout(nnx.relu(self.inner(self.norms[1](x_BTD))), self.dropout, rngs)
        return x_BTD + dropout(self.outer(inner_BTD), self.dropout, rngs)


class SASRec(nnx.Module):
    """Two blocks of causal self-attention; the last state is scored with the item vectors (eq. 7).

    `items`: their number, or a module that returns their vectors, [I, D]. T: longest history.
    """

    def __init__(
        self,
        items: int | Vectors,
        size: int = SIZE,
        blocks: int = 2,
        heads: int = 1,
        dropout: float = 0.3,
        *,
        T: int = MAX_HISTORY,
        rngs: nnx.Rngs,
    ):
        self.items = Items(items, size, rngs=rngs) if isinstance(items, int) else items
        self.places = nnx.Param(jax.random.normal(rngs.params(), (T, size)) * 0.02)
        self.blocks = nnx.List(Block(size, heads, dropout, rngs=rngs) for _ in range(blocks))
        self.norm = nnx.LayerNorm(size, epsilon=1e-8, rngs=rngs)
        self.dropout = dropout

    def __call__(self, history_BT: jax.Array, rngs: nnx.Rngs | None = None) -> jax.Array:
        """Scores of every item as the next one, [B, I]."""
        vectors_ID, T = self.items.vectors(), history_BT.shape[1]
        is_item_BT = history_BT < len(vectors_ID)
        # Scaled as in the authors' code; positions are counted from the end.
        x_BTD = embed(vectors_ID, history_BT) * vectors_ID.shape[1] ** 0.5
        x_BTD += self.places[...][-T:]
        x_BTD = dropout(x_BTD, self.dropout, rngs) * is_item_BT[..., None]
        mask = jnp.tril(jnp.ones((T, T), bool)) & is_item_BT[:, None, None]
        for block in self.blocks:
            x_BTD = block(x_BTD, mask, rngs)
        return self.norm(x_BTD[:, -1]) @ vectors_ID.T
