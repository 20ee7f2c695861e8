"""Two machines on this one, as far as a launcher can tell: network namespaces with a cable between
them, an sshd in each, and one disk."""

import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

ADDRESSES = ("10.77.0.1", "10.77.0.2")
PATH = f"{os.environ['PATH']}:/usr/sbin:/sbin"
PROGRAMS = ("ip", "pdsh", "ssh", "ssh-keygen", "sshd", "unshare")
SSHD = """
HostKey {folder}/key
AuthorizedKeysFile {folder}/key.pub
StrictModes no
UsePAM no
PidFile none
PermitRootLogin prohibit-password
"""
SSH = """#!/bin/sh
exec {ssh} -i {folder}/key -o IdentitiesOnly=yes -o StrictHostKeyChecking=no \\
    -o UserKnownHostsFile=/dev/null -o LogLevel=ERROR "$@"
"""


def why_not() -> str | None:
    """What this machine lacks for two nodes, or None."""
    missing = [name for name in PROGRAMS if shutil.which(name, path=PATH) is None]
    if missing:
        return f"two nodes need {' '.join(missing)}: apt install iproute2 openssh-server pdsh"
    if subprocess.run(["unshare", "--net", "true"], capture_output=True).returncode:
        return "two nodes need network namespaces, which this user may not make"
    return None


@contextmanager
def two_nodes(folder: Path) -> Iterator[list[str]]:
    """What to write before a command so that it runs on the first node. ``folder`` is then a place
    to look for programs first: its ssh goes to the other node and asks nothing."""
    call("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / "key"))
    (folder / "sshd_config").write_text(SSHD.format(folder=folder))
    (folder / "ssh").write_text(SSH.format(folder=folder, ssh=shutil.which("ssh", path=PATH)))
    (folder / "ssh").chmod(0o700)
    names = [f"node_{os.getpid()}_{number}" for number in (1, 2)]
    with ExitStack() as stack:
        for name in names:
            call("ip", "netns", "add", name)
            stack.callback(call, "ip", "netns", "del", name)
        cable = "type veth peer name eth0 netns".split()
        call("ip", "link", "add", "eth0", "netns", names[0], *cable, names[1])
        for name, address in zip(names, ADDRESSES, strict=True):
            call("ip", "-n", name, "address", "add", f"{address}/24", "dev", "eth0")
            for device in ("lo", "eth0"):
                call("ip", "-n", name, "link", "set", device, "up")
            stack.enter_context(sshd(name, folder))
        yield ["ip", "netns", "exec", names[0]]


@contextmanager
def sshd(node: str, folder: Path) -> Iterator[None]:
    """Answers on that node's port 22 inside the block."""
    Path("/run/sshd").mkdir(exist_ok=True)  # it insists, as its service would have made it
    program = shutil.which("sshd", path=PATH)
    command = ["ip", "netns", "exec", node, program, "-D", "-f", folder / "sshd_config"]
    server = subprocess.Popen(command, env={"PATH": PATH})
    try:
        until = time.monotonic() + 20
        while b":22 " not in call("ip", "netns", "exec", node, "ss", "--listening", "--tcp", "-n"):
            assert server.poll() is None and time.monotonic() < until, "sshd does not listen"
            time.sleep(0.05)
        yield
    finally:
        server.kill()
        server.wait()


def call(*command: str) -> bytes:
    return subprocess.run(command, check=True, env={"PATH": PATH}, stdout=subprocess.PIPE).stdout
