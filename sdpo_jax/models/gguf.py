"""GGUF files of the Llama architecture, read as if they were Hugging Face folders.

Tensors come out dequantized in float32 under Hugging Face's names and in its row order; the
tokenizer is built from the file's metadata.
"""

import functools
import json
import re
from pathlib import Path
from typing import Any

import numpy as np

from sdpo_jax.models.weights import Source
from sdpo_jax.system.errors import InputError

NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
# Pre-tokenizers whose rule is: single digits, then GPT-2's byte-level split.
DIGITS_THEN_BYTES = ("smollm", "starcoder", "refact", "command-r")
CONTROL, USER_DEFINED = 3, 4  # tokenizer.ggml.token_type
# The reader trusts the file's offsets, counts and types, so a damaged one raises any of these.
BROKEN = (
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    ArithmeticError,
    MemoryError,
    OSError,
    RecursionError,
)


def open_gguf(path: Path) -> Source:
    """Reads a GGUF file. Raises InputError where it is broken, or no Llama."""
    reader, dequantize = _reader(path)
    fields = {name: field for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    try:
        config = _config(path, {k: f.contents() for k, f in fields.items() if len(f.data) <= 1})
    except KeyError as error:
        raise InputError(f"{path}: key {error} is missing: is this a whole model?") from None
    except BROKEN as error:
        raise _unreadable(path, error) from error
    by_name = {_hf_name(tensor.name): tensor for tensor in reader.tensors}
    shapes = {name: tuple(int(n) for n in t.shape[::-1]) for name, t in by_name.items()}
    config["vocab_size"] = shapes.get("model.embed_tokens.weight", (0,))[0]
    config["tie_word_embeddings"] = "lm_head.weight" not in by_name

    def read(name: str) -> np.ndarray:
        tensor = by_name[name]
        try:
            rows = dequantize(tensor.data, tensor.tensor_type).reshape(shapes[name])
        except NotImplementedError:
            raise InputError(
                f"{path}: {tensor.name} is {tensor.tensor_type.name}, which cannot be dequantized "
                "here: use a file of F32, F16, BF16, Q4_0 to Q8_0 or K-quants"
            ) from None
        if name.endswith("q_proj.weight"):
            return unpermute(rows, config["num_attention_heads"])
        if name.endswith("k_proj.weight"):
            return unpermute(rows, config["num_key_value_heads"])
        return rows

    return Source(
        where=str(path),
        config=config,
        tensors={name: (shape, "float32") for name, shape in shapes.items()},
        read=read,
        write_tokenizer=functools.partial(_write_tokenizer, path, fields),
    )


def unpermute(w: np.ndarray, heads: int) -> np.ndarray:
    """Rows of q or k [heads*H, D] from interleaved RoPE order back to half-split order."""
    return w.reshape(heads, w.shape[0] // heads // 2, 2, -1).swapaxes(1, 2).reshape(w.shape)


def _reader(path: Path):
    try:
        from gguf import GGUFReader
        from gguf.quants import dequantize
    except ImportError as error:
        raise InputError(
            f"{path}: reading GGUF needs the package gguf: pip install -e '.[quickstart]'"
        ) from error

    class Reader(GGUFReader):
        """Refuses to read past the file's end, where a wrong count would loop for ever."""

        def _get(self, offset, dtype, count=1, override_order=None):
            if int(offset) + np.dtype(dtype).itemsize * int(count) > len(self.data):
                raise ValueError("a count or size reaches beyond its end")
            return super()._get(offset, dtype, count, override_order)

    try:
        return Reader(path), dequantize
    except BROKEN as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: Exception) -> InputError:
    return InputError(
        f"{path}: found no readable GGUF ({error}), expected a whole file: fetch it again"
    )


def _hf_name(name: str) -> str:
    """`blk.3.attn_q.weight` -> `model.layers.3.self_attn.q_proj.weight`; unknown names stay."""
    match = re.fullmatch(r"(blk\.(\d+)\.)?(\w+)\.weight", name)
    if not match or match[3] not in NAMES:
        return name
    return (f"model.layers.{match[2]}." if match[1] else "") + NAMES[match[3]] + ".weight"


def _config(path: Path, meta: dict[str, Any]) -> dict[str, Any]:
    """The metadata as a Hugging Face config.json, less what follows from the tensors."""
    family = meta["general.architecture"]
    if family != "llama":
        raise InputError(f"{path}: general.architecture is {family!r}, expected 'llama'")
    heads, width = meta["llama.attention.head_count"], meta["llama.embedding_length"]
    head_dim = meta.get("llama.attention.key_length", width // heads)
    rotated = meta.get("llama.rope.dimension_count", head_dim)
    if rotated != head_dim:
        raise InputError(
            f"{path}: RoPE turns {rotated} of a head's {head_dim} values, expected all"
        )
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": width,
        "num_hidden_layers": meta["llama.block_count"],
        "num_attention_heads": heads,
        "num_key_value_heads": meta.get("llama.attention.head_count_kv", heads),
        "head_dim": head_dim,
        "intermediate_size": meta["llama.feed_forward_length"],
        "rms_norm_eps": float(
            np.format_float_positional(np.float32(meta["llama.attention.layer_norm_rms_epsilon"]))
        ),
        "rope_theta": meta.get("llama.rope.freq_base", 10000.0),
        "max_position_embeddings": meta["llama.context_length"],
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": meta.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": meta.get("tokenizer.ggml.eos_token_id"),
        "pad_token_id": meta.get("tokenizer.ggml.padding_token_id"),
        "torch_dtype": "float32",
    }
    scaling = meta.get("llama.rope.scaling.type", "none")
    if scaling != "none":
        config["rope_scaling"] = {"rope_type": scaling}
    return config


def _write_tokenizer(path: Path, fields: dict[str, Any], folder: Path) -> None:
    """Writes tokenizer.json and tokenizer_config.json."""
    try:
        meta = {key: fields[key].contents() for key in fields if key.startswith("tokenizer.")}
    except BROKEN as error:
        raise _unreadable(path, error) from error
    kind = meta.get("tokenizer.ggml.model"), meta.get("tokenizer.ggml.pre")
    if kind[0] != "gpt2" or kind[1] not in DIGITS_THEN_BYTES:
        raise InputError(
            f"{path}: tokenizer.ggml.model/pre is {kind[0]}/{kind[1]}, expected gpt2 with one of "
            f"{', '.join(DIGITS_THEN_BYTES)}: convert the model's Hugging Face folder instead"
        )
    try:
        tokens, special = _build_tokenizer(meta, folder / "tokenizer.json")
    except Exception as error:  # tokenizers raises plain Exception
        raise InputError(f"{path}: the tokenizer's metadata is broken: {error!r}") from error
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_max_length": fields["llama.context_length"].contents(),
        "additional_special_tokens": special,
    }
    for name in ("bos", "eos", "unknown", "padding"):
        index = meta.get(f"tokenizer.ggml.{name}_token_id")
        if type(index) is int and 0 <= index < len(tokens):
            config[{"unknown": "unk", "padding": "pad"}.get(name, name) + "_token"] = tokens[index]
    if isinstance(template := meta.get("tokenizer.chat_template"), str):
        (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(
        json.dumps(config, indent=2, ensure_ascii=False), encoding="utf-8"
    )


def _build_tokenizer(meta: dict[str, Any], path: Path) -> tuple[list[str], list[str]]:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

    tokens, types = meta["tokenizer.ggml.tokens"], meta["tokenizer.ggml.token_type"]
    vocab = {token: index for index, token in enumerate(tokens)}
    merges = [tuple(merge.split(" ", 1)) for merge in meta["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE(vocab, merges))
    space = meta.get("tokenizer.ggml.add_space_prefix", False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=space, use_regex=True),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special, added = (
        [token for token, kind in zip(tokens, types, strict=True) if kind == wanted]
        for wanted in (CONTROL, USER_DEFINED)
    )
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in special])
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in added])
    if meta.get("tokenizer.ggml.add_bos_token", False):
        index = meta["tokenizer.ggml.bos_token_id"]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{tokens[index]} $A", special_tokens=[(tokens[index], index)]
        )
    tokenizer.save(str(path))
    return tokens, special
