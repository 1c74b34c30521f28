"""Settings of JAX for every command that computes, and the processes of one run.

One process drives all devices of its host. Several, on one host or many, are one program: each runs
the same command, and `jax.distributed` makes all their devices one mesh. Only process 0 prints and
writes the run's small files; all take part in checkpoints.
"""

import glob
import os
import signal
import sys
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from sdpo_jax.system.errors import InputError
from sdpo_jax.system.wheels import cache_folder

# The variable in which a launcher gives the number of processes.
LAUNCHERS = {"SLURM_STEP_NUM_TASKS": "Slurm", "OMPI_COMM_WORLD_SIZE": "Open MPI"}


def set_up_jax(dtype: str) -> None:
    """Sets up a persistent compilation cache, and float32 products in full precision.

    The cache is in the user's cache folder, unless JAX_COMPILATION_CACHE_DIR names another.
    """
    if not jax.config.values["jax_compilation_cache_dir"]:
        jax.config.update("jax_compilation_cache_dir", str(cache_folder() / "xla"))
    if dtype == "float32":
        # By default GPUs and TPUs round the operands of float32 products.
        jax.config.update("jax_default_matmul_precision", "highest")


def join_processes(
    coordinator: str,
    processes: int | None,
    process: int | None,
    *,
    start_seconds: int,
    heartbeat_seconds: int,
) -> None:
    """Joins this process to its run; to be called before JAX is asked for devices.

    Args:
      coordinator: "host:port" on the host of process 0, with the two numbers below; "auto": JAX
        asks the cluster (TPU slices); "": the steps of Slurm and Open MPI are recognized, and
        anything else is a run of one process.
      processes: their number.
      process: the number of this one.
      start_seconds: how long to wait for the others.
      heartbeat_seconds: all end after this time without a sign of life from one.

    Raises InputError if a number is missing or the others do not come.
    """
    timeouts: dict[str, Any] = {
        "initialization_timeout": start_seconds,
        "heartbeat_timeout_seconds": heartbeat_seconds,
        "shutdown_timeout_seconds": heartbeat_seconds,
    }
    explicit = coordinator not in ("", "auto")
    if explicit != (processes is not None) or explicit != (process is not None):
        raise InputError(
            f"--coordinator={coordinator} --processes={processes} --process={process}: expected "
            "all three, --coordinator=auto, or none of them"
        )
    # It would handle SIGTERM, and a small model can pass the step that it is agreeing on.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        if explicit:
            jax.distributed.initialize(
                coordinator, processes, process, cluster_detection_method="deactivate", **timeouts
            )
        elif coordinator == "auto" or any(int(os.environ.get(k, 1)) > 1 for k in LAUNCHERS):
            jax.distributed.initialize(local_device_ids=own_gpus(os.environ), **timeouts)
    except (RuntimeError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise InputError(
            f"the processes of this run did not come together ({reason}): is the coordinator's "
            "address the same for all, its port free and reachable, and the number of processes "
            f"right? each waits {start_seconds} s (config.distributed.start_seconds)"
        ) from error
    if jax.process_index() > 0:
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115


def own_gpus(environment: Mapping[str, str]) -> list[int] | None:
    """The GPUs of this process, as numbers among those it can see; None where there are none.

    JAX gives each process of Slurm and Open MPI the one GPU of its local number. That leaves GPUs
    idle where a process should have several, and does not exist where the launcher shows every
    process only its own GPU.
    """
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    count = len(visible.split(",")) if visible else len(glob.glob("/dev/nvidia[0-9]*"))
    # Slurm's "4(x2)" or "4": tasks on each node. The first node's stand for this one's.
    on_node = environment.get("SLURM_STEP_TASKS_PER_NODE", "").partition("(")[0].partition(",")[0]
    tasks = int(on_node or environment.get("OMPI_COMM_WORLD_LOCAL_SIZE", 1))
    local = int(environment.get("SLURM_LOCALID", environment.get("OMPI_COMM_WORLD_LOCAL_RANK", 0)))
    each = max(1, count // tasks)
    all_gpus = list(range(count))
    return all_gpus[local * each : (local + 1) * each] or all_gpus or None


def first_process(task: Callable[[], None]) -> None:
    """Runs `task` on process 0 while the others wait; if it raises InputError, all do."""
    refused = None
    if jax.process_index() == 0:
        try:
            task()
        except InputError as error:
            refused = error
    if multihost_utils.broadcast_one_to_all(np.int32(refused is not None)):
        raise refused or InputError("process 0 has refused the run: see what it said")


class Interrupted(Exception):
    """SIGINT or SIGTERM was received, and the state is on disk."""


class StopSignal:
    """Notes SIGINT and SIGTERM, so that the loop can end between two steps.

    The processes of a run may receive them at different moments, or only one of them. Each `ask`
    starts a maximum over all processes in the background and returns that of the `ask` before.
    """

    def __init__(self):
        self._noted, self._asked, self.received = False, None, False
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._note)
        devices = Mesh(np.array(jax.devices()), ("device",))
        self._apart = NamedSharding(devices, PartitionSpec("device"))
        self._any = jax.jit(jax.numpy.max, out_shardings=NamedSharding(devices, PartitionSpec()))

    def _note(self, number, frame):
        self._noted = True

    def ask(self) -> bool:
        """Whether to stop now; all processes call this equally often and get the same answer."""
        if jax.process_count() == 1:
            self.received |= self._noted
            return self.received
        before, noted = self._asked, np.array([self._noted])
        flags = jax.make_array_from_callback((jax.device_count(),), self._apart, lambda _: noted)
        self._asked = self._any(flags)
        self.received |= before is not None and bool(before)
        return self.received

    def check(self) -> None:
        """Raises Interrupted if the last answer was to stop."""
        if self.received:
            raise Interrupted
