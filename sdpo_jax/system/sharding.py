"""The device mesh, the rules from shape letters to mesh axes, and placement.

Shape letters, used on signatures, batch keys and einsum strings throughout:
B examples · M targets of an example · C candidates of a target = K+1, index 0 is the chosen one ·
K rejected ones · P prompt tokens · Q queries: tokens whose output is read · A answer tokens (the
end included) · S answer tokens that are fed beside the prompt (each answer's last is only a
target) · W rows of tokens · T tokens of a row · L layers · D model width · N query heads (times
head width in a kernel) · G key/value heads (likewise) · H head width · F feed-forward width ·
V vocabulary · J inputs and O outputs of a linear map · R LoRA rank · I items of the catalogue ·
E width of an item vector. X, Y and Z are axes of one file, which says what they count.
"""

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from sdpo_jax.system.errors import InputError

AXES = ("data", "fsdp", "tensor")
RULES = {"D": "fsdp", "N": "tensor", "G": "tensor", "F": "tensor", "V": "tensor"}


def make_mesh(data: int = -1, fsdp: int = 1, tensor: int = 1, devices=None) -> Mesh:
    """A mesh over `devices`, by default all of all processes; one axis may be -1: the rest.

    Raises InputError when the sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes, count = [data, fsdp, tensor], len(devices)
    known = 1
    for size in sizes:
        known *= size if size > 0 else 1
    if sizes.count(-1) == 1 and known and count % known == 0:
        sizes[sizes.index(-1)] = count // known
    if min(sizes) < 1 or sizes[0] * sizes[1] * sizes[2] != count:
        raise InputError(
            f"mesh.data={data}, mesh.fsdp={fsdp}, mesh.tensor={tensor} do not multiply to the "
            f"{count} devices found: set one of --config.mesh.data, .fsdp, .tensor to -1"
        )
    # Explicit axes, make_mesh's default, refuse an embedding gather on a sharded table.
    return jax.make_mesh(
        tuple(sizes), AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices
    )


def platform(mesh: Mesh) -> str:
    """ "cpu", "gpu" or "tpu", also of an ahead-of-time topology."""
    name = mesh.devices.flat[0].platform
    return "gpu" if name in ("cuda", "rocm") else name


def data_shards(mesh: Mesh) -> int:
    """The number of shards that a batch is split into."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def local_shards(mesh: Mesh) -> list[int]:
    """The data shards on this process's devices: its part of a batch."""
    owners = mesh.devices.reshape(data_shards(mesh), -1)
    here = jax.process_index()
    return [i for i, part in enumerate(owners) if any(d.process_index == here for d in part)]


def shard_local(batch: dict[str, np.ndarray], placed: NamedSharding) -> dict[str, jax.Array]:
    """A batch over the devices of all processes, each of which gives its own rows."""
    return {name: jax.make_array_from_process_local_data(placed, x) for name, x in batch.items()}


def shard_whole(x: np.ndarray, placed: NamedSharding) -> jax.Array:
    """An array over all devices; every process gives the whole."""
    return jax.make_array_from_callback(x.shape, placed, x.__getitem__)


def to_host(x: jax.Array) -> np.ndarray:
    """The whole array on every host; all processes must call this together."""
    if x.is_fully_addressable or x.is_fully_replicated:
        return np.asarray(x)
    return multihost_utils.process_allgather(x, tiled=True)


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh, leading: int = 0) -> NamedSharding:
    """Examples over `data` and `fsdp`, after `leading` replicated axes."""
    return NamedSharding(mesh, PartitionSpec(*[None] * leading, ("data", "fsdp")))


def placement(mesh: Mesh):
    """Function from an abstract variable to its sharding, by its `.letters` and `RULES`.

    A stacked variable has L (not sharded) before its letters. A dimension that its axis does not
    divide is replicated. Where a variable has a `.unit`, that many rows of a kernel stay together.
    """

    def place(variable) -> NamedSharding:
        shape = variable.shape
        letters = variable.letters.rjust(len(shape), "L")
        axes = [RULES.get(letter) for letter in letters]
        units = [*[1] * (len(shape) - 2), getattr(variable, "unit", 1), 1][-len(shape) :]
        fits = [
            a if a and n % (mesh.shape[a] * unit) == 0 else None
            for a, n, unit in zip(axes, shape, units, strict=True)
        ]
        return NamedSharding(mesh, PartitionSpec(*fits))

    return place
