"""Two hosts that lose each other, and Slurm's own daemons: what several hosts need, on one machine.

The hosts are two network namespaces joined by a cable. `make test-network`, as root; for Slurm
Debian's packages slurmctld, slurmd and slurm-client.
"""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import trainers

STEPS = 16
HEARTBEAT = 10  # seconds
ADDRESSES = ("10.213.77.1", "10.213.77.2")

pytestmark = pytest.mark.skipif(
    os.geteuid() != 0 or shutil.which("ip") is None, reason="needs root and the command `ip`"
)


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, timeout=20)


@contextlib.contextmanager
def two_hosts() -> Iterator[list[str]]:
    """Names of two namespaces with an address each, in which the host's name means that address."""
    names = [f"sdpo-{os.getpid()}-{i}" for i in (0, 1)]
    cables = [f"sdpo{os.getpid() % 10000}v{i}" for i in (0, 1)]
    folders = [Path("/etc/netns") / name for name in names]
    try:
        for name, folder, address in zip(names, folders, ADDRESSES, strict=True):
            folder.mkdir(parents=True)
            hosts = f"127.0.0.1 localhost\n{address} {socket.gethostname()}\n"
            (folder / "hosts").write_text(hosts)
            ip("netns", "add", name)
        ip("link", "add", cables[0], "type", "veth", "peer", "name", cables[1])
        for name, cable, address in zip(names, cables, ADDRESSES, strict=True):
            ip("link", "set", cable, "netns", name, "name", "cable")
            ip("-n", name, "addr", "add", f"{address}/24", "dev", "cable")
            for device in ("lo", "cable"):
                ip("-n", name, "link", "set", device, "up")
        yield names
    finally:
        for name, folder in zip(names, folders, strict=True):
            subprocess.run(["ip", "netns", "del", name], check=False, timeout=20)
            shutil.rmtree(folder, ignore_errors=True)


def start(name: str, process: int, flags: list[str]) -> subprocess.Popen:
    """Process 0 or 1 of a training in a namespace, with four devices."""
    peers = [f"--coordinator={ADDRESSES[0]}:29777", "--processes=2", f"--process={process}"]
    return subprocess.Popen(
        ["ip", "netns", "exec", name, sys.executable, "-m", "sdpo_jax.train", *peers, *flags],
        cwd=trainers.ROOT,
        env=trainers.environment(4),
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )


def test_hosts_whose_cable_is_cut_end_within_the_heartbeat_and_one_host_goes_on(
    histories_folder, model_folder, tmp_path
):
    def flags(run: Path, **changes) -> list[str]:
        changes = {"sft.max_steps": STEPS, "checkpoint_every": 2} | changes
        return trainers.history_flags(run, histories_folder, model_folder, STEPS, **changes)

    alone, run = tmp_path / "alone", tmp_path / "run"
    trainers.end(trainers.start(flags(alone)))
    spread = {
        "mesh.data": 2,
        "mesh.fsdp": 2,
        "mesh.tensor": 2,
        "distributed.heartbeat_seconds": HEARTBEAT,
    }
    with two_hosts() as names:
        hosts = [start(name, i, flags(run, **spread)) for i, name in enumerate(names)]
        try:
            trainers.wait_for_step(hosts[0], run, "sft", 3)
            ip("-n", names[1], "link", "set", "cable", "down")
            cut = time.monotonic()
            said = [host.communicate(timeout=4 * HEARTBEAT)[0] for host in hosts]
            seconds = time.monotonic() - cut
        finally:
            for host in hosts:
                if host.poll() is None:
                    os.killpg(host.pid, signal.SIGKILL)
                    print(host.communicate()[0])
        print(f"both ended {seconds:.0f} s after the cut, with {[h.returncode for h in hosts]}")
        assert all(host.returncode not in (0, os.EX_TEMPFAIL) for host in hosts), said
        assert seconds < 3 * HEARTBEAT

    trainers.end(trainers.start(flags(run)))
    for stage in ("sft", "sdpo"):
        found, expected = trainers.curve(run, stage), trainers.curve(alone, stage)
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


SLURM = """
ClusterName=sdpo
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller}
SlurmUser=root
SlurmdUser=root
AuthType=auth/none
CredType=cred/none
ProctrackType=proctrack/pgid
TaskPlugin=task/none
MpiDefault=none
ReturnToService=2
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/%n.log
NodeName=one NodeHostname={host} NodeAddr=127.0.0.1 Port={first} CPUs=1 State=UNKNOWN
NodeName=two NodeHostname={host} NodeAddr=127.0.0.1 Port={second} CPUs=1 State=UNKNOWN
PartitionName=all Nodes=one,two Default=YES MaxTime=INFINITE State=UP
"""


def free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


@pytest.fixture
def cluster(tmp_path) -> Iterator[dict[str, str]]:
    """The environment in which Slurm's commands reach two nodes of this machine."""
    if shutil.which("slurmctld") is None or shutil.which("slurmd") is None:
        pytest.skip("needs Debian's slurmctld, slurmd and slurm-client")
    folder = tmp_path / "slurm"
    (folder / "state").mkdir(parents=True)
    controller, first, second = free_ports(3)
    text = SLURM.format(
        host=socket.gethostname(), folder=folder, controller=controller, first=first, second=second
    )
    (folder / "slurm.conf").write_text(text)
    environment = trainers.environment(4, SLURM_CONF=str(folder / "slurm.conf"))
    # JAX looks for its coordinator by the first node's name, which only these processes know.
    hosts = folder / "hosts"
    hosts.write_text(f"127.0.0.1 localhost one two {socket.gethostname()}\n")
    known = ["unshare", "--mount", "sh", "-c", 'mount --bind "$0" /etc/hosts && exec "$@"']
    commands = [["slurmctld", "-D"], *(["slurmd", "-D", "-N", node] for node in ("one", "two"))]
    daemons = []
    try:
        for command in commands:
            log = (folder / f"{'-'.join(command)}.out").open("w")
            daemons.append(
                subprocess.Popen(
                    [*known, str(hosts), *command],
                    env=environment,
                    stdout=log,
                    stderr=log,
                    start_new_session=True,
                )
            )
            log.close()
        yield environment
    finally:
        for daemon in daemons:
            daemon.terminate()
        for daemon in daemons:
            daemon.wait(20)


def test_sbatch_trains_over_two_nodes_and_a_stopped_job_is_queued_again(
    cluster, histories_folder, model_folder, tmp_path
):
    run, alone, output = tmp_path / "run", tmp_path / "alone", tmp_path / "job.log"
    flags = [
        f.replace(str(run), "{run}")
        for f in trainers.history_flags(
            run, histories_folder, model_folder, STEPS, **{"sft.max_steps": STEPS}
        )
    ]
    trainers.end(trainers.start([f.format(run=alone) for f in flags]))
    shape = ["--config.mesh.data=2", "--config.mesh.fsdp=2", "--config.mesh.tensor=2"]
    batch = ["sbatch", "--parsable", "--nodes=2", f"--output={output}", "launch/slurm.sh"]
    done = subprocess.run(
        [*batch, *(f.format(run=run) for f in flags), *shape],
        cwd=trainers.ROOT,
        env=cluster,
        text=True,
        capture_output=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    job = done.stdout.strip()

    def state() -> str:
        asked = ["scontrol", "show", "job", job, "--oneliner"]
        said = subprocess.run(
            asked, env=cluster, text=True, capture_output=True, timeout=60, check=False
        ).stdout
        return said.partition("JobState=")[2].partition(" ")[0]

    def log() -> str:
        return output.read_text() if output.exists() else "no output"

    def wait_for(ready) -> None:
        deadline = time.monotonic() + trainers.TIMEOUT
        while not ready():
            assert time.monotonic() < deadline and state() not in ("FAILED", "NODE_FAIL"), log()
            time.sleep(0.5)

    wait_for(lambda: len(trainers.read_metrics(run / "metrics")) >= 3)
    subprocess.run(["scancel", "--signal=TERM", job], env=cluster, check=True, timeout=60)
    wait_for(lambda: "the same command resumes" in log())
    # Slurm waits two minutes before it starts a requeued job, unless it is released.
    wait_for(lambda: state() in ("PENDING", "COMPLETING", "REQUEUED"))
    wait_for(lambda: state() == "COMPLETED")
    assert "8 cpu device(s) in 2 process(es)" in log()
    for stage in ("sft", "sdpo"):
        found, expected = trainers.curve(run, stage), trainers.curve(alone, stage)
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
