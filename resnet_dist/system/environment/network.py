"""The network of this machine, as far as the ranks of one host need it."""

from __future__ import annotations

import errno
import fcntl
import os
import re
import socket
import struct
from pathlib import Path

from resnet_dist.errors import UserError
from resnet_dist.system.environment.variables import num_gpus

LOOPBACK = "127.0.0.1"
TIMEOUT_SECONDS = 2.0
GLOO_VARIABLE, NCCL_VARIABLE = "GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"
_GET_ADDRESS = 0x8915  # SIOCGIFADDR of Linux
IPV6_ADDRESSES = Path("/proc/net/if_inet6")
# Gloo's error for an interface that is missing or has no address.
_GLOO_ERROR = re.compile(r"Unable to find (?:address|interface) for: (\S+)")
_HOST = re.compile(r"\bip=([0-9a-fA-F.:]+)")


def check_loopback() -> list[str]:
    """Raise UserError where processes of this machine cannot connect to one another."""
    try:
        with socket.create_server((LOOPBACK, 0)) as server:
            address = server.getsockname()
            socket.create_connection(address, timeout=TIMEOUT_SECONDS).close()
    except OSError as error:
        raise UserError(
            f"Ray needs the loopback interface, and a connection to {LOOPBACK} fails here ({error.strerror or error}): "
            "type `ip link set lo up` as root, or train with --local"
        ) from None
    return []


def check_interface_of_gloo() -> list[str]:
    """Raise UserError where the variable for ranks on CPUs names an interface that this machine lacks."""
    names = [name for name in os.environ.get(GLOO_VARIABLE, "").split(",") if name]
    _check(GLOO_VARIABLE, names, interfaces())
    return []


def check_interface_of_nccl() -> list[str]:
    """Raise UserError where the variable for ranks on GPUs matches none of this machine's interfaces.

    It holds prefixes of names, or names after `=`; `^` excludes what follows.
    """
    value = os.environ.get(NCCL_VARIABLE, "")
    if not value or value.startswith("^") or num_gpus() == 0:
        return []
    have, exact = interfaces(), value.startswith("=")
    names = [name for name in value.removeprefix("=").split(",") if name]
    if not any(name in have if exact else any(one.startswith(name) for one in have) for name in names):
        _check(NCCL_VARIABLE, names, have)
    return []


def follow_nccl() -> None:
    """Let Gloo, which ranks on GPUs use beside NCCL, take the interface of NCCL where the person named that alone.

    Without a name Gloo takes the address that the name of the host leads to, often another network or the loopback.
    """
    value = os.environ.get(NCCL_VARIABLE, "")
    if not value or os.environ.get(GLOO_VARIABLE):
        return
    excludes, names = value.startswith("^"), value.removeprefix("^")
    is_exact, listed = names.startswith("="), tuple(filter(None, names.removeprefix("=").split(",")))
    for one in interfaces():
        is_named = one in listed if is_exact else one.startswith(listed)
        # What is left after an exclusion is for other hosts too, which cannot reach a loopback interface.
        if is_named != excludes and not (excludes and one == "lo"):
            os.environ[GLOO_VARIABLE] = one
            return


def _check(variable: str, names: list[str], have: list[str]) -> None:
    missing = [name for name in names if name not in have]
    if missing:
        raise UserError(
            f"{variable}={os.environ[variable]}: {socket.gethostname()} has no interface {', '.join(missing)} with an "
            f"address; it has {', '.join(have) or 'none'}: name one of them, or unset the variable"
        )


def interfaces() -> list[str]:
    """Return the names of this machine's interfaces that have an address."""
    names = [name for _, name in socket.if_nameindex()]
    try:
        with_ipv6 = {line.split()[-1] for line in IPV6_ADDRESSES.read_text().splitlines()}
    except OSError:  # no IPv6
        with_ipv6 = set()
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        return [name for name in names if name in with_ipv6 or _has_ipv4(probe, name)]


def _has_ipv4(probe: socket.socket, name: str) -> bool:
    try:
        fcntl.ioctl(probe, _GET_ADDRESS, struct.pack("256s", name.encode()[:15]))
    except OSError as error:
        # Another system than Linux has another number for this question: believe the name.
        return error.errno not in (errno.EADDRNOTAVAIL, errno.ENODEV)
    return True


def interface_problem(message: str) -> str | None:
    """Return the sentence for an error of Gloo, on whichever host, about an interface; None for other errors."""
    found = _GLOO_ERROR.search(message)
    if found is None:
        return None
    host = _HOST.search(message)
    return (
        f"{GLOO_VARIABLE}={found[1]} of the node {host[1] if host else 'that failed'} names no interface with an address "
        "there: start Ray on that node with the name of one, or without the variable"
    )
