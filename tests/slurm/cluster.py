"""A real Slurm of two nodes on this machine: munged, slurmctld and two slurmd, with all they write
in one temporary folder.

``python -m tests.slurm.cluster`` starts one, and a shell in which sbatch, squeue ... talk to it.
"""

import os
import secrets
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import psutil

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "scancel", "setpriv")
NODES = ("n1", "n2")
REPOSITORY = Path(__file__).parents[2]
PATIENCE_S = 600
CONFIG = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser={user}
SlurmdUser={user}
# cred_expire is also how long a requeued job waits before it may start again.
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
MpiDefault=none
# No cgroups, which containers do not allow; and nodes have what they claim.
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerType=sched/builtin
SchedulerParameters=sched_interval=1,batch_sched_delay=0
ReturnToService=2
# Where a script forgets --requeue.
JobRequeue=0
KillWait=3
GresTypes=gpu
{nodes}
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE
"""
NODE = "NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs=8 Gres=gpu:2"
GPUS = "Name=gpu File=/dev/null,/dev/zero\n"  # enough of a GPU for Slurm to hand out


def why_not() -> str | None:
    """What is missing here; None if a cluster can be started."""
    missing = [name for name in PROGRAMS if shutil.which(name, path=_path()) is None]
    return f"no {', '.join(missing)}: apt install slurm-wlm munge" if missing else None


def _path() -> str:
    return f"{os.environ['PATH']}:/usr/sbin:/sbin"  # where daemons lie


class Cluster:
    """Its daemons, and what a person at its login node would do."""

    def __init__(self, folder: Path, **variables: str) -> None:
        """``variables``: what that person has in the environment."""
        self.folder = folder
        self.environment = variables | {"PATH": _path(), "SLURM_CONF": str(folder / "slurm.conf")}
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}

    def start(self) -> None:
        """Returns when both nodes are idle."""
        self._configure()
        self._start_munge()
        self._daemon("slurmctld", "slurmctld", "-D")
        for node in NODES:
            self.start_node(node)
        self.wait(lambda: self.command("sinfo", "-h", "-o", "%T %D").split() == ["idle", "2"])

    def start_node(self, node: str) -> None:
        """Start its slurmd."""
        self._daemon(node, "slurmd", "-D", "-N", node, TEST_NODE=node)

    def kill_node(self, node: str) -> None:
        """As if its plug were pulled: SIGKILL for its slurmd and for all that this started."""
        for process, variables in self._processes():
            if node in (variables.get("TEST_NODE"), variables.get("SLURMD_NODENAME")):
                process.kill()
        self._daemons.pop(node).wait()

    def stop(self) -> None:
        """End all that runs in it."""
        while processes := list(self._processes()):  # again, for what one of them still started
            for process, _ in processes:
                process.kill()
            psutil.wait_procs([process for process, _ in processes], timeout=1)

    def command(self, *words: str, **variables: str) -> str:
        """What the command said, once it has ended well."""
        done = subprocess.run(
            words,
            cwd=REPOSITORY,
            env=self.environment | variables,
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.returncode == 0, f"{words}: {done.stdout}{done.stderr}\n{self.report()}"
        return done.stdout

    def job(self, number: str) -> Mapping[str, str]:
        """What ``scontrol show job`` says of it, by name."""
        words = self.command("scontrol", "-o", "show", "job", number).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def rank(self, job: str, number: int) -> psutil.Process | None:
        """The process of one task of a job's program, if it runs."""
        wanted = {"SLURM_JOB_ID": job, "SLURM_PROCID": str(number)}
        for process, variables in self._processes():
            try:  # not srun, which has the program's name on its command line too
                program = "".join(process.cmdline()[1:2])
            except psutil.Error:
                continue
            if program.endswith("launcher/train.py") and wanted.items() <= variables.items():
                return process
        return None

    def wait(self, until: Callable[[], bool]) -> None:
        """Look again and again, and fail with the logs where it takes too long."""
        deadline = time.monotonic() + PATIENCE_S
        while not until():
            assert time.monotonic() < deadline, self.report()
            time.sleep(0.1)

    def report(self) -> str:
        """The end of every log."""
        logs = sorted(self.folder.glob("*.log"))
        return "\n".join(
            f"--- {log.name}\n{log.read_text(errors='replace')[-4000:]}" for log in logs
        )

    def _processes(self) -> Iterator[tuple[psutil.Process, Mapping[str, str]]]:
        """All that run in this cluster, and their variables."""
        for process in psutil.process_iter():
            try:
                variables = process.environ()
            except psutil.Error:
                continue
            if variables.get("SLURM_CONF") == self.environment["SLURM_CONF"]:
                yield process, variables

    def _configure(self) -> None:
        host, user = socket.gethostname(), psutil.Process().username()
        port, *ports = _free_ports(1 + len(NODES))
        nodes = "\n".join(
            NODE.format(name=n, host=host, port=p) for n, p in zip(NODES, ports, strict=True)
        )
        text = CONFIG.format(folder=self.folder, host=host, user=user, port=port, nodes=nodes)
        (self.folder / "slurm.conf").write_text(text)
        (self.folder / "gres.conf").write_text(GPUS)
        for name in ("state", *NODES):
            (self.folder / name).mkdir()

    def _start_munge(self) -> None:
        key = self.folder / "munge.key"
        key.write_bytes(secrets.token_bytes(128))
        key.chmod(0o400)
        names = {"key-file": "key", "socket": "socket", "pid-file": "pid", "seed-file": "seed"}
        files = [f"--{option}={self.folder}/munge.{name}" for option, name in names.items()]
        # --force: it would rather not lie in a folder that is closed to others.
        self._daemon("munge", "munged", "--foreground", "--force", *files)
        self.wait((self.folder / "munge.socket").exists)

    def _daemon(self, name: str, *words: str, **variables: str) -> None:
        # It dies with this process, also when that is killed.
        command = ["setpriv", "--pdeathsig", "KILL", *words]
        environment = self.environment | variables
        with (self.folder / f"{name}.log").open("ab") as log:
            self._daemons[name] = subprocess.Popen(command, env=environment, stdout=log, stderr=log)


def _free_ports(count: int) -> list[int]:
    probes = [socket.socket() for _ in range(count)]
    for probe in probes:
        probe.bind(("", 0))
    ports = [int(probe.getsockname()[1]) for probe in probes]
    for probe in probes:
        probe.close()
    return ports


@contextmanager
def running_cluster(**variables: str) -> Iterator[Cluster]:
    """Started, and stopped with all of its jobs."""
    # Not pytest's folder: a socket's path may have 107 characters.
    with tempfile.TemporaryDirectory(prefix="slurm-") as folder:
        cluster = Cluster(Path(folder), **variables)
        try:
            cluster.start()
            yield cluster
        finally:
            cluster.stop()


if __name__ == "__main__":
    with running_cluster(**os.environ) as one:
        subprocess.run([os.environ.get("SHELL", "/bin/sh")], env=one.environment)
