"""Caser: Tang & Wang, "Personalized Top-N Sequential Recommendation via Convolutional Sequence
Embedding", WSDM 2018."""

import jax
import jax.numpy as jnp
from flax import nnx

from sdpo_jax.baselines.networks import SIZE, Items, dropout, embed
from sdpo_jax.data.sequences import MAX_HISTORY


class Caser(nnx.Module):
    """Filters over the history as an image of T rows and D columns (section 3.2).

    Horizontal filters span 1 to T items and all columns, the X vertical ones all items and one
    column. The paper's user embedding is left out: the users of validation and test are new.
    """

    def __init__(
        self,
        items: int,
        size: int = SIZE,
        horizontal: int = 16,
        vertical: int = 4,
        dropout: float = 0.5,
        *,
        T: int = MAX_HISTORY,
        rngs: nnx.Rngs,
    ):
        self.items = Items(items, size, rngs=rngs)
        # As matrix products: XLA's gradient of a convolution is ten times as slow on a CPU.
        self.horizontal = nnx.List(
            nnx.LinearGeneral((height, size), horizontal, axis=(-2, -1), rngs=rngs)
            for height in range(1, T + 1)
        )
        self.vertical = nnx.Linear(T, vertical, rngs=rngs)
        self.hidden = nnx.Linear(horizontal * T + vertical * size, size, rngs=rngs)
        self.head = nnx.Linear(size, items, rngs=rngs)
        self.dropout = dropout

    def __call__(self, history_BT: jax.Array, rngs: nnx.Rngs | None = None) -> jax.Array:
        """Scores of every item as the next one, [B, I]."""
        x_BTD = embed(self.items.vectors(), history_BT)
        found = [
            nnx.relu(filters(spans(x_BTD, height))).max(1)  # eq. 5, 6
            for height, filters in enumerate(self.horizontal, 1)
        ]
        vertical_BDX = self.vertical(x_BTD.swapaxes(1, 2))  # eq. 7, 8
        o_BF = jnp.concatenate([*found, vertical_BDX.reshape(len(x_BTD), -1)], -1)
        z_BD = nnx.relu(self.hidden(dropout(o_BF, self.dropout, rngs)))  # eq. 9
        return self.head(z_BD)


def spans(x_BTD: jax.Array, height: int) -> jax.Array:
    """All runs of `height` positions, [B, T - height + 1, height, D]."""
    runs = range(x_BTD.shape[1] - height + 1)
    return jnp.stack([x_BTD[:, start : start + height] for start in runs], 1)
