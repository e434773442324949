"""Which replica answers a request: the one that has most of its prompt cached, unless it is too busy.

Pure bookkeeping: no clock, no I/O. The responses of a group share their prompt, and an episode's later turns
begin with its earlier ones; vLLM caches both in whole blocks of tokens.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence

#: Tokens in a block, as the CPU engine has it. With other sizes the routing is a little less exact, no more.
BLOCK_TOKENS = 32


class PrefixIndex:
    """The blocks of prompts that a replica was given, each known by all tokens up to its end."""

    def __init__(self, capacity: int) -> None:
        """`capacity`: blocks; those not asked for the longest go first."""
        self._capacity = capacity
        self._blocks: OrderedDict[int, None] = OrderedDict()

    def add(self, blocks: Sequence[int]) -> None:
        for block in reversed(blocks):  # the first, which most share, is the last to go
            self._blocks[block] = None
            self._blocks.move_to_end(block)
        while len(self._blocks) > self._capacity:
            self._blocks.popitem(last=False)

    def known(self, blocks: Sequence[int]) -> int:
        """How many of these, from the first, were given."""
        count = 0
        for block in blocks:
            if block not in self._blocks:
                break
            count += 1
        return count

    def clear(self) -> None:
        self._blocks.clear()


class Router:
    """Chooses among the replicas that serve; the others are not asked, whatever they have cached."""

    def __init__(self, replicas: int, slack: int = 8, capacity: int = 1 << 16) -> None:
        """
        Args:
            replicas: number of them; none serves yet.
            slack: requests that one may have more than the least busy one; above, its cache counts no more.
            capacity: blocks remembered for each.
        """
        self._slack = slack
        self._caches = [PrefixIndex(capacity) for _ in range(replicas)]
        self._running = [0] * replicas
        #: The weight version of those that serve.
        self._serving: dict[int, int] = {}

    @property
    def serving(self) -> list[int]:
        """The replicas that serve, ascending."""
        return sorted(self._serving)

    def version(self, replica: int) -> int | None:
        """What it serves; None if it does not."""
        return self._serving.get(replica)

    def running(self, replica: int) -> int:
        """Requests that it was given and has not answered."""
        return self._running[replica]

    def admit(self, replica: int, version: int) -> None:
        """It serves this version from now on; what it had cached was of another."""
        self._serving[replica] = version
        self._caches[replica].clear()

    def fence(self, replica: int) -> None:
        """It serves nothing until it is admitted again."""
        self._serving.pop(replica, None)
        self._caches[replica].clear()

    def begin(self, prompt_ids: Sequence[int]) -> int | None:
        """The replica for a request, which is running from now on; None if no replica serves."""
        if not self._serving:
            return None
        blocks = list(_blocks(prompt_ids))
        least = min(self._running[replica] for replica in self._serving)
        near = [replica for replica in self.serving if self._running[replica] <= least + self._slack]
        chosen = min(near, key=lambda replica: (-self._caches[replica].known(blocks), self._running[replica]))
        self._running[chosen] += 1
        self._caches[chosen].add(blocks)
        return chosen

    def end(self, replica: int) -> None:
        """A request of it has ended, however."""
        self._running[replica] -= 1


def _blocks(token_ids: Sequence[int]) -> Iterator[int]:
    """A hash for each whole block, of all tokens up to its end."""
    before = 0
    for end in range(BLOCK_TOKENS, len(token_ids) + 1, BLOCK_TOKENS):
        before = hash((before, *token_ids[end - BLOCK_TOKENS : end]))
        yield before
