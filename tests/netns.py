"""Hosts on one machine: network namespaces with one link each to a switch. Needs root and iproute2.

A namespace lives as long as the process that holds it, and that one ends when its standard input closes:
however the tests end, the kernel takes everything down with them.
"""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

#: Of the kernel's: a network namespace.
CLONE_NEWNET = 0x40000000
#: Name of a host's end of its link.
INTERFACE = "eth0"


def available() -> bool:
    """Whether this machine lets us make network namespaces."""
    if os.geteuid() != 0 or shutil.which("ip") is None:
        return False
    return subprocess.run(["unshare", "--net", "true"], capture_output=True, timeout=10).returncode == 0


@dataclass(frozen=True)
class Host:
    """A network namespace with the address `address`, reached by the others over `INTERFACE`."""

    address: str
    pid: int

    def command(self, *words: str) -> list[str]:
        """`words` as a command line that runs on this host."""
        return ["nsenter", "--target", str(self.pid), "--net", "--", *words]

    def enter(self) -> None:
        """Move this thread, and those that it will start, to this host."""
        with Path(f"/proc/{self.pid}/ns/net").open() as namespace:
            if ctypes.CDLL(None, use_errno=True).setns(namespace.fileno(), CLONE_NEWNET):
                raise OSError(ctypes.get_errno(), "cannot enter a network namespace")

    def sent_bytes(self) -> int:
        """What this host's link has sent since it is up, headers included, by the kernel's counter."""
        shown = _run(*self.command("ip", "-s", "-j", "link", "show", INTERFACE))
        return int(json.loads(shown)[0]["stats64"]["tx"]["bytes"])

    def received_bytes(self) -> int:
        """As `sent_bytes`, for what has come in."""
        shown = _run(*self.command("ip", "-s", "-j", "link", "show", INTERFACE))
        return int(json.loads(shown)[0]["stats64"]["rx"]["bytes"])

    def disconnect(self) -> None:
        """Cut this host's cable: nothing passes, and nobody is told."""
        _run(*self.command("ip", "link", "set", INTERFACE, "down"))


@contextmanager
def network(hosts: int, megabits: int | None = None) -> Iterator[list[Host]]:
    """Hosts 10.77.0.1, 10.77.0.2, ... on one switch; `megabits` limits what each can send in a second."""
    with ExitStack() as stack:
        switch = stack.enter_context(_namespace())
        inside = ["nsenter", "--target", str(switch), "--net", "--", "ip", "link"]
        _run(*inside, "add", "switch", "type", "bridge")
        _run(*inside, "set", "switch", "up")
        found = []
        for number in range(1, hosts + 1):
            host = Host(f"10.77.0.{number}", stack.enter_context(_namespace()))
            port = f"port{number}"
            peer = ["type", "veth", "peer", "name", INTERFACE, "netns", str(host.pid)]
            _run("ip", "link", "add", port, "netns", str(switch), *peer)
            _run(*inside, "set", port, "master", "switch", "up")
            _run(*host.command("ip", "address", "add", f"{host.address}/24", "dev", INTERFACE))
            for link in ("lo", INTERFACE):
                _run(*host.command("ip", "link", "set", link, "up"))
            if megabits is not None:
                limit = ["rate", f"{megabits}mbit", "burst", "256kb", "latency", "50ms"]
                _run(*host.command("tc", "qdisc", "add", "dev", INTERFACE, "root", "tbf", *limit))
            found.append(host)
        yield found


@contextmanager
def _namespace() -> Iterator[int]:
    """Id of a process in a network namespace of its own."""
    holder = subprocess.Popen(
        ["unshare", "--net", "sh", "-c", "echo ready; exec cat"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    with holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"ready\n"
        yield holder.pid


def _run(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=10).stdout
