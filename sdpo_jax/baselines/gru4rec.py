"""GRU4Rec: Hidasi et al., "Session-based Recommendations with Recurrent Neural Networks", 2016."""

import jax
import jax.numpy as jnp
from flax import nnx

from sdpo_jax.baselines.networks import SIZE, Items, dropout, embed


class GRU4Rec(nnx.Module):
    """One layer of gated recurrent units over item vectors, and a linear output layer (figure 1).

    The paper's ranking losses replace a softmax over a large catalogue; with thousands of items the
    softmax itself is affordable.
    """

    def __init__(self, items: int, size: int = SIZE, dropout: float = 0.3, *, rngs: nnx.Rngs):
        self.items = Items(items, size, rngs=rngs)
        self.gru = nnx.RNN(nnx.GRUCell(size, size, rngs=rngs), return_carry=True, rngs=False)
        self.head = nnx.Linear(size, items, rngs=rngs)
        self.dropout = dropout

    def __call__(self, history_BT: jax.Array, rngs: nnx.Rngs | None = None) -> jax.Array:
        """Scores of every item as the next one, [B, I]."""
        T, vectors_ID = history_BT.shape[1], self.items.vectors()
        length_B = (history_BT < len(vectors_ID)).sum(-1)
        # `seq_lengths` expects padding on the right, so the items are moved to the left.
        places_BT = (jnp.arange(T) - length_B[:, None]) % T
        history_BT = jnp.take_along_axis(history_BT, places_BT, 1)
        x_BTD = dropout(embed(vectors_ID, history_BT), self.dropout, rngs)
        start_BD = jnp.zeros_like(x_BTD[:, 0])
        state_BD, _ = self.gru(x_BTD, initial_carry=start_BD, seq_lengths=length_B)
        return self.head(dropout(state_BD, self.dropout, rngs))
