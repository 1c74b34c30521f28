"""The checkpoints of a stage, by Orbax."""

import contextlib
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from flax.traverse_util import flatten_dict, unflatten_dict

from sdpo_jax.runs.best_step import KeepForEvaluator
from sdpo_jax.system.errors import InputError, first_line
from sdpo_jax.system.files import check_room
from sdpo_jax.system.processes import first_process

ROOM = 2**20  # bytes to leave on the disk beside a checkpoint


class CheckpointGone(Exception):
    """A listed step cannot be read: it was deleted, or it is broken."""


@jax.jit
def bit_sum(tree: Any) -> jax.Array:
    """A checksum (uint32) that changes with any one bit of a tree of 32-bit arrays.

    Bits times odd weights, summed modulo 2^32. The sum does not depend on how the arrays are
    sharded, and is computed where they are.
    """

    def one(x: jax.Array) -> jax.Array:
        place, step = jax.numpy.zeros(x.shape, jax.numpy.uint32), 1
        for axis in reversed(range(x.ndim)):
            place += step * jax.lax.broadcasted_iota(jax.numpy.uint32, x.shape, axis)
            step *= x.shape[axis]
        return (jax.lax.bitcast_convert_type(x, jax.numpy.uint32) * (2 * place + 1)).sum()

    return sum(map(one, jax.tree.leaves(tree)), start=jax.numpy.uint32(0))


def drop_broken_losses(directory: Path) -> None:
    """Removes unreadable losses, so that their steps are validated again."""
    for file in directory.glob("*/metrics/metrics"):
        try:
            json.loads(file.read_text(encoding="utf-8"))
        except ValueError:
            print(f"warning: {file}: cannot be read: deleted; the step will be validated again")
            shutil.rmtree(file.parent)


class Checkpoints:
    """The checkpoints of one stage, of which the two latest and the best are retained.

    Args:
      directory: workdir/<stage>.
      read_only: for a reader beside the trainer: nothing is written, created or cleaned up.
      evaluated: returns step -> score where not the loss decides; other steps are retained too.
    """

    def __init__(
        self,
        directory: Path,
        read_only: bool = False,
        evaluated: Callable[[], Mapping[int, float]] | None = None,
    ):
        policies = ocp.checkpoint_managers
        best = policies.BestN(
            get_metric_fn=lambda metrics: -metrics["loss"],
            n=1,
            keep_checkpoints_without_metrics=False,
        )
        keep = [policies.LatestN(2), KeepForEvaluator(evaluated) if evaluated else best]
        # Without a best_fn Orbax neither writes nor reads metrics, whatever the policy says.
        options = ocp.CheckpointManagerOptions(
            best_fn=lambda metrics: metrics["loss"],
            best_mode="min",
            preservation_policy=policies.AnyPreservationPolicy(keep),
            cleanup_tmp_directories=not read_only,
            read_only=read_only,
        )
        directory = Path(directory).absolute()
        if not read_only:
            first_process(lambda: drop_broken_losses(directory))
        try:
            self._manager = ocp.CheckpointManager(
                directory,
                options=options,
                item_handlers={
                    "lora": ocp.StandardCheckpointHandler(),
                    "optimizer": ocp.StandardCheckpointHandler(),
                    "position": ocp.JsonCheckpointHandler(),
                },
            )
        except ValueError as error:  # of JSON
            raise InputError(
                f"{directory}: found a loss that is no valid JSON ({error}), expected the number "
                "that training wrote: rerun the training command, which repairs it"
            ) from error

    def steps(self) -> list[int]:
        return sorted(self._manager.all_steps())

    def losses(self) -> dict[int, float]:
        """Validation loss of the steps that were saved with one."""
        return {
            step: metrics["loss"]
            for step in self.steps()
            if (metrics := self._manager.metrics(step)) is not None
        }

    def best_step(self) -> int:
        """The step with the lowest validation loss, else the latest."""
        losses = self.losses()
        return min(losses, key=losses.__getitem__) if losses else self.steps()[-1]

    def save(self, state: Any, position: dict[str, Any], loss: float | None = None) -> None:
        """Starts writing a step in the background.

        A step that exists is rewritten only to add the loss that it lacks.
        """
        step = int(state.step)
        if step in self._manager.all_steps():
            if loss is None or step in self.losses():
                return
            self._manager.delete(step)
        # Twice, since Orbax merges what it wrote into new files; ROOM is for metrics and the like.
        needed = 2 * sum(leaf.nbytes for leaf in jax.tree.leaves(state)) + ROOM
        first_process(lambda: check_room(Path(self._manager.directory), needed))
        bits = {"lora": int(bit_sum(state.lora)), "optimizer": int(bit_sum(state.opt_state))}
        with self._writing():
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    lora=ocp.args.StandardSave(state.lora),
                    optimizer=ocp.args.StandardSave(state.opt_state),
                    position=ocp.args.JsonSave(position | {"step": step, "bits": bits}),
                ),
                metrics=None if loss is None else {"loss": loss},
            )

    def restore_newest(self, state: Any) -> tuple[Any, dict[str, Any]]:
        """The state of the newest intact step, and the position saved beside it.

        It has the shapes and shardings of `state`, whatever devices and processes wrote it. A newer
        broken step is reported and deleted. Raises InputError if none is intact.
        """
        for step in reversed(self.steps()):
            try:
                return self.restore(step, state)
            except CheckpointGone as error:
                print(f"warning: {error}: deleted, resuming from the checkpoint before")
                self._manager.delete(step)
        raise InputError(
            f"{self._manager.directory}: found no checkpoint that can be read, expected one: "
            "delete this folder to start the stage again"
        )

    def restore(self, step: int, state: Any) -> tuple[Any, dict[str, Any]]:
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, state)
        items = self._restore(
            step,
            lora=ocp.args.StandardRestore(abstract.lora),
            optimizer=ocp.args.StandardRestore(abstract.opt_state),
        )
        count = np.asarray(items.position["step"], np.int32)
        count = jax.make_array_from_callback((), state.step.sharding, count.__getitem__)
        return type(state)(count, items.lora, items.optimizer), items.position

    def restore_lora(self, step: int, lora: Any) -> Any:
        """Only the adapter of `step`. Raises CheckpointGone."""
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, lora)
        return self._restore(step, lora=ocp.args.StandardRestore(abstract)).lora

    def restore_raw(self, step: int) -> Any:
        """The adapter of `step` as host arrays in nested dicts, for a reader without the model.

        Raises CheckpointGone.
        """
        # Without a sharding Orbax would look for the devices of training.
        host = jax.sharding.SingleDeviceSharding(jax.local_devices(backend="cpu")[0])
        with self._reading(step):
            shapes = jax.tree.map(
                lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=host),
                self._manager.item_metadata(step).lora.tree,
            )
        stored = flatten_dict(self._restore(step, lora=ocp.args.StandardRestore(shapes)).lora)
        # A variable is stored as {"value": array}.
        return unflatten_dict({path[:-1]: np.asarray(array) for path, array in stored.items()})

    def _restore(self, step: int, **items: Any) -> Any:
        """Items of a step and its position. Raises CheckpointGone where their checksums differ."""
        with self._reading(step):
            args = ocp.args.Composite(position=ocp.args.JsonRestore(), **items)
            found: Any = self._manager.restore(step, args=args)
            for name in items:
                if found.position["bits"][name] != int(bit_sum(found[name])):
                    raise ValueError(f"{name} is not what was saved")
        return found

    @contextlib.contextmanager
    def _reading(self, step: int) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # Orbax, tensorstore and JSON raise many kinds
            reason = first_line(error)
            raise CheckpointGone(f"{self._manager.directory}/{step}: {reason}") from error

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except (ValueError, OSError) as error:  # tensorstore raises ValueError on a full disk
            reason = first_line(error)
            raise InputError(
                f"{self._manager.directory}: a checkpoint cannot be written ({reason}): free space "
                "or mend permissions; the same command resumes from the checkpoint before"
            ) from error

    def wait(self) -> None:
        """Returns when everything saved is on disk. Raises InputError if it cannot be written."""
        with self._writing():
            self._manager.wait_until_finished()

    def close(self) -> None:
        self._manager.close()
