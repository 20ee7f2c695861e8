"""Read the limits on memory and processors that the kernel sets for a group of processes, and count
the processes that it has ended because memory ran out.

A batch system, a container or systemd puts the processes of a job into such a group (a cgroup). The
limits of the group hold, and those of all groups around it. Version 1 of cgroups has a tree of
groups for each resource, version 2 one tree for all; a machine may have both.
"""

import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

PROC = Path("/proc/self")
"""Folder in which the kernel describes this process."""
OWN, ROOT = PROC / "cgroup", Path("/sys/fs/cgroup")
UNLIMITED = 2**60
"""From this number of bytes on, version 1 means that there is no limit."""


def memory_limit(proc: Path = PROC) -> int | None:
    """Return the bytes of memory that this process's groups may use, or None without a limit.

    Args:
        proc: folder with the files ``cgroup`` and ``mountinfo`` of the process.
    """
    limits = [
        int(text)
        for group in _groups("memory", proc)
        for name in ("memory.max", "memory.limit_in_bytes")
        if (text := _text(group / name)).isdecimal()
    ]
    return min((limit for limit in limits if limit < UNLIMITED), default=None)


def cpu_limit(proc: Path = PROC) -> float | None:
    """Return the number of processors whose time this process's groups may use, such as 1.5, or
    None without a limit.

    Args:
        proc: folder with the files ``cgroup`` and ``mountinfo`` of the process.
    """
    limits = []
    for group in _groups("cpu", proc):
        quota, _, period = _text(group / "cpu.max").partition(" ")
        if not quota:
            quota, period = (_text(group / f"cpu.cfs_{x}_us") for x in ("quota", "period"))
        if quota.isdecimal() and period.isdecimal() and int(period) > 0:
            limits.append(int(quota) / int(period))
    return min(limits, default=None)


@dataclass(frozen=True)
class _Tree:
    """A mounted tree of groups."""

    folder: Path
    root: str
    """Path in the tree of the group that is mounted at ``folder``: in a container that is not the
    root of the tree."""
    controllers: frozenset[str] | None
    """Resources of a tree of version 1; None for version 2."""


def _groups(controller: str, proc: Path) -> Iterator[Path]:
    """Yield the folders of the groups of this process that may limit a resource, inner ones first.

    Args:
        controller: the resource, "memory" or "cpu".
        proc: folder with the files ``cgroup`` and ``mountinfo`` of the process.
    """
    paths = {}
    for line in _text(proc / "cgroup").splitlines():
        _, names, path = (line.split(":", 2) + ["", ""])[:3]
        for name in names.split(","):  # version 2 has the line "0::/path"
            paths[name] = path
    for tree in _trees(proc):
        if tree.controllers is not None and controller not in tree.controllers:
            continue
        own = paths.get("" if tree.controllers is None else controller)
        if own is not None:
            yield from _up_from(own, tree)


def _up_from(path: str, tree: _Tree) -> Iterator[Path]:
    root = tree.root.rstrip("/")
    inside = path.removeprefix(root) if f"{path}/".startswith(f"{root}/") else ""
    group = tree.folder / inside.lstrip("/")
    if ".." in group.parts or not group.is_dir():  # a container sees no groups but its own
        group = tree.folder
    yield from (g for g in (group, *group.parents) if g.is_relative_to(tree.folder))


def _trees(proc: Path) -> Iterator[_Tree]:
    for line in _text(proc / "mountinfo").splitlines():
        mount, _, about = line.partition(" - ")
        fields, kind = mount.split(" "), about.split(" ")
        if len(fields) < 5 or kind[0] not in ("cgroup", "cgroup2"):
            continue
        controllers = frozenset(kind[-1].split(",")) if kind[0] == "cgroup" else None
        yield _Tree(Path(_unescaped(fields[4])), _unescaped(fields[3]), controllers)


def _unescaped(text: str) -> str:
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), text)


def _text(path: Path) -> str:
    try:
        return path.read_text().strip()
    except (OSError, UnicodeDecodeError):
        return ""


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
