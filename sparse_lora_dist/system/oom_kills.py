"""Count the processes of this job that the kernel has ended because memory ran out.

Linux counts them in the control group (cgroup) whose memory limit was reached. Slurm and containers
make such groups.
"""

from contextlib import suppress
from pathlib import Path

OWN, ROOT = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")


def oom_kills(own: Path = OWN, root: Path = ROOT) -> int:
    """Return how many processes of this job's control group on this machine the kernel has ended
    for memory, since the group was made. Return 0 if that cannot be read.

    Args:
        own: file that names the control groups of this process.
        root: folder of all control groups.
    """
    with suppress(OSError, ValueError):
        for line in own.read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if "memory" in controllers.split(
                ","
            ):  # version 1: a group does not count its subgroups
                files = _group(root / "memory", path).rglob("memory.oom_control")
                return sum(map(_counted, files))
        path = own.read_text().splitlines()[-1].split(":", 2)[2]
        return _counted(_group(root, path) / "memory.events")
    return 0


def _group(root: Path, path: str) -> Path:
    """Return the folder of a control group: that of the Slurm job, if there is one, since each task
    has a group of its own; ``root`` inside a container that does not see its path."""
    parts = [part for part in path.split("/") if part]
    job = next((i for i, part in enumerate(parts) if part.startswith("job_")), len(parts))
    folder = root.joinpath(*parts[: job + 1])
    return folder if folder.is_dir() and ".." not in parts else root


def _counted(file: Path) -> int:
    with suppress(OSError, ValueError):
        for line in file.read_text().splitlines():
            if line.startswith("oom_kill "):
                return int(line.split()[1])
    return 0
