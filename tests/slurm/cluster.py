"""A Slurm of two nodes on this machine: ``gpu1`` with a GPU that is /dev/null, ``cpu1`` without.

The nodes are two slurmd with one controller and one munged, all on loopback with files of their
own, so a Slurm that the machine belongs to is not touched.
"""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.ports import free_ports

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "scontrol", "squeue", "scancel")
NODES = ("gpu1", "cpu1")
LONGEST_START = 120  # s

# a node that does not answer is down after 6 s, a job that ignores SIGTERM is killed after 4 s
CONFIGURATION = """\
ClusterName=nic
SlurmctldHost={host}(127.0.0.1)
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket
CredType=cred/munge
SlurmUser=root
SlurmdUser=root
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
ReturnToService=2
SlurmdTimeout=6
KillWait=4
PreemptType=preempt/partition_prio
PreemptMode=CANCEL
GresTypes=gpu
NodeName=gpu1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=2 RealMemory=4000 \
Gres=gpu:1 State=UNKNOWN
NodeName=cpu1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=2 RealMemory=4000 \
State=UNKNOWN
PartitionName=gpu Nodes=gpu1 PriorityTier=1 State=UP
PartitionName=urgent Nodes=gpu1 PriorityTier=2 State=UP
PartitionName=cpu Nodes=cpu1 Default=YES State=UP
"""


@dataclass(frozen=True)
class Cluster:
    """A running Slurm, whose configuration ``environment`` names."""

    folder: Path

    @property
    def environment(self) -> dict[str, str]:
        return {**os.environ, "SLURM_CONF": str(self.folder / "slurm.conf")}

    def run(self, *command: str) -> str:
        """Run a command of Slurm and return its output."""
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True)
        assert done.returncode == 0, (command, done.stderr)
        return done.stdout.strip()

    def states(self, name: str) -> list[str]:
        """Return node and state of all jobs of a name, oldest first."""
        listed = self.run("squeue", "--noheader", "--states=all", f"--name={name}", "-o%i %N %T")
        rows = sorted((line.split() for line in listed.splitlines()), key=lambda row: int(row[0]))
        return [" ".join(row[1:]) for row in rows]

    def start_node(self, node: str) -> None:
        self.run("slurmd", "-N", node)

    def lose_node(self, node: str, job: str) -> None:
        """Kill the slurmd of a node, and a job with its slurmstepd, as a power cut would."""
        _kill(int((self.folder / f"slurmd-{node}.pid").read_text()))
        for process in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):
                words = (process / "cmdline").read_bytes()
                variables = (process / "environ").read_bytes().split(b"\0")
                if words.startswith(f"slurmstepd: [{job}.".encode()) or (
                    f"SLURM_JOB_ID={job}".encode() in variables
                    and f"SLURM_CONF={self.folder}/slurm.conf".encode() in variables
                ):
                    _kill(int(process.name))

    def wait_until_idle(self) -> None:
        """Wait until both nodes have registered."""
        begun = time.monotonic()
        while set(states := self.run("sinfo", "--noheader", "-o%t").split()) != {"idle"}:
            if time.monotonic() > begun + LONGEST_START:
                log = (self.folder / "slurmctld.log").read_text()[-2000:]
                pytest.fail(f"the nodes did not start: {states}; {log}")
            time.sleep(0.1)


def _kill(pid: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


@contextmanager
def running_cluster() -> Iterator[Cluster]:
    """Start a cluster, and end it with its jobs; skip the test where it cannot be had."""
    path = f"{os.environ['PATH']}:/usr/sbin:/sbin"
    missing = [name for name in PROGRAMS if shutil.which(name, path=path) is None]
    if missing:
        pytest.skip(f"Slurm is not installed: {', '.join(missing)} missing")
    if os.getuid() != 0:
        pytest.skip("slurmd runs jobs as root only")
    folder = Path(tempfile.mkdtemp(prefix="nic-slurm-"))  # short, since the path of a socket is
    cluster = Cluster(folder)
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("PATH", path)
            _start(cluster)
            cluster.wait_until_idle()
            yield cluster
    finally:
        _stop(folder)
        shutil.rmtree(folder)


def _start(cluster: Cluster) -> None:
    folder = cluster.folder
    for name in ("munge", "state", *(f"spool/{node}" for node in NODES)):
        (folder / name).mkdir(parents=True)
    folder.chmod(0o755)
    key = folder / "munge.key"
    key.write_bytes(secrets.token_bytes(1024))
    key.chmod(0o400)
    (folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")  # read, but not used
    (folder / "gres.conf").write_text("NodeName=gpu1 Name=gpu File=/dev/null\n")
    (folder / "slurm.conf").write_text(
        CONFIGURATION.format(
            folder=folder, host=socket.gethostname().partition(".")[0], ports=free_ports(3)
        )
    )
    files = {
        "key-file": key,
        "socket": folder / "munge" / "socket",
        "pid-file": folder / "munged.pid",
        "log-file": folder / "munged.log",
        "seed-file": folder / "munge.seed",
    }
    cluster.run("munged", "--force", *(f"--{name}={file}" for name, file in files.items()))
    cluster.run("slurmctld", "-c")
    for node in NODES:
        cluster.start_node(node)


def _stop(folder: Path) -> None:
    """Kill the daemons by their pid files, and every process that has this configuration."""
    for file in folder.glob("*.pid"):
        with suppress(ValueError):
            _kill(int(file.read_text()))
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            named = f"SLURM_CONF={folder}/slurm.conf".encode()
            if (
                named in (process / "environ").read_bytes().split(b"\0")
                and int(process.name) != os.getpid()
            ):
                _kill(int(process.name))
