"""A config.json is read in its old and its new spelling, or refused in one line."""

import json

import pytest

from sdpo_jax.models.config import DecoderConfig
from sdpo_jax.system.errors import InputError

GOOD = {
    "model_type": "llama",
    "vocab_size": 97,
    "num_hidden_layers": 2,
    "hidden_size": 16,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 24,
}


def test_the_head_width_follows_from_width_and_heads():
    config = DecoderConfig.from_hf(GOOD, "config.json")
    assert (config.N, config.G, config.H) == (4, 2, 4)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("num_attention_heads", 0),
        ("hidden_size", "16"),
        ("num_key_value_heads", 3),
        ("head_dim", 5),
        ("vocab_size", None),
        ("num_hidden_layers", -1),
        ("intermediate_size", 2.5),
        ("rope_parameters", {"partial_rotary_factor": 0.5}),
        ("hidden_act", "gelu"),
        ("rope_parameters", {"rope_type": "yarn", "factor": 2.0}),
        ("model_type", "gpt2"),
        ("rope_parameters", {"full_attention": {"rope_type": "default"}}),
        ("rope_scaling", {"type": "linear"}),
        ("rope_scaling", "linear"),
    ],
)
def test_a_wrong_size_or_an_unknown_feature_is_refused(key, value):
    with pytest.raises(InputError, match=r"config\.json"):
        DecoderConfig.from_hf(GOOD | {key: value}, "config.json")


def test_a_missing_size_is_named():
    config = {k: v for k, v in GOOD.items() if k != "hidden_size"}
    with pytest.raises(InputError, match="hidden_size"):
        DecoderConfig.from_hf(config, "config.json")


def test_an_unknown_family_is_told_the_known_ones():
    with pytest.raises(InputError, match="llama, mistral, qwen2, qwen3, gpt_neox"):
        DecoderConfig.from_hf(GOOD | {"model_type": "bert"}, "config.json")


@pytest.mark.parametrize(
    ("new", "old"),
    [
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, {"rope_theta": 5e5}),
        (
            {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}},
            {"rope_theta": 1e4, "rope_scaling": {"type": "linear", "factor": 2.0}},
        ),
        ({"rope_parameters": {"rope_theta": 1e4}}, {"rope_scaling": None}),
    ],
)
def test_old_and_new_spellings_of_rope_are_the_same(new, old):
    assert DecoderConfig.from_hf(GOOD | new, "") == DecoderConfig.from_hf(GOOD | old, "")


def test_neox_spellings_are_the_same():
    neox = GOOD | {"model_type": "gpt_neox", "num_key_value_heads": None, "hidden_size": 64}
    new = {"rope_parameters": {"rope_theta": 1e3, "partial_rotary_factor": 0.25}}
    old = {"rotary_emb_base": 1e3, "rotary_pct": 0.25}
    read = DecoderConfig.from_hf(neox | new, "")
    assert read == DecoderConfig.from_hf(neox | old, "")
    assert (read.rotated, read.H, read.parallel) == (4, 16, True)


def test_the_published_models_are_read_as_they_are():
    """Keys of config.json as their folders on the Hub have them."""
    mistral = {
        "model_type": "mistral",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-05,
        "rope_theta": 10000.0,
        "sliding_window": 4096,
        "tie_word_embeddings": False,
        "vocab_size": 32000,
        "hidden_act": "silu",
    }
    pythia = {
        "model_type": "gpt_neox",
        "hidden_act": "gelu",
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "layer_norm_eps": 1e-05,
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
        "rotary_emb_base": 10000,
        "rotary_pct": 0.25,
        "tie_word_embeddings": False,
        "use_parallel_residual": True,
        "vocab_size": 50304,
    }
    assert DecoderConfig.from_hf(mistral, "").window == 4096
    read = DecoderConfig.from_hf(json.loads(json.dumps(pythia)), "")
    assert (read.H, read.rotated, read.projections) == (80, 20, ("qkv", "o", "up", "down"))


@pytest.mark.parametrize("window", [0, -1, "4096", 2.5])
def test_a_window_that_is_no_count_is_refused(window):
    with pytest.raises(InputError, match="sliding_window="):
        DecoderConfig.from_hf(GOOD | {"model_type": "mistral", "sliding_window": window}, "")
