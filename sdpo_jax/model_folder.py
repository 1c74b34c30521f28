"""A converted model folder read back: decoder, fresh adapter, tokenizer."""

import dataclasses
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from sdpo_jax.errors import InputError
from sdpo_jax.models.decoder import Decoder, DecoderConfig
from sdpo_jax.models.lora import LoraConfig
from sdpo_jax.models.weights import read_json
from sdpo_jax.training.checkpoint import read_weights

# Else transformers prints that it found no PyTorch, which is not needed.
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

Placement = Callable[[nnx.Variable], jax.sharding.Sharding]


@dataclasses.dataclass(frozen=True)
class Model:
    """`nnx.merge(graphdef, lora, base)` is the decoder; `lora` is trained, `base` is frozen."""

    graphdef: nnx.GraphDef
    lora: nnx.State
    base: nnx.State
    config: DecoderConfig
    tokenizer: Any
    meta: dict[str, Any]


def load_model(
    path: str | Path,
    lora: LoraConfig,
    *,
    dtype: Any,
    remat: str = "none",
    seed: int = 0,
    shardings: Placement | None = None,
) -> Model:
    """Reads what `python -m sdpo_jax.convert` wrote.

    Args:
      path: the model folder.
      lora: rank, scale and targets of the adapter, which starts from `seed`: A uniform, B zeros.
      dtype: of the base in memory; it is read in the stored dtype and cast on its devices.
      remat: key of `decoder.REMAT`.
      seed: of the adapter.
      shardings: abstract variable (its `.shape` and `.letters`; under `layers` the shape has L
        before the letters) -> its sharding; None puts everything on this process's first device.

    Raises:
      InputError: no model folder, a broken one, or one whose arrays do not fit its config.json.
    """
    path = Path(path)
    meta = read_meta(path)
    config = DecoderConfig.from_hf(read_json(path / "config.json"), str(path / "config.json"))

    def make(key: jax.Array) -> Decoder:
        return Decoder(config, lora, dtype=dtype, remat=remat, rngs=nnx.Rngs(key))

    key = jax.random.key(seed)
    graphdef, abstract_lora, abstract_base = nnx.split(
        nnx.eval_shape(make, key), nnx.LoRAParam, ...
    )
    place = shardings or (lambda _: jax.sharding.SingleDeviceSharding(jax.local_devices()[0]))
    base = _read_base(path / "weights", abstract_base, meta["dtype"], dtype, place)
    # Under jit the unused draws of the base are removed, so only the adapter is ever made.
    init = jax.jit(
        lambda key: nnx.split(make(key), nnx.LoRAParam, ...)[1],
        out_shardings=_placed(abstract_lora, place),
    )
    return Model(graphdef, init(key), base, config, load_tokenizer(path), meta)


def read_meta(path: Path) -> dict[str, Any]:
    """The content of model.json: source, family, parameters, dtype, sha256, files.

    Raises InputError where it or a weight file that it lists is missing or cut.
    """
    if not (path / "model.json").is_file():
        found = "no such folder" if not path.exists() else "found no model.json"
        raise InputError(
            f"{path}: {found}, expected a converted model: run "
            f"`python -m sdpo_jax.convert --model=PATH --output={path}`"
        )
    meta = read_json(path / "model.json")
    missing = [
        key for key in ("family", "dtype", "parameters", "sha256", "files") if key not in meta
    ]
    if missing:
        raise InputError(
            f"{path}/model.json: {', '.join(missing)} missing: convert the model again"
        )
    found = file_sizes(path / "weights")
    for name, size in meta["files"].items():
        if found.get(name) != size:
            raise InputError(
                f"{path}/weights/{name}: found {found.get(name, 'no such file')}, expected "
                f"{size} bytes: convert the model again into a new folder"
            )
    return meta


def file_sizes(folder: Path) -> dict[str, int]:
    """Relative name -> bytes of every file below `folder`."""
    return {
        str(path.relative_to(folder)): path.stat().st_size
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def load_tokenizer(path: Path, where: str | None = None) -> Any:
    """The folder's tokenizer; never reaches the network. Raises InputError naming `where`."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # transformers and tokenizers raise what they like here
        reason = (str(error).strip().splitlines() or [repr(error)])[0]
        raise InputError(
            f"{where or path}: found no tokenizer that transformers can read ({reason}), expected "
            "tokenizer.json and tokenizer_config.json"
        ) from error


def _placed(abstract: nnx.State, place: Placement) -> nnx.State:
    """The shardings of an abstract state, as a state."""
    return jax.tree.map(
        lambda variable: variable.replace(place(variable)),
        abstract,
        is_leaf=lambda leaf: isinstance(leaf, nnx.Variable),
    )


def _read_base(path: Path, abstract: nnx.State, stored: str, dtype: Any, place: Placement):
    """Restores in the stored dtype, then casts array by array."""
    target = jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, stored, sharding=sharding),
        nnx.to_pure_dict(abstract),
        nnx.to_pure_dict(_placed(abstract, place)),
    )
    leaves, structure = jax.tree.flatten(read_weights(path, target))
    for i, leaf in enumerate(leaves):
        leaves[i] = leaf.astype(jnp.dtype(dtype))
    base = jax.tree.map(lambda leaf: leaf, abstract)
    nnx.replace_by_pure_dict(base, jax.tree.unflatten(structure, leaves))
    return base
