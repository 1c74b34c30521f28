"""A converted model, for programs: what `sdpo convert` wrote, opened by its folder."""

from sdpo_jax.models.store import Model, load_model
from sdpo_jax.models.tokenizer import load_tokenizer

__all__ = ["Model", "load_model", "load_tokenizer"]
