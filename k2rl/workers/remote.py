"""Other workers' parts in a push, as rank 0 sees them: calls of their actors."""

from __future__ import annotations

from collections.abc import Awaitable, Sequence
from typing import Any

from ray.exceptions import RayActorError

from k2rl.checkpoint_engine.messages import Address
from k2rl.checkpoint_engine.plan import Needs
from k2rl.checkpoint_engine.publisher import TrainerRank
from k2rl.inference.engine import EngineDeadError


class RemoteEngine:
    """The vLLM of another worker, a `ReceivingEngine`."""

    def __init__(self, actor: Any, host: int, num_receivers: int) -> None:
        self._actor = actor
        self.host = host
        self.num_receivers = num_receivers
        self.needs: Sequence[Needs] | None = None

    async def join_push(self, address: Address, version: int, deadline_s: float, first_receiver: int) -> None:
        await self._answer(self._actor.join_push.remote(address, version, deadline_s, first_receiver))

    async def push_ended(self) -> None:
        await self._answer(self._actor.push_ended.remote())

    async def push_settled(self) -> BaseException | None:
        outcome: BaseException | None
        outcome, self.needs = await self._answer(self._actor.push_settled.remote())
        return outcome

    async def _answer(self, call: Awaitable[Any]) -> Any:
        try:
            return await call
        except RayActorError as error:
            raise EngineDeadError("its worker died") from error


async def remote_rank(actor: Any, host: int) -> TrainerRank:
    """The trainer rank of another worker."""
    return TrainerRank(
        await actor.weights_manifest.remote(),
        lambda address, deadline_s: actor.send_weights.remote(address, deadline_s),
        lambda plan, base, version: actor.changed_weights.remote(plan, base, version),
        host,
    )
