"""Adapters in PEFT's format: adapter_config.json and adapter_model.safetensors.

PEFT stores A as [R, in] and B as [out, R], one pair per layer, under the base model's module names.
"""

import functools
import json
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from sdpo_jax.models.config import DecoderConfig
from sdpo_jax.models.decoder import Decoder
from sdpo_jax.models.lora import LoraConfig
from sdpo_jax.models.weights import modules
from sdpo_jax.system.errors import InputError, brief
from sdpo_jax.system.files import read_object

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
# Features that are not read here -> the values that mean that an adapter does not use them.
PLAIN = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    "use_rslora": (False, None),
    "use_dora": (False, None),
    "lora_bias": (False, None),
    "fan_in_fan_out": (False, None),
    "modules_to_save": (None, []),
    "rank_pattern": ({}, None),
    "alpha_pattern": ({}, None),
    "layers_to_transform": (None, []),
    "layer_replication": (None, []),
    "target_parameters": (None, []),
    "trainable_token_indices": (None, [], {}),
    "alora_invocation_tokens": (None, []),
    "use_qalora": (False, None),
    "use_bdlora": (False, None),
    "arrow_config": (None, {}),
    "kasa_config": (None, {}),
    # Other initializations (PiSSA, OLoRA, LoftQ, …) take a part out of the base.
    "init_lora_weights": (True, False, None, "gaussian", "eva", "orthogonal"),
}


def adapted_modules(config: DecoderConfig) -> dict[str, str]:
    """Our projection ("q") -> Hugging Face's module, with {} for the layer."""
    names = {ours.removeprefix("layers/"): module for module, ours in modules(config)}
    return {name: names[name] for name in config.projections}


def write_adapter(
    folder: Path,
    tree: dict[str, Any],
    lora: LoraConfig,
    config: DecoderConfig,
    base: str,
    revision: str | None = None,
    dtype: Any = np.float32,
) -> None:
    """Writes both files into `folder`, which exists.

    Args:
      folder: where to.
      tree: {"layers": {"q": {"a": [L, in, R], "b": [L, R, out]}, …}} as host arrays.
      lora: rank, alpha and dropout.
      config: of the decoder.
      base: what loads the base model in transformers, a path or a name on the Hub.
      revision: of that name.
      dtype: of the tensors.
    """
    flat: dict[str, Any] = flatten_dict(tree["layers"], sep="/")
    used = {name: m for name, m in adapted_modules(config).items() if f"{name}/a" in flat}
    tensors = {
        f"{PREFIX}{module.format(layer)}.lora_{part.upper()}.weight": np.ascontiguousarray(
            np.asarray(flat[f"{name}/{part}"][layer], dtype).T
        )
        for name, module in used.items()
        for part in ("a", "b")
        for layer in range(config.L)
    }
    save_file(tensors, folder / TENSORS, metadata={"format": "pt"})
    alpha = int(lora.alpha) if float(lora.alpha).is_integer() else lora.alpha
    content = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "revision": revision,
        "r": lora.rank,
        "lora_alpha": alpha,
        "lora_dropout": lora.dropout,
        "target_modules": sorted(module.rsplit(".", 1)[1] for module in used.values()),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    (folder / CONFIG).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def lora_of(folder: Path, config: DecoderConfig) -> LoraConfig:
    """Rank, alpha and targets that an adapter's own config names. Raises InputError."""
    if not os.path.isfile(folder / CONFIG):
        raise InputError(f"{folder}: found no {CONFIG}, expected the folder of a PEFT adapter")
    content = read_object(folder / CONFIG, "expected that of a PEFT adapter")
    names = {m.rsplit(".", 1)[1]: name for name, m in adapted_modules(config).items()}
    modules: Any = content.get("target_modules")
    rank: Any = content.get("r")
    alpha: Any = content.get("lora_alpha")
    numbers = type(rank) is int and isinstance(alpha, (int, float))
    if not numbers or type(modules) is not list or not all(m in names for m in modules):
        found = f"target_modules {brief(modules)}, r {brief(rank)}, lora_alpha {brief(alpha)}"
        raise InputError(
            f"{folder}/{CONFIG}: found {found}, expected two numbers and some of "
            f"{', '.join(names)}: is it the adapter of another model?"
        )
    return LoraConfig(rank, alpha, targets=tuple(names[m] for m in modules))


def read_adapter(folder: Path, lora: LoraConfig, config: DecoderConfig) -> dict[str, Any]:
    """The adapter of a PEFT folder as {"layers": {"q": {"a", "b"}, …}} of float32 host arrays.

    Raises:
      InputError: no adapter there, one that is more than plain LoRA, one of another rank, alpha or
        other targets than `lora`, or whose tensors are not exactly those of this model.
    """
    _check_plain(folder, lora)
    tensors = _read_tensors(folder)
    lora = lora.on(config.projections)
    found = {}
    expected = set()
    for name in lora.targets:
        module = adapted_modules(config)[name]
        for part in ("a", "b"):
            keys = [f"{module.format(i)}.lora_{part.upper()}.weight" for i in range(config.L)]
            expected |= set(keys)
            if all(key in tensors for key in keys):
                found[f"layers/{name}/{part}"] = [tensors[key].T for key in keys]
    if expected != set(tensors):
        _refuse_keys(folder, tensors, expected, config)
    shapes = adapter_shapes(lora, config)
    wrong = [
        f"{path} of layer {layer} is {list(array.shape)}, expected {list(shapes[path][1:])}"
        for path, arrays in found.items()
        for layer, array in enumerate(arrays)
        if array.shape != shapes[path][1:]
    ]
    if wrong:
        raise InputError(
            f"{folder}/{TENSORS}: {len(wrong)} tensors have another shape, here transposed as ours "
            f"({wrong[0]}): is it the adapter of another model?"
        )
    stacked = {path: np.stack(arrays).astype(np.float32) for path, arrays in found.items()}
    return unflatten_dict(stacked, sep="/")


def adapter_shapes(lora: LoraConfig, config: DecoderConfig) -> dict[str, tuple[int, ...]]:
    """Path ("layers/q/a") -> [L, in, R] or [L, R, out]."""
    make = functools.partial(Decoder, config, lora)
    adapter = nnx.state(nnx.eval_shape(lambda: make(rngs=nnx.Rngs(0))), nnx.LoRAParam)
    arrays: dict[str, Any] = flatten_dict(nnx.to_pure_dict(adapter), sep="/")
    return {name: array.shape for name, array in arrays.items()}


def _check_plain(folder: Path, lora: LoraConfig) -> None:
    if not os.path.isfile(folder / CONFIG):
        raise InputError(
            f"config.lora.init_from: found no {CONFIG} in {folder}, expected the folder of a PEFT "
            "adapter"
        )
    content = read_object(folder / CONFIG, "expected that of a PEFT adapter")
    for key, plain in PLAIN.items():
        if content.get(key, plain[0]) not in plain:
            raise InputError(
                f"{folder}/{CONFIG}: {key} is {brief(content[key])}, expected {plain[0]!r}: only "
                "plain LoRA can go on here"
            )
    for key, name, ours in (("r", "rank", lora.rank), ("lora_alpha", "alpha", lora.alpha)):
        if content.get(key) != ours:
            found = brief(content.get(key))
            raise InputError(
                f"{folder}/{CONFIG}: {key} is {found}, config.lora.{name} is {ours}: set "
                f"--config.lora.{name}={found}"
            )


def _read_tensors(folder: Path) -> dict[str, np.ndarray]:
    """Tensors by their name below the base model, without the adapter's own name in it."""
    if not os.path.isfile(folder / TENSORS):
        raise InputError(
            f"{folder}: found no {TENSORS}, expected PEFT's safetensors: load an adapter_model.bin "
            "with peft and save it again with save_pretrained(DIR)"
        )
    try:
        stored = load_file(folder / TENSORS)
    # A KeyError is of a dtype that numpy lacks.
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"{folder}/{TENSORS}: found broken safetensors ({error}), expected a whole file"
        ) from error
    tensors = {
        re.sub(r"(lora_[AB])\.\w+\.weight$", r"\1.weight", key.removeprefix(PREFIX)): tensor
        for key, tensor in stored.items()
    }
    if len(tensors) < len(stored):
        raise InputError(
            f"{folder}/{TENSORS}: found a tensor under two names, expected one adapter: save it "
            "alone with peft's save_pretrained(DIR, selected_adapters=[NAME])"
        )
    return tensors


def _refuse_keys(folder: Path, tensors, expected: set[str], config: DecoderConfig) -> None:
    present = {key.split(".lora_")[0].rsplit(".", 1)[-1] for key in tensors}
    known = {m.rsplit(".", 1)[1]: name for name, m in adapted_modules(config).items()}
    hint = ""
    if present <= set(known):
        targets = tuple(name for module, name in known.items() if module in present)
        hint = f': it adapts --config.lora.targets="{targets}"'
    missing, unused = sorted(expected - set(tensors)), sorted(set(tensors) - expected)
    problems = [
        f"{len(keys)} {what}, as {keys[0]}"
        for what, keys in (("missing", missing), ("not used", unused))
        if keys
    ]
    raise InputError(
        f"{folder}/{TENSORS}: found other tensors than this model's adapter has "
        f"({'; '.join(problems)}){hint}"
    )
