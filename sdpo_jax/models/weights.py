"""Base weights: the table between Hugging Face's tensor names and our tree, and its readers.

Our tree is the pure dict of a decoder's frozen variables: linear maps as [L, in, out] with the
layers stacked, where Hugging Face has one [out, in] tensor per layer. Shape letters are declared in
`sdpo_jax.system.sharding`.
"""

import dataclasses
import functools
import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors import SafetensorError, safe_open

from sdpo_jax.models.config import DecoderConfig
from sdpo_jax.models.decoder import Decoder
from sdpo_jax.models.lora import LoraConfig
from sdpo_jax.system import errors, files
from sdpo_jax.system.errors import InputError

# (Hugging Face's module, ours); {} is the layer. A module's `.weight` is our kernel, transposed, or
# a norm's scale; a model has the rows that its config switches on.
LLAMA = (
    ("model.embed_tokens", "embedding"),
    ("model.layers.{}.input_layernorm", "layers/attention_norm"),
    ("model.layers.{}.self_attn.q_proj", "layers/q"),
    ("model.layers.{}.self_attn.k_proj", "layers/k"),
    ("model.layers.{}.self_attn.v_proj", "layers/v"),
    ("model.layers.{}.self_attn.q_norm", "layers/q_norm"),
    ("model.layers.{}.self_attn.k_norm", "layers/k_norm"),
    ("model.layers.{}.self_attn.o_proj", "layers/o"),
    ("model.layers.{}.post_attention_layernorm", "layers/mlp_norm"),
    ("model.layers.{}.mlp.gate_proj", "layers/gate"),
    ("model.layers.{}.mlp.up_proj", "layers/up"),
    ("model.layers.{}.mlp.down_proj", "layers/down"),
    ("model.norm", "norm"),
    ("lm_head", "head"),
)
GPT_NEOX = (
    ("gpt_neox.embed_in", "embedding"),
    ("gpt_neox.layers.{}.input_layernorm", "layers/attention_norm"),
    ("gpt_neox.layers.{}.attention.query_key_value", "layers/qkv"),
    ("gpt_neox.layers.{}.attention.dense", "layers/o"),
    ("gpt_neox.layers.{}.post_attention_layernorm", "layers/mlp_norm"),
    ("gpt_neox.layers.{}.mlp.dense_h_to_4h", "layers/up"),
    ("gpt_neox.layers.{}.mlp.dense_4h_to_h", "layers/down"),
    ("gpt_neox.final_layer_norm", "norm"),
    ("embed_out", "head"),
)
# (path of a tensor below ours, suffix of Hugging Face's name, transposed)
PARTS = (("/kernel", ".weight", True), ("/scale", ".weight", False), ("/bias", ".bias", False))
WHOLE = "expected JSON: give the folder of a whole model"
LAYOUT = "1"  # of weights/: a folder written under another number is not the same output
LISTED = 20  # tensors in a message
# Buffers of old checkpoints, which are not learnt.
IGNORED_SUFFIXES = (
    "rotary_emb.inv_freq",
    ".attention.bias",
    ".attention.masked_bias",
    "embeddings.position_ids",
)
DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
# How tensors of GPTQ, AWQ, bitsandbytes, compressed-tensors, float8, MLX, HQQ and EXL2 end.
PACKED = (
    ".qweight",
    ".qzeros",
    ".g_idx",
    ".absmax",
    ".quant_map",
    ".SCB",
    ".weight_packed",
    ".weight_scale",
    ".weight_scale_inv",
    ".weight_zero_point",
    ".scales",
    ".W_q",
    ".q_weight",
)


@dataclasses.dataclass(frozen=True)
class Slot:
    """Where a tensor goes: our path, and the layer of a stacked array (or None)."""

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
    return slots_of(modules(config), abstract_base(config), config.L)


def slots_of(modules: Sequence[tuple[str, str]], shapes, layers: int) -> dict[str, Slot]:
    """Hugging Face's name of every tensor -> its slot; `shapes` has the paths of ours."""
    table = {}
    for module, ours in modules:
        tensors = [(ours + part, module + suffix, transposed) for part, suffix, transposed in PARTS]
        # Embedding and head are arrays without parts.
        tensors.append((ours, f"{module}.weight", ours == "head"))
        for path, name, transposed in tensors:
            if path in shapes:
                for layer in range(layers) if "{}" in name else [None]:
                    table[name.format(layer)] = Slot(path, layer, transposed)
    return table


def modules(config: DecoderConfig) -> tuple[tuple[str, str], ...]:
    """(Hugging Face's module, ours) of a family."""
    return GPT_NEOX if config.family == "gpt_neox" else LLAMA


@functools.cache
def abstract_base(config: DecoderConfig) -> dict[str, jax.ShapeDtypeStruct]:
    """Path ("layers/q/kernel") -> shape of every array of the base."""
    make = functools.partial(Decoder, config, LoraConfig(targets=()))
    base = nnx.state(nnx.eval_shape(lambda: make(rngs=nnx.Rngs(0))))
    arrays: dict[str, Any] = flatten_dict(nnx.to_pure_dict(base), sep="/")
    return arrays


def read_base(source: Source, config: DecoderConfig) -> tuple[dict[str, Any], str]:
    """Reads a source into (our tree of numpy arrays, its dtype), as `read_arrays` does.

    Raises InputError also where a tied model's head is not its embedding.
    """
    flat, dtype = read_arrays(source, slots(config), abstract_base(config), tied_head(config))
    _check_tied(source, config, flat["embedding"])
    return unflatten_dict(flat, sep="/"), dtype


def read_arrays(
    source: Source, table: dict[str, Slot], shapes, spare: str | None = None
) -> tuple[dict[str, np.ndarray], str]:
    """Reads a source into (our path -> array, their dtype), one tensor at a time.

    The dtype is the checkpoint's; where tensors differ it is the narrowest that holds them all.

    Args:
      source: the checkpoint.
      table: Hugging Face's names -> slots.
      shapes: our path -> the shape of an array.
      spare: the name of a tensor that may be there and is not read.

    Raises:
      InputError: lists missing, unused, mis-shaped and unreadable tensors in one line.
    """
    problems = list(_problems(source, table, shapes, spare))
    if problems:
        more = ["…"] if len(problems) > LISTED else []
        raise InputError(
            f"{source.where}: {len(problems)} tensors do not fit: "
            f"{'; '.join([*problems[:LISTED], *more])}: "
            "give the whole model that the config describes"
        )
    names = sorted({source.tensors[name][1] for name in table})
    dtype = functools.reduce(jnp.promote_types, names)
    flat = {path: np.empty(leaf.shape, dtype) for path, leaf in shapes.items()}
    for name, slot in table.items():
        tensor = source.read(name)
        target = flat[slot.path] if slot.layer is None else flat[slot.path][slot.layer]
        target[...] = tensor.T if slot.transposed else tensor
    return flat, jnp.dtype(dtype).name


def _problems(source: Source, table, shapes, spare: str | None) -> Iterator[str]:
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
    for name, (_, dtype) in source.tensors.items():
        if name == spare and dtype not in DTYPES.values():
            yield f"{name} is {dtype}, expected {', '.join(DTYPES.values())}"
        elif not (name in table or name.endswith(IGNORED_SUFFIXES) or name == spare):
            yield f"{name} is not used"


def _check_tied(source: Source, config: DecoderConfig, embedding: np.ndarray) -> None:
    """A tied checkpoint may store the head too, which must equal the embedding."""
    head = tied_head(config)
    if head not in source.tensors:
        return
    if not np.array_equal(source.read(head).astype(embedding.dtype), embedding):
        raise InputError(
            f"{source.where}: {head} differs from {modules(config)[0][0]}.weight, but config.json "
            "has tie_word_embeddings true: set it to false"
        )


def tied_head(config: DecoderConfig) -> str | None:
    """The name under which a tied model may store its embedding once more."""
    return f"{modules(config)[-1][0]}.weight" if config.tied else None


def safetensors_files(folder: Path) -> list[Path]:
    """The weight files of a Hugging Face folder: one, or the shards its index names."""
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if os.path.lexists(single):
        return [single]
    if not os.path.lexists(index):
        raise _no_weights(folder)
    weight_map = files.read_object(index, WHOLE).get("weight_map")
    if not isinstance(weight_map, dict) or not all(
        isinstance(name, str) and Path(name).name == name and name.endswith(".safetensors")
        for name in weight_map.values()
    ):
        raise InputError(
            f"{index}: weight_map is not a map of tensor names to .safetensors files beside it: "
            "fetch the file again"
        )
    shards = [folder / name for name in sorted(set(weight_map.values()))]
    missing = [path.name for path in shards if not os.path.exists(path)]
    if missing:
        raise InputError(
            f"{index}: names files that are not there ({', '.join(missing)}): fetch them"
        )
    return shards


def _no_weights(folder: Path) -> InputError:
    if os.path.lexists(folder / "adapter_config.json"):
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
    config = files.read_object(folder / "config.json", WHOLE)
    owner: dict[str, Path] = {}
    tensors = {}
    for path in safetensors_files(folder):
        with _opened(path) as file:
            for name in file.keys():  # noqa: SIM118 - a safetensors handle is no mapping
                part = file.get_slice(name)
                stored = part.get_dtype()
                tensors[name] = tuple(part.get_shape()), DTYPES.get(stored, stored)
                owner[name] = path
    _check_quantized(folder, config, tensors)

    def read(name: str) -> np.ndarray:
        with _opened(owner[name]) as file:
            return file.get_tensor(name)

    return Source(str(folder), config, tensors, read, functools.partial(_copy_tokenizer, folder))


def _check_quantized(folder: Path, config: dict[str, Any], tensors: dict[str, Any]) -> None:
    """Raises InputError where tensors are quantized, whatever config.json says."""
    packed = [
        name
        for name, (_, dtype) in tensors.items()
        if name.endswith(PACKED) or (name.endswith(".weight") and dtype not in DTYPES.values())
    ]
    if packed:
        found = config.get("quantization_config")
        method = found.get("quant_method") if isinstance(found, dict) else None
        raise InputError(
            f"{folder}: found a quantized model ({errors.brief(method or packed[0])}), expected "
            "one whose weights are float32, float16 or bfloat16: give the model that it was made "
            "of; training can hold it in fewer bits, with --config.base_dtype=nf4 or int8"
        )


def _opened(path: Path):
    try:
        return safe_open(path, framework="numpy")
    except (SafetensorError, OSError, ValueError) as error:
        raise InputError(
            f"{path}: found broken safetensors ({error}), expected a whole file: fetch it again"
        ) from error


# The last one names, with config.json, the tokens that end a generation.
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.jinja",
    "generation_config.json",
)


def _copy_tokenizer(folder: Path, target: Path) -> None:
    for name in TOKENIZER_FILES:
        if (folder / name).exists():
            (target / name).write_bytes((folder / name).read_bytes())


def source_digest(model: Path) -> str:
    """SHA-256 over the names and bytes of every file that is read."""
    files = [model]
    if not model.is_file():
        tokenizer = (model / name for name in TOKENIZER_FILES if os.path.lexists(model / name))
        files = [model / "config.json", *safetensors_files(model), *tokenizer]
    digest = hashlib.sha256(LAYOUT.encode())
    for path in files:
        try:
            with open(path, "rb") as file:
                digest.update(path.name.encode() + hashlib.file_digest(file, "sha256").digest())
        except OSError as error:
            raise InputError(f"{path}: {error.strerror}: give a whole model") from error
    return digest.hexdigest()
