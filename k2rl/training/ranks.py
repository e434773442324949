"""A train engine's place among those that train one model together. No torch."""

from __future__ import annotations

import msgspec


class Ranks(msgspec.Struct, frozen=True):
    """Rank `rank` of `world`; all ranks are given the same address and deadline.

    Raises:
        ValueError: if the numbers do not agree, or several ranks have no address to meet at.
    """

    rank: int = 0
    world: int = 1
    #: `host:port` where they meet: a port of rank 0's host that is free when it starts, and that all reach.
    #: A new group needs a new one.
    address: str = ""
    #: Seconds that a rank waits for the others in a collective, and at the start. Above the longest pass of
    #: one rank that others wait for; a peer that is dead is found at once, one that hangs after this.
    deadline_s: float = 1800.0

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.world:
            raise ValueError(f"rank {self.rank} of {self.world}")
        if self.world > 1 and not self.address.rpartition(":")[2].isdigit():
            raise ValueError(f"{self.world} ranks need an address host:port to meet at, not {self.address!r}")

    @property
    def alone(self) -> bool:
        return self.world == 1


ALONE = Ranks()
