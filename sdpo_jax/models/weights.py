"""Base weights: the table between Hugging Face's tensor names and our tree, and its readers.

Our tree is the pure dict of a decoder's frozen variables: linear maps as [L, in, out] with the
layers stacked, where Hugging Face has one [out, in] tensor a layer. Shape letters are declared in
`sdpo_jax.sharding`.
"""

import dataclasses
import functools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors import SafetensorError, safe_open

from sdpo_jax.errors import InputError
from sdpo_jax.models.decoder import Decoder, DecoderConfig
from sdpo_jax.models.lora import LoraConfig

# (Hugging Face's name, our path, transposed); {} is the layer.
LLAMA = (
    ("model.embed_tokens.weight", "embedding", False),
    ("model.layers.{}.input_layernorm.weight", "layers/attention_norm/scale", False),
    ("model.layers.{}.self_attn.q_proj.weight", "layers/q/kernel", True),
    ("model.layers.{}.self_attn.k_proj.weight", "layers/k/kernel", True),
    ("model.layers.{}.self_attn.v_proj.weight", "layers/v/kernel", True),
    ("model.layers.{}.self_attn.o_proj.weight", "layers/o/kernel", True),
    ("model.layers.{}.post_attention_layernorm.weight", "layers/mlp_norm/scale", False),
    ("model.layers.{}.mlp.gate_proj.weight", "layers/gate/kernel", True),
    ("model.layers.{}.mlp.up_proj.weight", "layers/up/kernel", True),
    ("model.layers.{}.mlp.down_proj.weight", "layers/down/kernel", True),
    ("model.norm.weight", "norm/scale", False),
    ("lm_head.weight", "head", True),
)
EMBEDDING, HEAD = LLAMA[0][0], LLAMA[-1][0]
# Buffers of old checkpoints that hold nothing learnt.
IGNORED_SUFFIX = "rotary_emb.inv_freq"
DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


@dataclasses.dataclass(frozen=True)
class Slot:
    """Where a tensor goes: our path, the layer of a stacked array (or None), and the turn."""

    path: str
    layer: int | None
    transposed: bool


@dataclasses.dataclass(frozen=True)
class Source:
    """A model to convert: `tensors` maps Hugging Face's names to (shape, dtype name).

    `read(name)` returns one tensor in Hugging Face's orientation; `write_tokenizer(folder)` writes
    what `transformers.AutoTokenizer` needs.
    """

    where: str
    config: dict[str, Any]
    tensors: dict[str, tuple[tuple[int, ...], str]]
    read: Callable[[str], np.ndarray]
    write_tokenizer: Callable[[Path], None]


def slots(config: DecoderConfig) -> dict[str, Slot]:
    """Hugging Face's name of every base tensor of a decoder -> its slot."""
    table = {}
    for name, path, transposed in LLAMA:
        if path == "head" and config.tied:
            continue
        stacked = "{}" in name
        for layer in range(config.L) if stacked else [None]:
            table[name.format(layer)] = Slot(path, layer, transposed)
    return table


def abstract_base(config: DecoderConfig) -> dict[str, jax.ShapeDtypeStruct]:
    """Path ("layers/q/kernel") -> shape of every array of the base."""
    make = functools.partial(Decoder, config, LoraConfig(targets=()))
    base = nnx.state(nnx.eval_shape(lambda: make(rngs=nnx.Rngs(0))))
    return flatten_dict(nnx.to_pure_dict(base), sep="/")


def read_base(source: Source, config: DecoderConfig) -> tuple[dict[str, Any], str]:
    """Reads a source into (our tree of numpy arrays, its dtype), one tensor at a time.

    The dtype is the checkpoint's; where tensors differ it is the narrowest that holds them all.

    Raises:
      InputError: lists every missing, unused, mis-shaped or unreadable tensor in one line.
    """
    table, shapes = slots(config), abstract_base(config)
    problems = list(_problems(source, table, shapes, config))
    if problems:
        raise InputError(
            f"{source.where}: {len(problems)} tensors do not fit: {'; '.join(problems)}: "
            "give the whole Llama model that the config describes"
        )
    names = sorted({source.tensors[name][1] for name in table})
    dtype = functools.reduce(jnp.promote_types, names)
    flat = {path: np.empty(leaf.shape, dtype) for path, leaf in shapes.items()}
    for name, slot in table.items():
        tensor = source.read(name)
        target = flat[slot.path] if slot.layer is None else flat[slot.path][slot.layer]
        target[...] = tensor.T if slot.transposed else tensor
    _check_tied(source, config, flat["embedding"])
    return unflatten_dict(flat, sep="/"), jnp.dtype(dtype).name


def _problems(source: Source, table, shapes, config: DecoderConfig) -> Iterator[str]:
    for name, slot in table.items():
        if name not in source.tensors:
            yield f"{name} is missing"
            continue
        found, dtype = source.tensors[name]
        expected = shapes[slot.path].shape[0 if slot.layer is None else 1 :]
        expected = expected[::-1] if slot.transposed else expected
        if found != expected:
            yield f"{name} has shape {list(found)}, expected {list(expected)}"
        elif dtype not in DTYPES.values():
            yield f"{name} is {dtype}, expected {', '.join(DTYPES.values())}"
    for name in source.tensors:
        known = name in table or name.endswith(IGNORED_SUFFIX) or (name == HEAD and config.tied)
        if not known:
            yield f"{name} is not used"


def _check_tied(source: Source, config: DecoderConfig, embedding: np.ndarray) -> None:
    """Some tied checkpoints store the head too: it must be the embedding."""
    if not config.tied or HEAD not in source.tensors:
        return
    if not np.array_equal(source.read(HEAD).astype(embedding.dtype), embedding):
        raise InputError(
            f"{source.where}: {HEAD} differs from {EMBEDDING}, but config.json has "
            "tie_word_embeddings true: set it to false"
        )


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises InputError where it cannot be read or is no object."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path}: no such file: give the folder of a whole model") from None
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: found {error}, expected JSON: fetch the file again") from error
    if not isinstance(content, dict):
        raise InputError(f"{path}: found a {type(content).__name__}, expected a JSON object")
    return content


def safetensors_files(folder: Path) -> list[Path]:
    """The weight files of a Hugging Face folder: one, or the shards its index names."""
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.exists():
        return [single]
    if not index.exists():
        raise _no_weights(folder)
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(
        isinstance(name, str) and Path(name).name == name for name in weight_map.values()
    ):
        raise InputError(f"{index}: weight_map is not a map of tensor names to files beside it")
    files = [folder / name for name in sorted(set(weight_map.values()))]
    missing = [path.name for path in files if not path.exists()]
    if missing:
        raise InputError(
            f"{index}: names files that are not there ({', '.join(missing)}): fetch them"
        )
    return files


def _no_weights(folder: Path) -> InputError:
    if (folder / "adapter_config.json").exists():
        return InputError(f"{folder}: found a PEFT adapter, expected a whole model: give its base")
    if any(folder.glob("*.bin")) or any(folder.glob("*.pth")):
        return InputError(
            f"{folder}: found only .bin/.pth weights, expected model.safetensors: save it again "
            "with transformers: AutoModelForCausalLM.from_pretrained(PATH).save_pretrained(DIR)"
        )
    return InputError(
        f"{folder}: found no model.safetensors nor model.safetensors.index.json: give the folder "
        "of a whole model, or a .gguf file"
    )


def open_hf(folder: Path) -> Source:
    """A Hugging Face folder: config.json, safetensors (one file or shards), tokenizer files."""
    config = read_json(folder / "config.json")
    owner: dict[str, Path] = {}
    tensors = {}
    for path in safetensors_files(folder):
        with _opened(path) as file:
            for name in file.keys():  # noqa: SIM118 - a safetensors handle is no mapping
                part = file.get_slice(name)
                stored = part.get_dtype()
                tensors[name] = tuple(part.get_shape()), DTYPES.get(stored, stored)
                owner[name] = path

    def read(name: str) -> np.ndarray:
        with _opened(owner[name]) as file:
            return file.get_tensor(name)

    return Source(str(folder), config, tensors, read, functools.partial(_copy_tokenizer, folder))


def _opened(path: Path):
    try:
        return safe_open(path, framework="numpy")
    except (SafetensorError, OSError) as error:
        raise InputError(
            f"{path}: found broken safetensors ({error}), expected a whole file: fetch it again"
        ) from error


TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "merges.txt", "chat_template.jinja",
)  # fmt: skip


def _copy_tokenizer(folder: Path, target: Path) -> None:
    for name in TOKENIZER_FILES:
        if (folder / name).exists():
            (target / name).write_bytes((folder / name).read_bytes())
