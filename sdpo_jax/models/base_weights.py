"""Base weights on disk, by Orbax: written and read one array at a time."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from flax.traverse_util import flatten_dict, unflatten_dict

from sdpo_jax.system.errors import InputError, first_line
from sdpo_jax.system.files import check_room

PIECE = 64 * 2**20  # bytes of an array that are encoded at once, and of a file


def write_weights(path: Path, tree: Any) -> None:
    """Writes a tree of numpy arrays into the new folder `path`; returns when all is on disk.

    Raises InputError where the disk refuses (full, read-only, over quota).
    """
    check_room(Path(path).parent, sum(leaf.nbytes for leaf in jax.tree.leaves(tree)))
    # Orbax would copy every array first, against later changes, and encode each in one piece.
    registry = ocp.type_handlers.create_type_handler_registry(
        (np.ndarray, ocp.type_handlers.NumpyHandler(deepcopy_host_arrays=False)),
        (jax.Array, ocp.type_handlers.ArrayHandler()),  # it warns without one
    )
    args = ocp.args.PyTreeSave(
        tree,
        jax.tree.map(lambda _: ocp.SaveArgs(chunk_byte_size=PIECE), tree),
        ocdbt_target_data_file_size=PIECE,
    )
    try:
        with ocp.Checkpointer(
            ocp.PyTreeCheckpointHandler(type_handler_registry=registry)
        ) as checkpointer:
            checkpointer.save(Path(path).absolute(), args=args)
    except (ValueError, OSError) as error:  # tensorstore raises ValueError on a full disk
        raise InputError(
            f"{path}: the weights cannot be written ({first_line(error)}): free space or choose "
            "another folder"
        ) from error


def read_weights(path: Path, abstract_tree: Any) -> Iterator[tuple[str, jax.Array]]:
    """Yields ("layers/q/kernel", array) one by one, straight onto the devices of its sharding.

    The caller may shrink each before the next is read.

    Args:
      path: what `write_weights` wrote.
      abstract_tree: `jax.ShapeDtypeStruct`s with the stored shape and dtype, and a sharding.

    Raises:
      InputError: the folder is broken, or an array's name, shape or dtype is not the expected one
        (Orbax itself would cast silently).
    """
    path = Path(path).absolute()
    with ocp.PyTreeCheckpointer() as checkpointer:
        try:
            stored = checkpointer.metadata(path).item_metadata
            problem = "found unreadable weights"
            if stored is not None and not (problem := _difference(stored.tree, abstract_tree)):
                leaves: dict[str, Any] = flatten_dict(abstract_tree, sep="/")
                for name, leaf in leaves.items():
                    yield name, _read_one(checkpointer, path, name, leaf)
                return
        except (ValueError, OSError, KeyError) as error:
            problem = f"found unreadable weights ({first_line(error)})"
    raise InputError(f"{path}: {problem}: convert the model again into a new folder")


def _read_one(checkpointer, path: Path, name: str, leaf: jax.ShapeDtypeStruct) -> jax.Array:
    item = unflatten_dict({name: leaf}, sep="/")
    args = ocp.args.PyTreeRestore(
        item=item,
        restore_args=ocp.checkpoint_utils.construct_restore_args(item),
        partial_restore=True,
    )
    found: dict[str, Any] = flatten_dict(checkpointer.restore(path, args=args), sep="/")
    return found[name]


def _difference(stored: Any, expected: Any) -> str:
    def described(tree: Any) -> dict[str, str]:
        return {
            jax.tree_util.keystr(
                key, simple=True, separator="/"
            ): f"{jax.numpy.dtype(leaf.dtype).name}{list(leaf.shape)}"
            for key, leaf in jax.tree_util.tree_leaves_with_path(tree)
        }

    found, wanted = described(stored), described(expected)
    return "; ".join(
        f"{name} is {found.get(name, 'missing')}, expected {wanted.get(name, 'nothing')}"
        for name in sorted(found | wanted)
        if found.get(name) != wanted.get(name)
    )
