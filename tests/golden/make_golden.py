"""Writes the golden files of this folder: tiny random Llamas and their float32 logits.

Needs the extra `parity` (PyTorch), which the tests do not:

    python tests/golden/make_golden.py

`old` is an untied model with as many key/value heads as query heads and a head width that is not
D/N, its config.json spelt as before transformers 5; `new` is tied and grouped, spelt as today.
"""

import json
from pathlib import Path

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

FOLDER = Path(__file__).parent
SHAPE = dict(
    vocab_size=64, hidden_size=32, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4
)
MODELS = {
    "old": dict(
        **SHAPE, num_key_value_heads=4, head_dim=12, tie_word_embeddings=False, rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 500.0},
    ),
    "new": dict(
        **SHAPE, num_key_value_heads=2, tie_word_embeddings=True, rms_norm_eps=1e-6,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    ),
}  # fmt: skip


def old_spelling(config: dict) -> dict:
    rope = config.pop("rope_parameters")
    config["rope_theta"], config["rope_scaling"] = rope["rope_theta"], None
    return config


def make(name: str) -> None:
    torch.manual_seed(len(name) + ord(name[0]))
    model = LlamaForCausalLM(LlamaConfig(**MODELS[name], initializer_range=0.3)).eval()
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.data.uniform_(0.5, 1.5)
    model.save_pretrained(FOLDER / name)
    (FOLDER / name / "generation_config.json").unlink()
    if name == "old":
        path = FOLDER / name / "config.json"
        path.write_text(json.dumps(old_spelling(json.loads(path.read_text())), indent=2) + "\n")
    tokens = torch.randint(0, SHAPE["vocab_size"], (3, 11))
    mask = torch.ones_like(tokens)
    mask[1, :4], mask[2, :7] = 0, 0  # padded on the left
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        unpadded = model(tokens).logits
        padded = model(tokens, attention_mask=mask, position_ids=positions).logits
    np.savez_compressed(
        FOLDER / name / "logits.npz", tokens=tokens.int().numpy(), mask=mask.bool().numpy(),
        unpadded=unpadded.numpy(), padded=padded.numpy(),
    )  # fmt: skip


if __name__ == "__main__":
    for name in MODELS:
        make(name)
