"""The engines of a push: which receivers are whose, and what becomes of each engine."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from k2rl.checkpoint_engine.messages import FAREWELL_S, RECEIVER, Address, Peer
from k2rl.checkpoint_engine.plan import Needs
from k2rl.checkpoint_engine.push import Invitations
from k2rl.checkpoint_engine.transaction import PushError
from k2rl.inference.engine import EngineDeadError


class ReceivingEngine(Protocol):
    """An inference engine as the publisher sees it; it may be in another process, and on another host.

    Arguments and answers are plain values, so that each method can be a call of a remote actor.
    """

    @property
    def host(self) -> int:
        """Number of the host that all its workers are on."""
        ...

    @property
    def num_receivers(self) -> int:
        """Number of its workers; each is a receiver of a push."""
        ...

    @property
    def needs(self) -> Sequence[Needs] | None:
        """What each of them reads of a push; None: everything, as far as is known."""
        ...

    async def join_push(self, address: Address, version: int, deadline_s: float, first_receiver: int) -> None:
        """Pause and let the workers take part; returns once paused. The engine is fenced until the commit.

        Its workers are receivers `first_receiver` and following, and say that they are on `host`.

        Raises:
            ValueError: it cannot take part, as it is.
            EngineDeadError: it died.
        """
        ...

    async def push_ended(self) -> None:
        """Wait until the workers have left the push that it joined; raises what they failed with.

        Called once it has paused. An engine that dies in a push is found at once by this call's error, and
        else at the deadline.
        """
        ...

    async def push_settled(self) -> BaseException | None:
        """Wait until it has left the push; why it does not serve what was pushed, if it does not.

        Called once the push is over, also of an engine that has not joined it: then there is nothing to say.

        Returns:
            None: it serves the version. `EngineDeadError`, raised or returned: it will serve nothing more.
        """
        ...


class EngineGroup:
    """The engines of one push, whose workers are its receivers, numbered across them."""

    def __init__(
        self,
        engines: Mapping[str, ReceivingEngine],
        version: int,
        address_for: Callable[[int], Address],
        deadline_s: float,
    ) -> None:
        """
        Args:
            engines: by the names that errors call them.
            version: that they shall get.
            address_for: of the push's coordinator, for participants on a host; asked once it has begun.
            deadline_s: of the push.

        Raises:
            EngineDeadError: there is none.
        """
        if not engines:
            raise EngineDeadError("no engine is left that could take a push")
        self.engines = dict(engines)
        self._version, self._address_for, self._deadline_s = version, address_for, deadline_s
        self._first: dict[str, int] = {}
        #: Host of each receiver.
        self.receivers: dict[int, int] = {}
        for name, engine in engines.items():
            self._first[name] = len(self.receivers)
            for _ in range(engine.num_receivers):
                self.receivers[len(self.receivers)] = engine.host
        self._joining: dict[str, asyncio.Future[None]] = {}

    @property
    def needs(self) -> dict[int, Needs]:
        """By receiver, of those that know what they need."""
        return {
            self._first[name] + index: needs
            for name, engine in self.engines.items()
            for index, needs in enumerate(engine.needs or ())
        }

    async def join(self) -> Invitations:
        """Pause them all, and let their workers take part.

        Raises:
            EngineDeadError, ValueError: one cannot.
        """
        self._joining = {name: asyncio.ensure_future(self._join(name)) for name in self.engines}
        # All answer before an error ends the push: none may still be on its way into it.
        for answer in await asyncio.gather(*self._joining.values(), return_exceptions=True):
            if isinstance(answer, BaseException):
                raise answer
        return {
            Peer(RECEIVER, self._first[name]): engine.push_ended() for name, engine in self.engines.items()
        }

    async def _join(self, name: str) -> None:
        engine = self.engines[name]
        address = self._address_for(engine.host)
        try:
            await engine.join_push(address, self._version, self._deadline_s, self._first[name])
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error

    async def settled(self, failure: BaseException | None = None) -> dict[str, BaseException]:
        """Wait until all have left the push; why those do not serve it that do not, `failure` aside."""
        outcomes = await asyncio.gather(
            *(self._settled(engine) for engine in self.engines.values()), return_exceptions=True
        )
        found = {name: why for name, why in zip(self.engines, outcomes, strict=True) if why is not None}
        for name, joining in self._joining.items():
            if not joining.done() or joining.cancelled():
                if isinstance(failure, PushError) and failure.culprit is None:
                    found[name] = EngineDeadError("it does not pause")
            elif error := joining.exception():
                found.setdefault(name, error)
        return found

    async def _settled(self, engine: ReceivingEngine) -> BaseException | None:
        patience_s = self._deadline_s + 2 * FAREWELL_S
        try:
            return await asyncio.wait_for(engine.push_settled(), patience_s)
        except TimeoutError:
            return EngineDeadError(f"it did not leave the push within {patience_s:g} s")

    def name_of(self, culprit: Peer | None) -> str:
        """The engine whose worker this is; empty: of none."""
        if culprit is None or culprit.role != RECEIVER:
            return ""
        return max(
            (name for name in self._first if self._first[name] <= culprit.rank), key=self._first.__getitem__
        )
