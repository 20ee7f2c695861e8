"""Choose where rank 0's process listens for the other ranks."""

import errno
import ipaddress
import os
import socket

from sparse_lora_dist.distributed.launch import Launch

BACKLOG = 4096
"""Connections that may wait to be accepted: one for each rank, and one for its watchdog."""


def listening_socket(launch: Launch) -> socket.socket | None:
    """Return a socket that listens at the address where the ranks meet, for rank 0.

    The store in which ranks leave their addresses asks for no password, so it should not be open to
    more networks than needed. If all ranks are on one machine, it listens at the meeting address
    alone. With several machines it does so if the address is given as numbers: a name may have
    other addresses on other machines.

    Args:
        launch: rank and world size of this process, with the meeting address.

    Returns:
        The socket. None if it must listen at all addresses of this machine, e.g. because the
        meeting address is that of a router in front of it.

    Raises:
        OSError: the port is in use.
    """
    assert launch.address is not None
    one_machine = launch.local_size == launch.world_size
    if not (one_machine or _is_number(launch.address)):
        return None
    found = socket.getaddrinfo(launch.address, launch.port, type=socket.SOCK_STREAM)
    for family, kind, _, _, place in sorted(found, key=lambda one: one[0] != socket.AF_INET):
        if not one_machine and ipaddress.ip_address(place[0]).is_loopback:
            continue
        listener = socket.socket(family, kind)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(place)
            listener.listen(BACKLOG)
            return listener
        except OSError as error:
            listener.close()
            if error.errno != errno.EADDRNOTAVAIL:
                raise
    return None


def _is_number(address: str) -> bool:
    try:
        ipaddress.ip_address(address)
    except ValueError:
        return False
    return True


def own_address_in_words() -> str:
    """Return a sentence about the address that this machine gives to other ranks, if it may be one
    that they cannot reach; otherwise ""."""
    name, interface = socket.gethostname(), os.environ.get("GLOO_SOCKET_IFNAME")
    if interface is not None:
        return f"On {name} GLOO_SOCKET_IFNAME is {interface}. "
    try:
        address = socket.gethostbyname(name)
    except OSError:
        return f"{name} does not know its own name. "
    is_loopback = ipaddress.ip_address(address).is_loopback
    return f"On {name} its own name is {address}. " if is_loopback else ""
