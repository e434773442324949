"""Which hosts a sandbox may reach: `SandboxSpec.allow_hosts`, read, and addresses that are never meant.

An entry is `name:port`, or `name` for ports 80 and 443. A name stands for its public addresses alone. What is
private (this machine, its networks, a cloud's metadata) is reached only where an entry spells the address
out: as `10.0.0.7:8000`, or as `mirror.internal:443=10.0.0.7`, which is asked of no name server.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Target = tuple[str, int]
"""Lower-case name or literal address, port."""

WEB_PORTS = (80, 443)
_NAME = re.compile(r"(?=.{1,253}\Z)(?!-)[a-z0-9_-]{1,63}(\.[a-z0-9_-]{1,63})*")
_ENTRY = re.compile(
    r"(?P<host>\[[^\]]*\]|[^:=\[\]]+)(?::(?P<port>[0-9]{1,5}))?(?:=\[?(?P<address>[^\[\]]+)\]?)?"
)
_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")


@dataclass(frozen=True)
class AllowedHosts:
    """What may be reached, and at which address where that is fixed."""

    targets: Mapping[Target, Address | None]

    @classmethod
    def read(cls, entries: Iterable[str]) -> AllowedHosts:
        """Raises:
        ValueError: an entry is none; it is named.
        """
        targets: dict[Target, Address | None] = {}
        for entry in entries:
            found = _ENTRY.fullmatch(entry)
            host = None if found is None else normal(found["host"])
            if found is None or host is None:
                raise ValueError(f"allow_hosts: {entry!r} is no name:port, address:port or name:port=address")
            ports = WEB_PORTS if found["port"] is None else (int(found["port"]),)
            if not all(0 < port < 65536 for port in ports):
                raise ValueError(f"allow_hosts: {entry!r} has no port between 1 and 65535")
            fixed = literal(found["address"]) if found["address"] else literal(host)
            if found["address"] and fixed is None:
                raise ValueError(f"allow_hosts: {entry!r}: {found['address']} is no IP address")
            targets.update(dict.fromkeys(((host, port) for port in ports), fixed))
        return cls(targets)

    def __contains__(self, target: Target) -> bool:
        return target in self.targets

    def address_of(self, target: Target) -> Address | None:
        """The address that its entry spells out; None where a name server is to be asked."""
        return self.targets[target]


def normal(host: str) -> str | None:
    """A host in the form that is compared: a name in lower case, or an address; None if it is neither.

    Numbers that only some programs take for addresses (`127.1`, `0x7f000001`) are none.
    """
    bare = host[1:-1] if host.startswith("[") and host.endswith("]") else host
    if (address := literal(bare)) is not None:
        return str(address)
    name = host.lower().removesuffix(".")
    last = name.rpartition(".")[2]
    if not _NAME.fullmatch(name) or re.fullmatch(r"[0-9]+|0x[0-9a-f]*", last):
        return None
    return name


def literal(text: str) -> Address | None:
    try:
        return ipaddress.ip_address(text)
    except ValueError:
        return None


def is_public(address: Address) -> bool:
    """Whether an address is one of the internet's, also where another is packed into it."""
    if isinstance(address, ipaddress.IPv6Address):
        if address.scope_id is not None:
            return False
        packed = address.ipv4_mapped or address.sixtofour
        if address in _NAT64:
            packed = ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
        if packed is not None:
            return is_public(packed)
        if address.teredo is not None:
            return False
    return address.is_global and not address.is_multicast
