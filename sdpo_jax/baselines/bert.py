"""A BERT encoder (Devlin et al. 2019, arXiv 1810.04805) of titles.

Shape letters are declared in `sdpo_jax.system.sharding`: I titles of A tokens (right-padded with V,
one past the largest id), E their width. X: batches of Y titles.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict

from sdpo_jax.baselines.networks import embed
from sdpo_jax.models.config import GELU, MOST, MOST_LAYERS
from sdpo_jax.models.tokenizer import check_vocabulary, load_tokenizer
from sdpo_jax.models.weights import Source, open_hf, read_arrays, slots_of
from sdpo_jax.system.errors import InputError, brief
from sdpo_jax.system.files import SHARE, Kind, check_keys, one_of

BATCH = 64  # titles encoded at once
LONGEST = 128  # tokens of a title; further ones are cut

# (Hugging Face's module, ours), as in `sdpo_jax.models.weights`.
MODULES = (
    ("embeddings.word_embeddings", "words"),
    ("embeddings.position_embeddings", "places"),
    ("embeddings.token_type_embeddings", "types"),
    ("embeddings.LayerNorm", "norm"),
    ("encoder.layer.{}.attention.self.query", "layers/q"),
    ("encoder.layer.{}.attention.self.key", "layers/k"),
    ("encoder.layer.{}.attention.self.value", "layers/v"),
    ("encoder.layer.{}.attention.output.dense", "layers/o"),
    ("encoder.layer.{}.attention.output.LayerNorm", "layers/attention_norm"),
    ("encoder.layer.{}.intermediate.dense", "layers/up"),
    ("encoder.layer.{}.output.dense", "layers/down"),
    ("encoder.layer.{}.output.LayerNorm", "layers/mlp_norm"),
)
# Without either, transformers builds a tokenizer to which every word is unknown.
VOCABULARY = ("tokenizer.json", "vocab.txt")
HEADS = ("pooler.", "cls.")  # of pre-training, left out
OLD = ((".gamma", ".weight"), (".beta", ".bias"))  # names of norms in the first checkpoints


def _up_to(most: int) -> Kind:
    return Kind(f"a whole number from 1 to {most:,}", lambda x: type(x) is int and 0 < x <= most)


# Key of config.json -> (our field, allowed values).
KEYS: dict[str, tuple[str, Kind]] = {
    "vocab_size": ("V", _up_to(MOST)),
    "num_hidden_layers": ("L", _up_to(MOST_LAYERS)),
    "hidden_size": ("E", _up_to(MOST)),
    "num_attention_heads": ("N", _up_to(MOST)),
    "intermediate_size": ("F", _up_to(MOST)),
    "max_position_embeddings": ("P", _up_to(MOST)),
    "type_vocab_size": ("types", _up_to(MOST)),
    "hidden_act": ("gelu", one_of(*GELU)),
    "layer_norm_eps": ("eps", SHARE),
}
SWITCHES = {
    "position_embedding_type?": one_of("absolute"),
    "is_decoder?": Kind("false", lambda value: value is False),
}


@dataclasses.dataclass(frozen=True)
class BertConfig:
    """Sizes; `types` of segments; `gelu`: a key of `models.config.GELU`; `eps` of the norms."""

    V: int
    L: int
    E: int
    N: int
    F: int
    P: int
    types: int
    gelu: str
    eps: float

    @classmethod
    def from_hf(cls, config: dict[str, Any], where: str) -> "BertConfig":
        """Reads a config.json. Raises InputError for another family, missing or unfit values."""
        if config.get("model_type") != "bert":
            raise InputError(
                f"{where}: model_type is {brief(config.get('model_type'))}, expected bert: give a "
                "BERT encoder"
            )
        kinds = {key: kind for key, (_, kind) in KEYS.items()} | SWITCHES
        check_keys(f"{where}/config.json", config, kinds, "give a whole BERT model")
        read = cls(**{field: config[key] for key, (field, _) in KEYS.items()})
        if read.E % read.N:
            raise InputError(
                f"{where}/config.json: hidden_size is {read.E}, expected a multiple of the "
                f"{read.N} attention heads"
            )
        return read


class Layer(nnx.Module):
    """Self-attention and an MLP, each as norm(x + g(x))."""

    def __init__(self, config: BertConfig, *, rngs: nnx.Rngs):
        self.config, E = config, config.E
        self.q, self.k, self.v, self.o = (nnx.Linear(E, E, rngs=rngs) for _ in range(4))
        self.attention_norm = norm(config, rngs)
        self.up = nnx.Linear(E, config.F, rngs=rngs)
        self.down = nnx.Linear(config.F, E, rngs=rngs)
        self.mlp_norm = norm(config, rngs)

    def __call__(self, x_IAE: jax.Array, mask_IA: jax.Array) -> jax.Array:
        heads = (*mask_IA.shape, self.config.N, -1)
        q, k, v = (linear(x_IAE).reshape(heads) for linear in (self.q, self.k, self.v))
        seen = jax.nn.dot_product_attention(q, k, v, mask=mask_IA[:, None, None])
        x_IAE = self.attention_norm(x_IAE + self.o(seen.reshape(x_IAE.shape)))
        tanh = GELU[self.config.gelu] == "tanh"
        return self.mlp_norm(x_IAE + self.down(jax.nn.gelu(self.up(x_IAE), approximate=tanh)))


class Bert(nnx.Module):
    """Embeddings of words, positions and the first type, and L stacked layers under one scan."""

    def __init__(self, config: BertConfig, *, rngs: nnx.Rngs):
        self.config = c = config

        def table(rows: int) -> nnx.Param:
            return nnx.Param(0.02 * jax.random.normal(rngs.params(), (rows, c.E)))

        self.words, self.places, self.types = table(c.V), table(c.P), table(c.types)
        self.norm = norm(c, rngs)

        @nnx.vmap(in_axes=0, out_axes=0)
        def stack(rngs):
            return Layer(c, rngs=rngs)

        self.layers = stack(rngs.split(c.L))

    def __call__(self, tokens_IA: jax.Array) -> jax.Array:
        """Hidden states after the last layer, [I, A, E]; meaningless at padding."""
        words_IAE = embed(self.words[...], tokens_IA)
        x_IAE = self.norm(words_IAE + self.places[: tokens_IA.shape[1]] + self.types[0])
        graphdef, state = nnx.split(self.layers)

        def body(x_IAE, state):
            return nnx.merge(graphdef, state)(x_IAE, tokens_IA < self.config.V), None

        return jax.lax.scan(body, x_IAE, state)[0]

    def pooled(self, tokens_IA: jax.Array) -> jax.Array:
        """The mean over a title's tokens, [I, E]."""
        mask_IA1 = (tokens_IA < self.config.V)[..., None]
        return self(tokens_IA).mean(1, where=mask_IA1)


def norm(config: BertConfig, rngs: nnx.Rngs) -> nnx.LayerNorm:
    # The fast variance is a difference of two squares and loses digits.
    return nnx.LayerNorm(config.E, epsilon=config.eps, use_fast_variance=False, rngs=rngs)


def encoded(bert: Bert, tokens_IA: jax.Array) -> jax.Array:
    """Vectors of all titles, [I, E], in batches that the backward pass recomputes."""
    I, A = tokens_IA.shape  # noqa: E741 - shape letters
    whole = jnp.resize(tokens_IA, (-(-I // BATCH) * BATCH, A))
    vectors_XYE = jax.lax.map(jax.checkpoint(bert.pooled), whole.reshape(-1, BATCH, A))
    return vectors_XYE.reshape(-1, vectors_XYE.shape[-1])[:I]


def read_bert(folder: Path) -> Bert:
    """The encoder of a Hugging Face folder, in float32. Raises InputError if it does not fit."""
    source = open_hf(folder)
    config = BertConfig.from_hf(source.config, source.where)
    graphdef, state = nnx.split(nnx.eval_shape(lambda: Bert(config, rngs=nnx.Rngs(0))))
    shapes = flatten_dict(nnx.to_pure_dict(state), sep="/")
    flat, _ = read_arrays(without_heads(source), slots_of(MODULES, shapes, config.L), shapes)
    arrays = {path: jnp.asarray(array, jnp.float32) for path, array in flat.items()}
    nnx.replace_by_pure_dict(state, unflatten_dict(arrays, sep="/"))
    return nnx.merge(graphdef, state)


def without_heads(source: Source) -> Source:
    """The encoder's tensors of a checkpoint, under the current names of BertModel."""
    named = {}
    for name in source.tensors:
        new = name.removeprefix("bert.")
        for old, today in OLD:
            if new.endswith(old):
                new = new.removesuffix(old) + today
        if not new.startswith(HEADS):
            named[new] = name
    tensors = {new: source.tensors[name] for new, name in named.items()}
    return dataclasses.replace(source, tensors=tensors, read=lambda new: source.read(named[new]))


def title_tokens(folder: Path, titles: Sequence[str], config: BertConfig) -> np.ndarray:
    """[I, A], the first LONGEST tokens of each title. Raises InputError for an unfit tokenizer."""
    if not any((folder / name).is_file() for name in VOCABULARY):
        raise InputError(f"{folder}: found no {' nor '.join(VOCABULARY)}: give a whole BERT model")
    tokenizer = load_tokenizer(folder)
    check_vocabulary(tokenizer, config.V, str(folder))
    longest = min(LONGEST, config.P)
    rows = tokenizer(list(titles), truncation=True, max_length=longest).input_ids
    tokens_IA = np.full((len(rows), max(map(len, rows))), config.V, np.int32)
    for tokens_A, row in zip(tokens_IA, rows, strict=True):
        tokens_A[: len(row)] = row
    return tokens_IA
