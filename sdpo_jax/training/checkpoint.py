"""Orbax: base weights of a model folder, and the checkpoints of a stage.

The only module that imports orbax.
"""

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from flax.traverse_util import flatten_dict, unflatten_dict

from sdpo_jax.errors import InputError

PIECE = 64 * 2**20  # bytes of an array that are encoded at once, and of a file


def write_weights(path: Path, tree: Any) -> None:
    """Writes a tree of numpy arrays into the new folder `path`; returns when all is on disk.

    Raises InputError where the disk refuses (full, read-only, over quota).
    """
    check_room(Path(path).parent, sum(leaf.nbytes for leaf in jax.tree.leaves(tree)))
    # Orbax would copy every array first, against changes meanwhile, and encode each in one piece.
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
    except (ValueError, OSError) as error:  # tensorstore tells a full disk as a ValueError
        reason = (str(error).strip().splitlines() or [repr(error)])[0]
        raise InputError(
            f"{path}: the weights cannot be written ({reason}): free space or choose another folder"
        ) from error


def check_room(folder: Path, needed: int) -> None:
    """Raises InputError unless `needed` bytes can be written into `folder`.

    Asked before Orbax writes, because it meets a full disk with a page of tracebacks. Reserving
    the space also finds quotas and file-size limits, which the free space does not tell.
    """
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise InputError(
            f"{folder}: found {free / 1e9:.2f} GB free, expected {needed / 1e9:.2f} GB: free space "
            "or choose another folder"
        )
    if needed == 0 or not hasattr(os, "posix_fallocate"):
        return
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            os.posix_fallocate(file.fileno(), 0, needed)
    except OSError as error:
        raise InputError(
            f"{folder}: {error.strerror} on reserving {needed / 1e9:.2f} GB: free space or choose "
            "another folder"
        ) from error


def read_weights(path: Path, abstract_tree: Any) -> Iterator[tuple[str, jax.Array]]:
    """Yields ("layers/q/kernel", array) one by one, straight onto the devices of its sharding.

    Whoever takes them may make each smaller before the next is read.

    Args:
      path: what `write_weights` wrote.
      abstract_tree: `jax.ShapeDtypeStruct`s with the stored shape and dtype, and a sharding.

    Raises:
      InputError: the folder is broken, or an array's name, shape or dtype is not the expected one
        (Orbax itself would cast in silence).
    """
    path = Path(path).absolute()
    with ocp.PyTreeCheckpointer() as checkpointer:
        try:
            stored = checkpointer.metadata(path).item_metadata
            problem = "found unreadable weights"
            if stored is not None and not (problem := _difference(stored.tree, abstract_tree)):
                for name, leaf in flatten_dict(abstract_tree, sep="/").items():
                    yield name, _read_one(checkpointer, path, name, leaf)
                return
        except (ValueError, OSError, KeyError) as error:
            reason = str(error).strip().splitlines() or [repr(error)]
            problem = f"found unreadable weights ({reason[0]})"
    raise InputError(f"{path}: {problem}: convert the model again into a new folder")


def _read_one(checkpointer, path: Path, name: str, leaf: jax.ShapeDtypeStruct) -> jax.Array:
    item = unflatten_dict({name: leaf}, sep="/")
    args = ocp.args.PyTreeRestore(
        item=item,
        restore_args=ocp.checkpoint_utils.construct_restore_args(item),
        partial_restore=True,
    )
    return flatten_dict(checkpointer.restore(path, args=args), sep="/")[name]


def _difference(stored: Any, expected: Any) -> str:
    def described(tree: Any) -> dict[str, str]:
        return {
            jax.tree_util.keystr(key, simple=True, separator="/"):
                f"{jax.numpy.dtype(leaf.dtype).name}{list(leaf.shape)}"
            for key, leaf in jax.tree_util.tree_leaves_with_path(tree)
        }  # fmt: skip

    found, wanted = described(stored), described(expected)
    return "; ".join(
        f"{name} is {found.get(name, 'missing')}, expected {wanted.get(name, 'nothing')}"
        for name in sorted(found | wanted)
        if found.get(name) != wanted.get(name)
    )


class CheckpointGone(Exception):
    """The step was there when it was listed and could not be read: deleted, or being deleted."""


class Checkpoints:
    """The checkpoints of one stage: the two latest and the best by validation loss are kept.

    Args:
      directory: workdir/<stage>.
      read_only: for a reader beside the trainer: nothing is written, created or cleaned up.
    """

    def __init__(self, directory: Path, read_only: bool = False):
        policies = ocp.checkpoint_managers
        best = policies.BestN(
            get_metric_fn=lambda metrics: -metrics["loss"], n=1,
            keep_checkpoints_without_metrics=False,
        )  # fmt: skip
        # Without a best_fn Orbax neither writes nor reads metrics, whatever the policy says.
        options = ocp.CheckpointManagerOptions(
            best_fn=lambda metrics: metrics["loss"],
            best_mode="min",
            preservation_policy=policies.AnyPreservationPolicy([policies.LatestN(2), best]),
            cleanup_tmp_directories=not read_only,
            read_only=read_only,
        )
        self._manager = ocp.CheckpointManager(
            Path(directory).absolute(),
            options=options,
            item_handlers={
                "lora": ocp.StandardCheckpointHandler(),
                "optimizer": ocp.StandardCheckpointHandler(),
                "position": ocp.JsonCheckpointHandler(),
            },
        )

    def steps(self) -> list[int]:
        return sorted(self._manager.all_steps())

    def losses(self) -> dict[int, float]:
        """Validation loss of the steps that were saved with one."""
        return {
            step: metrics["loss"]
            for step in self.steps()
            if (metrics := self._manager.metrics(step)) is not None
        }

    def best_step(self) -> int | None:
        """The step with the lowest validation loss, else the latest; None if there is none."""
        losses, steps = self.losses(), self.steps()
        return min(losses, key=losses.__getitem__) if losses else steps[-1] if steps else None

    def save(self, state: Any, position: dict[str, Any], loss: float | None = None) -> None:
        """Starts writing a step in the background.

        A step that is there already is left alone, unless it lacks the loss that is given now.
        """
        step = int(state.step)
        if step in self._manager.all_steps():
            if loss is None or step in self.losses():
                return
            self._manager.delete(step)
        self._manager.save(
            step,
            args=ocp.args.Composite(
                lora=ocp.args.StandardSave(state.lora),
                optimizer=ocp.args.StandardSave(state.opt_state),
                position=ocp.args.JsonSave(position | {"step": step}),
            ),
            metrics=None if loss is None else {"loss": loss},
        )

    def restore(self, step: int, state: Any) -> tuple[Any, dict[str, Any]]:
        """The state saved at `step`, shaped and placed as `state`, and what was saved beside it."""
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, state)
        items = self._manager.restore(
            step,
            args=ocp.args.Composite(
                lora=ocp.args.StandardRestore(abstract.lora),
                optimizer=ocp.args.StandardRestore(abstract.opt_state),
                position=ocp.args.JsonRestore(),
            ),
        )
        count = jax.device_put(jax.numpy.int32(items.position["step"]), state.step.sharding)
        return type(state)(count, items.lora, items.optimizer), items.position

    def restore_lora(self, step: int, lora: Any) -> Any:
        """Only the adapter of `step`. Raises CheckpointGone if it vanished meanwhile."""
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, lora)
        args = ocp.args.Composite(lora=ocp.args.StandardRestore(abstract))
        try:
            return self._manager.restore(step, args=args).lora
        except (OSError, KeyError, ValueError) as error:
            raise CheckpointGone(f"{self._manager.directory}/{step}: {error}") from error

    def restore_raw(self, step: int) -> Any:
        """The adapter of `step` as host arrays in nested dicts, for a reader without the model.

        It need not have the devices that wrote it. Raises CheckpointGone if it vanished meanwhile.
        """
        try:
            # With a place named, or Orbax would look for the devices of training.
            host = jax.sharding.SingleDeviceSharding(jax.local_devices(backend="cpu")[0])
            shapes = jax.tree.map(
                lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=host),
                self._manager.item_metadata(step).lora.tree,
            )
            args = ocp.args.Composite(lora=ocp.args.StandardRestore(shapes))
            stored = flatten_dict(self._manager.restore(step, args=args).lora)
        except (OSError, KeyError, ValueError) as error:
            raise CheckpointGone(f"{self._manager.directory}/{step}: {error}") from error
        # A variable is stored as {"value": array}.
        return unflatten_dict({path[:-1]: np.asarray(array) for path, array in stored.items()})

    def wait(self) -> None:
        """Returns when all that was saved is on disk."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        self._manager.close()
