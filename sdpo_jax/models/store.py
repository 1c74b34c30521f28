"""A converted model folder read back: decoder, fresh adapter, tokenizer."""

import dataclasses
import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict

from sdpo_jax.models import item_vectors, weights
from sdpo_jax.models.base_weights import read_weights, write_weights
from sdpo_jax.models.config import DecoderConfig
from sdpo_jax.models.decoder import Decoder
from sdpo_jax.models.lora import LoraConfig
from sdpo_jax.models.quantize import quantize
from sdpo_jax.models.tokenizer import ends_of, load_tokenizer
from sdpo_jax.system import sharding
from sdpo_jax.system.errors import InputError
from sdpo_jax.system.files import COUNT, OBJECT, TEXT, check_keys, one_of, read_object

META = {
    "source": TEXT,
    "family": TEXT,
    "parameters": COUNT,
    "sha256": TEXT,
    "files": OBJECT,
    "dtype": one_of(*weights.DTYPES.values()),
}
Placement = Callable[[nnx.Variable], jax.sharding.Sharding]


@dataclasses.dataclass(frozen=True)
class Model:
    """`nnx.merge(graphdef, lora, base)` is the decoder; `lora` is trained, `base` is frozen.

    `lora` is the adapter or, where every weight is trained, all of them; then `base` is empty.
    `ends`: see `ends_of`.
    """

    graphdef: nnx.GraphDef
    lora: nnx.State
    base: nnx.State
    config: DecoderConfig
    tokenizer: Any
    ends: tuple[int, ...]
    meta: dict[str, Any]


def load_model(
    path: str | Path,
    lora: LoraConfig,
    *,
    dtype: Any,
    base_dtype: str = "same",
    remat: str = "none",
    seed: int = 0,
    shardings: Placement | None = None,
    vectors_IE: np.ndarray | None = None,
    platform: str | None = None,
) -> Model:
    """Reads what `python -m sdpo_jax.convert` wrote.

    Args:
      path: the model folder.
      lora: rank, scale and targets of the adapter, which starts from `seed`: A uniform, B zeros.
      dtype: of products, and of the base unless `base_dtype` names another.
      base_dtype: of `quantize.BASE_DTYPES`; the base is cast or quantized on its devices.
      remat: key of `decoder.REMAT`.
      seed: of the adapter.
      shardings: see `sharding.placement`; None puts everything on this process's first device.
      vectors_IE: item vectors that prompts may hold, see `models.item_vectors`.
      platform: see `Decoder`; None: that of JAX's default devices.

    Raises:
      InputError: no model folder, a broken one, or one whose arrays do not fit its config.json.
    """
    path = Path(path)
    meta = read_meta(path)
    config = DecoderConfig.read(path)

    settings = {"dtype": dtype, "base_dtype": base_dtype, "remat": remat}
    settings["platform"] = platform or jax.default_backend()
    settings["vectors"] = None if vectors_IE is None else vectors_IE.shape

    def make(key: jax.Array) -> Decoder:
        return Decoder(config, lora, **settings, rngs=nnx.Rngs(key))

    key = jax.random.key(seed)
    graphdef, abstract_lora, abstract_base = nnx.split(nnx.eval_shape(make, key), lora.trained, ...)
    place = shardings or (lambda _: jax.sharding.SingleDeviceSharding(jax.local_devices()[0]))
    stored = abstract_lora if lora.full else abstract_base
    base = _read_base(path / "weights", stored, config, meta["dtype"], place)
    tokenizer = load_tokenizer(path)
    ends = ends_of(path, tokenizer)
    if lora.full:
        return Model(graphdef, base, abstract_base, config, tokenizer, ends, meta)
    if vectors_IE is not None:
        item_vectors.fill(base, vectors_IE, place)
    # jit removes the unused draws of the base, so only the adapter is made.
    init = jax.jit(
        lambda key: nnx.split(make(key), nnx.LoRAParam, ...)[1],
        out_shardings=_placed(abstract_lora, place),
    )
    return Model(graphdef, init(key), base, config, tokenizer, ends, meta)


def read_meta(path: Path) -> dict[str, Any]:
    """The content of model.json: source, family, parameters, dtype, sha256, files.

    Raises InputError where it or a weight file that it lists is missing or cut.
    """
    if not os.path.isfile(path / "model.json"):
        found = "found no model.json" if os.path.exists(path) else "no such folder"
        raise InputError(
            f"{path}: {found}, expected a converted model: run "
            f"`python -m sdpo_jax.convert --model=PATH --output={path}`"
        )
    meta = read_object(path / "model.json", "expected what convert wrote: convert the model again")
    check_keys(path / "model.json", meta, META, "convert the model again")
    found = file_sizes(path / "weights")
    for name, size in meta["files"].items():
        if found.get(name) != size:
            raise InputError(
                f"{path}/weights/{name}: found {found.get(name, 'no such file')}, expected "
                f"{size} bytes: convert the model again into a new folder"
            )
    return meta


def with_adapter(model: Model, tree: dict[str, Any] | None) -> nnx.State:
    """An adapter of host arrays, {"layers": …}, on the model's devices; None: the fresh one."""
    if tree is None:
        return model.lora
    placed = jax.tree.map(
        lambda found, fresh: sharding.shard_whole(found, fresh.sharding),
        tree,
        {"layers": nnx.to_pure_dict(model.lora)["layers"]},
    )
    lora = jax.tree.map(lambda leaf: leaf, model.lora)
    nnx.replace_by_pure_dict(lora, placed)
    return lora


def write_model(folder: Path, tree: Any, meta: dict[str, Any]) -> None:
    """Writes weights and model.json into a folder that has config.json and the tokenizer's files.

    `meta`: source, family and dtype; the rest is added.
    """
    arrays: dict[str, Any] = flatten_dict(tree, sep="/")
    meta["parameters"] = sum(array.size for array in arrays.values())
    meta["sha256"] = model_digest(folder, arrays)
    write_weights(folder / "weights", tree)
    meta["files"] = file_sizes(folder / "weights")
    (folder / "model.json").write_text(json.dumps(meta, indent=2), encoding="utf-8")


def model_digest(folder: Path, arrays: dict[str, np.ndarray]) -> str:
    """SHA-256 over the folder's config, tokenizer and arrays: all that log-probs depend on."""
    digest = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        digest.update(path.name.encode() + path.read_bytes())
    for name in sorted(arrays):
        array = np.ascontiguousarray(arrays[name])
        digest.update(f"{name} {array.dtype} {array.shape}\n".encode())
        digest.update(array.reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def file_sizes(folder: Path) -> dict[str, int]:
    """Relative name -> bytes of every file below `folder`."""
    return {
        str(path.relative_to(folder)): path.stat().st_size
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def _placed(abstract: nnx.State, place: Placement) -> nnx.State:
    """The shardings of an abstract state, as a state."""
    return jax.tree.map(
        lambda variable: variable.replace(place(variable)),
        abstract,
        is_leaf=lambda leaf: isinstance(leaf, nnx.Variable),
    )


def _read_base(path: Path, abstract: nnx.State, config: DecoderConfig, stored: str, place):
    """Reads every array onto its devices in the `stored` dtype, then casts or quantizes it.

    In `abstract`, the base to make, a quantized kernel is its codes and their scale.
    """
    placed = flatten_dict(nnx.to_pure_dict(_placed(abstract, place)), sep="/")
    shapes: dict[str, Any] = flatten_dict(nnx.to_pure_dict(abstract), sep="/")
    target = {
        name: jax.ShapeDtypeStruct(
            leaf.shape, stored, sharding=placed.get(name) or placed[_part(name, "codes")]
        )
        for name, leaf in weights.abstract_base(config).items()
    }
    made = {}
    for name, array in read_weights(path, unflatten_dict(target, sep="/")):
        if name in shapes:
            made[name] = array.astype(shapes[name].dtype)
        else:
            names = [_part(name, "codes"), _part(name, "scale")]
            codes, scale = _quantized(array, shapes[names[0]], [placed[n] for n in names])
            made |= {names[0]: codes, names[1]: scale}
        del array  # before the next is read
    base = jax.tree.map(lambda leaf: leaf, abstract)
    nnx.replace_by_pure_dict(base, unflatten_dict(made, sep="/"))
    return base


def _part(kernel: str, name: str) -> str:
    """`layers/q/kernel` -> `layers/q/codes`."""
    return kernel.removesuffix("kernel") + name


def _quantized(kernel: jax.Array, codes: jax.ShapeDtypeStruct, shardings):
    """Codes and scales of stacked kernels, layer by layer: no float32 copy of all exists."""
    kind = "int8" if codes.dtype == jnp.int8 else "nf4"

    def one(kernel_JO):
        made = quantize(kernel_JO, kind)
        return made.codes, made.scale

    return jax.jit(lambda stack: jax.lax.map(one, stack), out_shardings=tuple(shardings))(kernel)
