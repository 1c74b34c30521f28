"""Writes the golden files of this folder: tiny random models of each family, and their logits;
`bert` is an encoder, with its hidden states.

Needs the extra `parity` (PyTorch), which the tests do not:

    python tests/golden/make_golden.py [NAME …]

`llama-old` is an untied model with as many key/value heads as query heads and a head width that is
not D/N, `neox-old` one whose attention and MLP come one after the other; their config.json is spelt
as before transformers 5. `mistral`'s window and `dynamic`'s length are shorter than the text.
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM, BertConfig, BertModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

FOLDER = Path(__file__).parent
SHAPE = dict(
    vocab_size=64, hidden_size=32, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4
)
GROUPED = SHAPE | {"num_key_value_heads": 2}


def rope(kind: str = "default", theta: float = 10000.0, **keys) -> dict:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": theta, **keys}}


LLAMA3 = dict(
    factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=16
)
MODELS = {
    "llama-old": (
        "llama",
        dict(
            **SHAPE,
            num_key_value_heads=4,
            head_dim=12,
            tie_word_embeddings=False,
            rms_norm_eps=1e-5,
            **rope(theta=500.0),
        ),
    ),
    "llama-new": ("llama", dict(**GROUPED, tie_word_embeddings=True, rms_norm_eps=1e-6, **rope())),
    "llama3": (
        "llama",
        dict(**GROUPED, attention_bias=True, mlp_bias=True, **rope("llama3", **LLAMA3)),
    ),
    "linear": ("llama", dict(**GROUPED, **rope("linear", factor=2.0))),
    "dynamic": ("llama", dict(**GROUPED, max_position_embeddings=8, **rope("dynamic", factor=2.0))),
    "mistral": ("mistral", dict(**GROUPED, head_dim=12, sliding_window=5, **rope(theta=1e6))),
    "qwen2": ("qwen2", dict(**GROUPED, tie_word_embeddings=True, **rope(theta=1e6))),
    "qwen3": ("qwen3", dict(**GROUPED, head_dim=12, **rope(theta=1e6))),
    "neox": (
        "gpt_neox",
        dict(**SHAPE, use_parallel_residual=True, **rope(partial_rotary_factor=0.5)),
    ),
    "neox-old": (
        "gpt_neox",
        dict(
            **SHAPE,
            use_parallel_residual=False,
            hidden_act="gelu_new",
            **rope(theta=500.0, partial_rotary_factor=0.25),
        ),
    ),
}


def make_model(name: str, seed: int) -> torch.nn.Module:
    """A random model whose attention, gates and norms are all far from trivial."""
    kind, keys = MODELS[name]
    torch.manual_seed(seed)
    config = CONFIG_MAPPING[kind](**keys, initializer_range=0.3)
    model = AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.data.uniform_(0.5, 1.5)
    return model


def make_encoder(seed: int) -> BertModel:
    """A random encoder, its norms and biases far from trivial."""
    torch.manual_seed(seed)
    model = BertModel(BertConfig(**SHAPE, max_position_embeddings=24, initializer_range=0.3)).eval()
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.data.uniform_(0.5, 1.5)
    return model


def hidden_of(model: BertModel, seed: int) -> dict[str, np.ndarray]:
    """Tokens, their lengths, and hidden states of the text padded on its right."""
    torch.manual_seed(seed)
    tokens, lengths = torch.randint(0, SHAPE["vocab_size"], (3, 11)), torch.tensor([11, 7, 2])
    mask = (torch.arange(11) < lengths[:, None]).int()
    with torch.no_grad():
        hidden = model(tokens, attention_mask=mask).last_hidden_state
    return dict(tokens=tokens.int().numpy(), lengths=lengths.numpy(), hidden=hidden.numpy())


def old_spelling(config: dict) -> dict:
    """config.json as it was before transformers 5."""
    found = config.pop("rope_parameters")
    if config["model_type"] == "gpt_neox":
        config["rotary_emb_base"] = found["rope_theta"]
        config["rotary_pct"] = found["partial_rotary_factor"]
    else:
        config["rope_theta"], config["rope_scaling"] = found["rope_theta"], None
    return config


def save_model(model: torch.nn.Module, name: str, folder: Path) -> None:
    model.save_pretrained(folder)
    (folder / "generation_config.json").unlink()
    if name.endswith("-old"):
        path = folder / "config.json"
        path.write_text(json.dumps(old_spelling(json.loads(path.read_text())), indent=2) + "\n")


def logits_of(model: torch.nn.Module, seed: int) -> dict[str, np.ndarray]:
    """Tokens, their mask, and logits of the whole text and of the text padded on the left."""
    torch.manual_seed(seed)
    tokens = torch.randint(0, SHAPE["vocab_size"], (3, 11))
    mask = torch.ones_like(tokens)
    mask[1, :4], mask[2, :7] = 0, 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        unpadded = model(tokens).logits
        padded = model(tokens, attention_mask=mask, position_ids=positions).logits
    return dict(
        tokens=tokens.int().numpy(),
        mask=mask.bool().numpy(),
        unpadded=unpadded.numpy(),
        padded=padded.numpy(),
    )


if __name__ == "__main__":
    for name in sys.argv[1:] or [*MODELS, "bert"]:
        if name == "bert":
            encoder = make_encoder(seed=0)
            encoder.save_pretrained(FOLDER / name)
            np.savez_compressed(FOLDER / name / "hidden.npz", **hidden_of(encoder, seed=0))
            continue
        model = make_model(name, seed=len(name))
        save_model(model, name, FOLDER / name)
        np.savez_compressed(FOLDER / name / "logits.npz", **logits_of(model, seed=len(name)))
