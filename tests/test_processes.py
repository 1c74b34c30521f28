"""Several processes that are one training, started as users start them."""

import os
import signal
import subprocess
from pathlib import Path

import numpy as np
import pytest
import trainers

from sdpo_jax.system import processes
from sdpo_jax.system.errors import InputError

STEPS = {"sft": 8, "sdpo": 16}  # one shape and two


@pytest.fixture(scope="module")
def flags(histories_folder, model_folder):
    def make(run: Path, **changes) -> list[str]:
        changes = {"sft.max_steps": STEPS["sft"]} | changes
        return trainers.history_flags(run, histories_folder, model_folder, STEPS["sdpo"], **changes)

    return make


@pytest.fixture(scope="module")
def alone(flags, tmp_path_factory) -> Path:
    """The same training by one process with one device."""
    run = tmp_path_factory.mktemp("alone") / "run"
    trainers.end(trainers.start(flags(run, checkpoint_every=8)))
    return run


def assert_same_curves(run: Path, other: Path) -> None:
    for stage in ("sft", "sdpo"):
        found, expected = trainers.curve(run, stage), trainers.curve(other, stage)
        assert len(expected) == STEPS[stage]
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_two_processes_with_four_devices_each_lose_what_one_device_loses(alone, flags, tmp_path):
    run = tmp_path / "run"
    changes = {"mesh.data": 2, "mesh.fsdp": 2, "mesh.tensor": 2, "checkpoint_every": 8}
    output = trainers.end(trainers.start(flags(run, **changes), processes=2, CPU_DEVICES="4"))
    assert "8 cpu device(s) in 2 process(es)" in output
    assert output.count("--- train example 0, 3 target(s) ---") == 1  # process 0 alone speaks
    assert_same_curves(run, alone)


def test_a_run_goes_on_after_a_dead_peer_and_a_signal_on_another_mesh(alone, flags, tmp_path):
    run = tmp_path / "run"
    spread = {"mesh.data": 1, "mesh.fsdp": 4, "mesh.tensor": 1}
    process = trainers.start(flags(run, **spread), processes=2, CPU_DEVICES="2")
    trainers.wait_for_step(process, run, "sft", 3)
    os.kill(children(process)[1], signal.SIGKILL)
    trainers.end(process, expected=128 + signal.SIGKILL)

    process = trainers.start(flags(run, **spread), processes=2, CPU_DEVICES="2")
    trainers.wait_for_step(process, run, "sdpo", 3)
    process.send_signal(signal.SIGTERM)
    assert "the same command resumes" in trainers.end(process, expected=os.EX_TEMPFAIL)
    assert len(trainers.curve(run, "sdpo")) < STEPS["sdpo"]

    trainers.end(trainers.start(flags(run), devices=2))
    assert_same_curves(run, alone)


def children(process: subprocess.Popen) -> list[int]:
    """The trainers that `launch/local.sh` started, in order."""
    listed = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return [
        int(pid) for pid in listed if b"sdpo_jax.train" in Path(f"/proc/{pid}/cmdline").read_bytes()
    ]


def test_two_tasks_of_a_slurm_step_find_each_other_and_a_signal_to_one_stops_both(flags, tmp_path):
    run = tmp_path / "run"
    step = {
        "SLURM_JOB_ID": str(os.getpid()),
        "SLURM_STEP_NODELIST": "localhost",
        "SLURM_NTASKS": "2",
        "SLURM_STEP_NUM_TASKS": "2",
        "SLURM_STEP_TASKS_PER_NODE": "2",
    }
    changes = {"sft.max_steps": 60, "sft.epochs": 8, "stages": "('sft',)"}
    tasks = [
        trainers.start(flags(run, **changes), SLURM_PROCID=str(i), SLURM_LOCALID=str(i), **step)
        for i in range(2)
    ]
    trainers.wait_for_step(tasks[0], run, "sft", 2)
    tasks[1].send_signal(signal.SIGTERM)
    outputs = [trainers.end(task, expected=os.EX_TEMPFAIL) for task in tasks]
    assert "2 cpu device(s) in 2 process(es), 1 of them in this" in outputs[0]
    assert 2 <= len(trainers.curve(run, "sft")) < 60


@pytest.mark.parametrize(
    ("shown", "tasks", "local", "expected"),
    [
        ("0,1,2,3", 1, 0, [0, 1, 2, 3]),  # one task a node takes all
        ("0,1,2,3", 4, 2, [2]),
        ("0,1,2,3", 2, 1, [2, 3]),
        ("7", 4, 3, [0]),  # --gpus-per-task shows each task its own
        ("", 2, 1, None),
    ],
)
def test_a_process_takes_its_share_of_the_gpus_that_it_sees(shown, tasks, local, expected):
    environment = {
        "CUDA_VISIBLE_DEVICES": shown,
        "SLURM_STEP_TASKS_PER_NODE": f"{tasks}(x2)",
        "SLURM_LOCALID": str(local),
    }
    assert processes.own_gpus(environment) == expected


@pytest.mark.parametrize(
    ("coordinator", "count", "process"), [("a:1", None, 0), ("", 2, 0), ("auto", 2, None)]
)
def test_half_of_the_processes_flags_is_refused(coordinator, count, process):
    with pytest.raises(InputError, match="expected all three"):
        processes.join_processes(coordinator, count, process, start_seconds=1, heartbeat_seconds=1)
