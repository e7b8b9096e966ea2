"""Several hosts on this machine: namespaces with a name, an address, processes and shared memory of their own."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

REPOSITORY = Path(__file__).parents[2]


def require(*programs: str) -> None:
    """Skips the test where a Debian package of .ci/packages.txt is missing, or the right to make namespaces."""
    missing = [program for program in programs if not shutil.which(program)]
    if missing:
        pytest.skip(f"{', '.join(missing)} not installed: apt-get install $(cat .ci/packages.txt)")
    if subprocess.run(["unshare", "--net", "true"], capture_output=True).returncode != 0:
        pytest.skip("making network namespaces needs root")


def namespace(*kinds: str) -> tuple[subprocess.Popen[bytes], int]:
    """A process that sleeps in new namespaces, and the id of the first process inside, whose end ends all others."""
    command = [
        "setpriv",
        "--pdeathsig=KILL",
        "unshare",
        "--mount",
        "--pid",
        "--fork",
        "--kill-child",
        "--mount-proc",
        *kinds,
        "sleep",
        "infinity",
    ]
    outer = subprocess.Popen(command)
    while not (children := psutil.Process(outer.pid).children()) or children[0].name() != "sleep":
        time.sleep(0.01)
    return outer, children[0].pid


class Host:
    """Runs an ssh server for the user's key; the other hosts know it by name."""

    def __init__(self, folder: Path, name: str) -> None:
        self.name = name
        self._folder = folder
        self._outer, self.pid = namespace("--net", "--uts")
        self.run(
            f"hostname {name} && ip link set lo up && mount -t tmpfs tmpfs /dev/shm && mount -t tmpfs tmpfs /run && "
            f"mkdir /run/sshd && mount --bind {folder}/hosts /etc/hosts && {shutil.which('sshd')} -f {folder}/sshd_config"
        )

    def connect(self, other: Host) -> None:
        """A cable between two hosts, eth0 at both ends."""
        link = f"name eth0 netns {self.pid} type veth peer name eth0 netns {other.pid}"
        subprocess.run(["ip", "link", "add", *link.split()], check=True)
        for host, address in ((self, "10.0.0.1"), (other, "10.0.0.2")):
            host.run(f"ip address add {address}/24 dev eth0 && ip link set eth0 up")

    def start(self, command: list[str], output: int | None = None, **environment: str) -> subprocess.Popen[bytes]:
        """Starts a command on this host, in the repository; its output goes to NAME.txt unless told otherwise."""
        inside = ["nsenter", "--target", str(self.pid), "--mount", "--uts", "--net", "--pid", f"--wdns={REPOSITORY}"]
        path = f"{self._folder}/bin:{Path(sys.executable).parent}:{os.environ['PATH']}"
        common = {"PATH": path, "PYTHONPATH": str(REPOSITORY), "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
        common |= {"DS_ENV_FILE": f"{self._folder}/deepspeed_env"}
        with open(self._folder / f"{self.name}.txt", "ab") as log:
            return subprocess.Popen(
                [*inside, *command], env=os.environ | common | environment, stdout=output or log, stderr=log
            )

    def run(self, script: str) -> None:
        process = self.start(["sh", "-c", script])
        assert process.wait() == 0, self.output()

    def output(self) -> str:
        return (self._folder / f"{self.name}.txt").read_text()

    def processes(self, *arguments: str) -> list[psutil.Process]:
        """The processes of this host that have all `arguments` on their command line."""
        mine = os.stat(f"/proc/{self.pid}/ns/pid").st_ino
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(OSError, psutil.Error):  # it ended meanwhile
                if os.stat(f"/proc/{process.pid}/ns/pid").st_ino == mine and set(arguments) <= set(process.cmdline()):
                    found.append(process)
        return found

    def ranks(self) -> list[psutil.Process]:
        """Not the data workers, which are children of ranks."""
        found = {process.pid: process for process in self.processes("-m", "train") if "RANK" in process.environ()}
        return [process for process in found.values() if process.ppid() not in found]

    def lose(self) -> None:
        """As if its power were cut."""
        os.kill(self.pid, signal.SIGKILL)
        self._outer.wait()


@pytest.fixture
def make_host(tmp_path: Path) -> Iterator[Callable[[str], Host]]:
    """`make_host("node-a")` and `make_host("node-b")`: once connected, each reaches the other by `ssh NAME`."""
    require("ip", "ssh", "sshd", "pdsh", "unshare", "nsenter")
    folder = tmp_path / "hosts"
    (folder / "bin").mkdir(parents=True)
    (folder / "hosts").write_text("127.0.0.1 localhost\n10.0.0.1 node-a node1\n10.0.0.2 node-b\n")
    for key in ("host_key", "user_key"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / key)], check=True)
    (folder / "sshd_config").write_text(
        f"HostKey {folder}/host_key\nAuthorizedKeysFile {folder}/user_key.pub\nStrictModes no\nUsePAM no\nPidFile none\n"
        "PasswordAuthentication no\n"
    )
    ssh = folder / "bin" / "ssh"
    options = f"-i {folder}/user_key -o StrictHostKeyChecking=no -o UserKnownHostsFile=/dev/null -o LogLevel=ERROR"
    ssh.write_text(f'#!/bin/sh\nexec {shutil.which("ssh")} -F /dev/null {options} "$@"\n')
    ssh.chmod(0o755)
    (folder / "deepspeed_env").write_text("DS_ACCELERATOR=cpu\nOMP_NUM_THREADS=1\n")
    hosts: list[Host] = []

    def make(name: str) -> Host:
        hosts.append(Host(folder, name))
        return hosts[-1]

    yield make
    for host in hosts:
        if Path(f"/proc/{host.pid}").exists():
            host.lose()


@pytest.fixture
def wait_until() -> Callable[..., None]:
    def wait(condition: Callable[[], Any], seconds: float = 180) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, "waited too long"
            time.sleep(0.05)

    return wait


SLURM_CONF = """
ClusterName=test
SlurmctldHost=localhost
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=1
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
AccountingStorageType=accounting_storage/none
SchedulerParameters=sched_interval=1,bf_interval=1
NodeName=node1 NodeHostname=localhost NodeAddr=127.0.0.1 Port=17001 CPUs=2
NodeName=node2 NodeHostname=localhost NodeAddr=127.0.0.1 Port=17002 CPUs=2
PartitionName=all Nodes=ALL Default=YES
"""


@pytest.fixture
def slurm(make_host: Callable[[str], Host], tmp_path: Path) -> Callable[..., str]:
    """A Slurm of two nodes. `slurm("squeue", "--noheader")` runs a command where it runs, and returns what it prints."""
    require("munged", "slurmctld", "slurmd", "sbatch")
    folder = tmp_path / "slurm"
    for name in ("state", "node1", "node2"):
        (folder / name).mkdir(parents=True)
    (folder / "slurm.conf").write_text(SLURM_CONF.format(folder=folder))
    (folder / "munge.key").write_bytes(os.urandom(1024))
    (folder / "munge.key").chmod(0o600)
    host = make_host("node1")
    # The daemons want an address beside loopback.
    host.run("ip link add eth0 type veth peer name eth1 && ip address add 10.0.0.1/24 dev eth0 && ip link set eth0 up")
    files = [f"--{kind}-file={folder}/munged.{kind}" for kind in ("pid", "log", "seed")]
    conf = {"SLURM_CONF": f"{folder}/slurm.conf"}
    host.run(f"munged --force --key-file={folder}/munge.key --socket={folder}/munge.socket {' '.join(files)}")
    for daemon in (["slurmctld", "-D"], ["slurmd", "-D", "-N", "node1"], ["slurmd", "-D", "-N", "node2"]):
        host.start(daemon, **conf)

    def command(*arguments: str) -> str:
        process = host.start(list(arguments), output=subprocess.PIPE, **conf)
        return process.communicate()[0].decode()

    deadline = time.monotonic() + 60
    while command("sinfo", "--noheader", "--format=%T").split() != ["idle"]:
        assert time.monotonic() < deadline, host.output()
        time.sleep(0.2)
    return command
