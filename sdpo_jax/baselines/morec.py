"""MoRec: Yuan et al., "Where to Go Next for Recommender Systems? ID- vs. Modality-based Recommender
Models Revisited", SIGIR 2023: SASRec with item vectors computed from the titles."""

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from sdpo_jax.baselines.bert import Bert, encoded, read_bert, title_tokens
from sdpo_jax.baselines.networks import SIZE
from sdpo_jax.baselines.sasrec import SASRec
from sdpo_jax.baselines.trainer import Recipe
from sdpo_jax.data.sequences import MAX_HISTORY
from sdpo_jax.models.lora import Frozen
from sdpo_jax.models.weights import source_digest
from sdpo_jax.system.errors import InputError
from sdpo_jax.system.hub import hub_folder, is_hub_name
from sdpo_jax.system.wheels import ENCODER, MINILM, wheel_file

ENCODER_LEARNING_RATE = 5e-5  # the authors search 1e-4, 5e-5 and 1e-5


@dataclasses.dataclass(frozen=True)
class Text:
    """The encoder of the titles: a folder or a name on the Hub, by default MiniLM.

    `trained`: train the encoder too, not only the linear map behind it and SASRec.
    """

    encoder: str | None = None
    trained: bool = False


class EncodedOnce(nnx.Module):
    """Frozen vectors of the titles, [I, E]."""

    def __init__(self, vectors_IE: jax.Array):
        self.vectors_IE = Frozen(vectors_IE)

    def __call__(self) -> jax.Array:
        return self.vectors_IE[...]


class Encoded(nnx.Module):
    """Vectors of the titles, [I, E], from a trainable encoder."""

    def __init__(self, bert: Bert, tokens_IA: np.ndarray):
        self.bert, self.tokens_IA = bert, Frozen(jnp.asarray(tokens_IA))

    def __call__(self) -> jax.Array:
        return encoded(self.bert, self.tokens_IA[...])


class TextItems(nnx.Module):
    """A vector per item, [I, D]: its title's, mapped linearly to the width of SASRec."""

    def __init__(self, text: nnx.Module, width: int, size: int = SIZE, *, rngs: nnx.Rngs):
        self.text = text
        start = nnx.initializers.normal((width * size) ** -0.5)  # norms as of learned vectors
        self.transformed = nnx.Linear(width, size, kernel_init=start, rngs=rngs)

    def vectors(self) -> jax.Array:
        return self.transformed(standardized(self.text()))


def standardized(text_IE: jax.Array) -> jax.Array:
    """Mean 0 over the titles and overall variance 1: encoders differ in both."""
    text_IE -= text_IE.mean(0)
    return text_IE * jax.lax.rsqrt(jnp.square(text_IE).mean() + 1e-12)


def recipe(titles: Sequence[str], text: Text, learning_rate: float, T: int = MAX_HISTORY) -> Recipe:
    """The recipe of MoRec over `titles`. Raises InputError for a missing or unfit encoder."""
    folder = encoder_folder(text.encoder)
    digest = source_digest(folder)
    bert = read_bert(folder)
    tokens_IA = title_tokens(folder, titles, bert.config)
    module = Encoded(bert, tokens_IA) if text.trained else EncodedOnce(encode_all(bert, tokens_IA))

    def make(rngs: nnx.Rngs) -> SASRec:
        return SASRec(TextItems(module, bert.config.E, rngs=rngs), T=T, rngs=rngs)

    about = {
        "encoder": text.encoder or "==".join(MINILM[:2]),
        "encoder_sha256": digest,
        "encoder_trained": text.trained,
    }
    return Recipe(make, optimizer(learning_rate), (digest, text.trained), about)


def encode_all(bert: Bert, tokens_IA: np.ndarray) -> jax.Array:
    """`encoded`, compiled."""
    graphdef, state = nnx.split(bert)
    return jax.jit(lambda state, tokens_IA: encoded(nnx.merge(graphdef, state), tokens_IA))(
        state, tokens_IA
    )


def optimizer(learning_rate: float) -> optax.GradientTransformation:
    """Adam, with the lower ENCODER_LEARNING_RATE for the pre-trained encoder."""

    def names(state):
        return jax.tree_util.tree_map_with_path(
            lambda path, _: "encoder" if "bert" in jax.tree_util.keystr(path) else "rest", state
        )

    rates = {"encoder": ENCODER_LEARNING_RATE, "rest": learning_rate}
    return optax.partition({name: optax.adam(rate) for name, rate in rates.items()}, names)


def encoder_folder(encoder: str | None) -> Path:
    """The folder of `--encoder`, by default MiniLM's wheel. Raises InputError if it is missing."""
    if encoder is None:
        return [wheel_file(*pinned) for pinned in ENCODER].pop().parent
    if is_hub_name(encoder):
        return hub_folder(encoder, "--encoder")
    if not os.path.isdir(encoder):
        raise InputError(f"--encoder={encoder}: no such folder, nor a name on the Hub as org/name")
    return Path(encoder)
