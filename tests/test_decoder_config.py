"""A config.json that does not describe a Llama is refused in one line."""

import pytest

from sdpo_jax.errors import InputError
from sdpo_jax.models.decoder import DecoderConfig

GOOD = {
    "model_type": "llama", "vocab_size": 97, "num_hidden_layers": 2, "hidden_size": 16,
    "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 24,
}  # fmt: skip


def test_the_head_width_follows_from_width_and_heads():
    config = DecoderConfig.from_hf(GOOD, "config.json")
    assert (config.N, config.G, config.H) == (4, 2, 4)


@pytest.mark.parametrize(("key", "value"), [
    ("num_attention_heads", 0), ("hidden_size", "16"), ("num_key_value_heads", 3),
    ("head_dim", 5), ("vocab_size", None), ("num_hidden_layers", -1), ("intermediate_size", 2.5),
    ("rope_parameters", {"partial_rotary_factor": 0.5}), ("mlp_bias", True),
])  # fmt: skip
def test_a_wrong_size_or_an_unknown_feature_is_refused(key, value):
    with pytest.raises(InputError, match=r"config\.json"):
        DecoderConfig.from_hf(GOOD | {key: value}, "config.json")


def test_a_missing_size_is_named():
    config = {k: v for k, v in GOOD.items() if k != "hidden_size"}
    with pytest.raises(InputError, match="hidden_size"):
        DecoderConfig.from_hf(config, "config.json")
