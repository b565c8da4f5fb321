"""Links of a given rate between processes of one machine: Linux network namespaces joined by a bridge, slowed by tc.

    with links(ranks, megabytes_per_second) as names:
        ...                                  # in process `rank`, before it makes a process group: enter(names[rank])

A token bucket limits each rank's link in both directions. Needs root, ip and tc; raises UserError without them.
"""

import ctypes
import os
import shlex
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from common import UserError

INTERFACE = "eth0"  # of every rank
_NETWORK = 0x40000000  # CLONE_NEWNET of sched.h


@contextmanager
def links(ranks: int, megabytes_per_second: float) -> Iterator[list[str]]:
    """Make a namespace per rank, with a link of this rate into it and out of it; returns their names."""
    names, hub = [f"rank{rank}-{os.getpid()}" for rank in range(ranks)], f"hub-{os.getpid()}"
    slow = f"root tbf rate {round(8000 * megabytes_per_second)}kbit burst 256kb latency 1s"
    try:
        _run(f"ip netns add {hub}")
        _run(f"ip -n {hub} link add name hub type bridge")
        _run(f"ip -n {hub} link set hub up")
        for rank, name in enumerate(names):
            _run(f"ip netns add {name}")
            _run(f"ip link add {INTERFACE} netns {name} type veth peer name to{rank} netns {hub}")
            _run(f"ip -n {name} address add 10.77.{rank // 250}.{rank % 250 + 1}/16 dev {INTERFACE}")
            for device in (INTERFACE, "lo"):
                _run(f"ip -n {name} link set {device} up")
            _run(f"ip -n {hub} link set to{rank} master hub up")
            _run(f"tc -n {name} qdisc add dev {INTERFACE} {slow}")
            _run(f"tc -n {hub} qdisc add dev to{rank} {slow}")
        yield names
    finally:
        for name in (*names, hub):
            with suppress(UserError):
                _run(f"ip netns delete {name}")


def enter(name: str) -> None:
    """Move this thread, and those that it starts, into a namespace, and let gloo use its link."""
    with open(f"/run/netns/{name}") as namespace:
        if ctypes.CDLL(None, use_errno=True).setns(namespace.fileno(), _NETWORK):
            raise UserError(f"namespace {name} must be one to enter, got {os.strerror(ctypes.get_errno())}; be root")
    os.environ["GLOO_SOCKET_IFNAME"] = INTERFACE


def _run(command: str) -> None:
    try:
        done = subprocess.run(shlex.split(command), capture_output=True, text=True)
        said = done.stderr.strip() if done.returncode else ""
    except FileNotFoundError as error:
        said = str(error)
    if said:
        raise UserError(f"links need root, ip and tc of iproute2; got {said!r} of {command!r}; leave out --throttled")
