"""A model's config.json, read into the sizes and switches of a decoder.

The family is config.json's `model_type`; keys may have the names of transformers 5 or older ones.
Shape letters are declared in `sdpo_jax.system.sharding`.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from sdpo_jax.system.errors import InputError, brief
from sdpo_jax.system.files import read_object

# More than any model has: a damaged file must not make tables of names or shapes beyond memory.
MOST_LAYERS, MOST = 2**10, 2**20
MOST_OF_ROPE = 1e12
# What a kind of RoPE reads beside theta.
ROPE_KEYS = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
}


@dataclasses.dataclass(frozen=True)
class Rope:
    """Rotary positions on `fraction` of a head's width; `kind` is a key of ROPE_KEYS.

    `positions`: the length of the model's texts before `dynamic` or `llama3` stretches it.
    """

    theta: float = 10000.0
    kind: str = "default"
    fraction: float = 1.0
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    positions: int = 2048


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """Sizes of a decoder, named by their shape letters, and its family's switches.

    `window`: positions back that a token sees, itself included; None for all. `gelu`: of GPT-NeoX's
    MLP, "exact" or "tanh". `parallel`: GPT-NeoX's attention and MLP read the same input.
    `positions`: the longest text the model was made for; None where it does not say.
    """

    V: int
    L: int
    D: int
    N: int
    G: int
    H: int
    F: int
    family: str = "llama"
    rope: Rope = Rope()
    norm_eps: float = 1e-5
    tied: bool = False
    window: int | None = None
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    gelu: str = "exact"
    parallel: bool = True
    positions: int | None = None

    @property
    def rotated(self) -> int:
        """How many of a head's H values RoPE rotates."""
        return int(self.H * self.rope.fraction)

    @property
    def projections(self) -> tuple[str, ...]:
        """The linear maps of a layer, all of which LoRA can adapt."""
        if self.family == "gpt_neox":
            return ("qkv", "o", "up", "down")
        return ("q", "k", "v", "o", "gate", "up", "down")

    @classmethod
    def read(cls, folder: Path) -> "DecoderConfig":
        """The config of a model folder. Raises InputError."""
        path = folder / "config.json"
        return cls.from_hf(read_object(path, "expected that of a whole model"), str(path))

    @classmethod
    def from_hf(cls, config: dict[str, Any], where: str) -> "DecoderConfig":
        """Reads a Hugging Face `config.json`.

        Raises:
          InputError: an unknown family, a missing key, or a feature that no decoder here computes.
        """
        family = config.get("model_type")
        if type(family) is not str or family not in FAMILIES:
            raise InputError(
                f"{where}: model_type is {brief(family)}, expected one of {', '.join(FAMILIES)}"
            )
        try:
            sizes = _sizes(config, family)
            rope = _rope(config, where)
            switches = FAMILIES[family](config, where)
            positions = config.get("max_position_embeddings")
            if positions is not None:
                stretched = rope.factor if rope.kind in ("linear", "dynamic") else 1
                positions = int(positions * stretched)
        except (AttributeError, KeyError, TypeError, ValueError, ArithmeticError) as error:
            raise InputError(
                f"{where}: sizes missing or wrong ({error!r}): is this a full model?"
            ) from None
        wrong = list(_wrong(sizes | switches))
        made = functools.partial(cls, **sizes, family=family, rope=rope, positions=positions)
        read = made(**switches) if not wrong else None
        if read is None or read.N % read.G or read.N * read.H > MOST or not _turns(read):
            raise InputError(
                f"{where}: {', '.join(wrong) or sizes} do not make a decoder: expected sizes that "
                f"are whole numbers above 0, at most {MOST:,} ({MOST_LAYERS:,} layers), switches "
                "that are true or false, an epsilon from 0 to 1, heads a multiple of key/value "
                "heads, an even width that RoPE turns"
            )
        return read


def _wrong(values: dict[str, Any]) -> Iterator[str]:
    """`name=value` of every value that is not of its field's type, or larger than any model's."""
    for field in dataclasses.fields(DecoderConfig):
        if field.name not in values:
            continue
        value, kind = values[field.name], type(values[field.name])
        if field.type is bool:
            right = value is None or kind is bool
        elif field.name == "norm_eps":
            right = kind in (int, float) and 0 <= value < 1
        elif field.name == "gelu" or (field.name == "window" and value is None):
            right = True
        else:
            right = kind is int and 0 < value <= (MOST_LAYERS if field.name == "L" else MOST)
        if not right:
            yield f"{'sliding_window' if field.name == 'window' else field.name}={brief(value)}"


def _turns(config: DecoderConfig) -> bool:
    """Whether RoPE rotates an even number of a head's values."""
    return 0 < config.rotated <= config.H and config.rotated % 2 == 0


def _sizes(config: dict[str, Any], family: str) -> dict[str, Any]:
    heads, width = config["num_attention_heads"], config["hidden_size"]
    key = "num_key_value_heads"  # the other families' default is not the number of heads
    groups = config.get(key) if family in ("llama", "gpt_neox") else config[key]
    return {
        "V": config["vocab_size"],
        "L": config["num_hidden_layers"],
        "D": width,
        "N": heads,
        "G": groups or heads,
        "H": config.get("head_dim") or (128 if family == "qwen3" else width // heads),
        "F": config["intermediate_size"],
    }


def _rope(config: dict[str, Any], where: str) -> Rope:
    """RoPE's parameters from `rope_parameters`, or from the keys used before it."""
    found = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kind = found.get("rope_type", found.get("type", "default"))
    if kind not in ROPE_KEYS or any(isinstance(value, dict) for value in found.values()):
        raise InputError(
            f"{where}: rope_type is {brief(kind)} in {brief(found)}, expected one of "
            f"{', '.join(ROPE_KEYS)}, the same for all layers"
        )
    neox = config["model_type"] == "gpt_neox"
    fraction = found.get(
        "partial_rotary_factor",
        config.get("rotary_pct", 0.25) if neox else config.get("partial_rotary_factor", 1.0),
    )
    if not neox:
        _expect(where, partial_rotary_factor=(fraction, 1.0))
    theta = config.get("rotary_emb_base" if neox else "rope_theta", 10000.0)
    positions = config.get("max_position_embeddings", Rope.positions)
    if kind == "llama3":
        positions = found.get("original_max_position_embeddings", positions)
    rope = Rope(
        float(found.get("rope_theta", theta)),
        kind,
        float(fraction),
        positions=int(positions),
        **{key: float(found[key]) for key in ROPE_KEYS[kind]},
    )
    numbers = {k: v for k, v in dataclasses.asdict(rope).items() if k != "kind"}
    wrong = [f"{key}={value}" for key, value in numbers.items() if not 0 < value < MOST_OF_ROPE]
    if rope.low_freq_factor >= rope.high_freq_factor:
        wrong.append(f"low_freq_factor={rope.low_freq_factor}")
    if wrong:
        raise InputError(
            f"{where}: RoPE has {', '.join(wrong)}, expected numbers above 0, low_freq_factor "
            "below high_freq_factor"
        )
    return rope


def _expect(where: str, **pairs: tuple[Any, Any]) -> None:
    for key, (found, expected) in pairs.items():
        if found != expected:
            raise InputError(f"{where}: {key} is {brief(found)}, this decoder computes {expected}")


def _rms_and_swiglu(config: dict[str, Any], where: str) -> dict[str, Any]:
    _expect(where, hidden_act=(config.get("hidden_act", "silu"), "silu"))
    return {
        "norm_eps": config.get("rms_norm_eps", 1e-6),
        "tied": config.get("tie_word_embeddings", False),
    }


def _llama(config: dict[str, Any], where: str) -> dict[str, Any]:
    bias = config.get("attention_bias", False)
    mlp = config.get("mlp_bias", False)
    return _rms_and_swiglu(config, where) | {"qkv_bias": bias, "o_bias": bias, "mlp_bias": mlp}


def _mistral(config: dict[str, Any], where: str) -> dict[str, Any]:
    return _rms_and_swiglu(config, where) | {"window": config.get("sliding_window", 4096)}


def _qwen2(config: dict[str, Any], where: str) -> dict[str, Any]:
    _expect(where, use_sliding_window=(config.get("use_sliding_window", False), False))
    return _rms_and_swiglu(config, where) | {"qkv_bias": True}


def _qwen3(config: dict[str, Any], where: str) -> dict[str, Any]:
    _expect(where, use_sliding_window=(config.get("use_sliding_window", False), False))
    bias = config.get("attention_bias", False)
    return _rms_and_swiglu(config, where) | {"qkv_bias": bias, "o_bias": bias, "qk_norm": True}


GELU = {"gelu": "exact", "gelu_new": "tanh", "gelu_pytorch_tanh": "tanh", "gelu_fast": "tanh"}


def _gpt_neox(config: dict[str, Any], where: str) -> dict[str, Any]:
    activation, bias = config.get("hidden_act", "gelu"), config.get("attention_bias", True)
    if activation not in GELU:
        raise InputError(
            f"{where}: hidden_act is {brief(activation)}, this decoder computes {', '.join(GELU)}"
        )
    return {
        "norm_eps": config.get("layer_norm_eps", 1e-5),
        "tied": config.get("tie_word_embeddings", False),
        "parallel": config.get("use_parallel_residual", True),
        "gelu": GELU[activation],
        "qkv_bias": bias,
        "o_bias": bias,
        "mlp_bias": True,
    }


FAMILIES: dict[str, Callable[[dict[str, Any], str], dict[str, Any]]] = {
    "llama": _llama,
    "mistral": _mistral,
    "qwen2": _qwen2,
    "qwen3": _qwen3,
    "gpt_neox": _gpt_neox,
}
