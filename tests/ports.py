"""Ports for servers that count on from a given one."""

from __future__ import annotations

import os
import socket


def free_ports(count: int) -> int:
    """The first of so many that are free now."""
    for port in range(20000 + os.getpid() % 10000, 60000, count):
        try:
            for each in range(port, port + count):
                socket.create_server(("127.0.0.1", each)).close()
        except OSError:
            continue
        return port
    raise AssertionError("no ports are free")
