"""Brings the weights of a trainer's ranks into inference engines, push after push."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from k2rl.checkpoint_engine.cells import CELL_BYTES
from k2rl.checkpoint_engine.coordinator import Coordinator, Hosts
from k2rl.checkpoint_engine.disk import checkpoint_manifest
from k2rl.checkpoint_engine.engines import EngineGroup, ReceivingEngine
from k2rl.checkpoint_engine.manifest import Manifest, check_same_model, merge
from k2rl.checkpoint_engine.messages import AGENT, SENDER, Address, DeltaRefusedError, Peer, TransferError
from k2rl.checkpoint_engine.plan import (
    RING_SLOTS,
    WHOLE_BUCKET,
    Needs,
    Plan,
    Rows,
    fit_bucket,
    largest_unit,
    plan_delta,
    plan_push,
    whole,
)
from k2rl.checkpoint_engine.push import Invitations, PushReport
from k2rl.checkpoint_engine.sender import Sender, Source
from k2rl.checkpoint_engine.transaction import PushError
from k2rl.config import CheckpointEngineConfig
from k2rl.inference.engine import EngineDeadError

MIB = 1 << 20


class TrainerRank(NamedTuple):
    """A trainer rank as the publisher sees it, wherever it runs."""

    #: What it holds; the shards' owner is its number.
    manifest: Manifest
    #: Makes it take part in the push of the coordinator at an address, with a deadline in seconds:
    #: `Sender.send` there.
    send: Callable[[Address, float], Awaitable[object]]
    #: For deltas: what differs there between two versions, of which it holds the second; `Sender.changes`
    #: there, with the plan of everything.
    changes: Callable[[Plan, int, int], Awaitable[Rows]]
    #: Number of the host that it is on, as its `Sender` says.
    host: int = 0


#: Makes a host's agent take part in what the coordinator at an address does: `HostAgent.take_part` there.
AgentCall = Callable[[Address, float], Awaitable[object]]


def local_rank(
    sender: Sender, source: Source, run: Callable[..., Awaitable[Any]], host: int = 0
) -> TrainerRank:
    """A rank in this process; `run` calls a function in the thread that may touch its weights."""
    return TrainerRank(
        source.manifest,
        lambda address, deadline_s: run(sender.send, source, address, deadline_s),
        lambda plan, base, version: run(sender.changes, source, plan, base, version),
        host,
    )


async def _changes(
    ranks: Mapping[int, TrainerRank], plan: Plan, base: int, version: int, deadline_s: float
) -> dict[str, list[tuple[int, int]]]:
    """What any rank says has changed since version `base`, once none reads its weights any more.

    Raises:
        PushError: a rank died, or does not say it within the deadline; names it.
        ValueError: the version is not newer.
    """

    async def ask(number: int, rank: TrainerRank) -> Rows:
        peer = Peer(SENDER, number)
        try:
            return await asyncio.wait_for(rank.changes(plan, base, version), deadline_s)
        except TimeoutError as error:
            raise PushError(f"{peer} did not say within {deadline_s:g} s what has changed", peer) from error
        except ValueError:
            raise
        except Exception as error:
            raise PushError(f"{peer} failed: {error}", peer) from error

    calls = (ask(number, rank) for number, rank in ranks.items())
    changed: dict[str, list[tuple[int, int]]] = {}
    for answer in await asyncio.gather(*calls, return_exceptions=True):
        if isinstance(answer, BaseException):
            raise answer
        for name, rows in answer.items():
            changed.setdefault(name, []).extend(rows)
    return changed


class Publisher:
    """Pushes of a trainer's ranks into all engines, on one host or on several."""

    def __init__(
        self,
        engines: Mapping[str, ReceivingEngine],
        config: CheckpointEngineConfig,
        expected: Mapping[str, tuple[str, tuple[int, ...]]],
        agents: Mapping[int, AgentCall] | None = None,
        host: int = 0,
        listen: str = "",
    ) -> None:
        """
        Args:
            engines: that receive, by the names that errors call them.
            config: strategy, bucket size, memory, deadline.
            expected: dtype and shape of every tensor that the engines' model takes, by name.
            agents: of every host with a trainer rank or an engine, by its number; none if all of them are on
                this process's host.
            host: this process's.
            listen: address of this host under which others reach it; empty: there are no others.
        """
        #: Of the next push. One that dies in a push is taken out; `join` takes in what replaces it.
        self.engines = dict(engines)
        #: Of the next push or join; one that died is replaced here.
        self.agents = dict(agents or {})
        self._config = config
        self._expected = expected
        self._host = host
        #: Of its pushes.
        self.coordinator = Coordinator(config.deadline_s, host, listen)
        self._plan: tuple[object, Plan] | None = None
        #: The last push's version and the engines that hold it, if it has brought it there.
        self._held: tuple[int, dict[str, ReceivingEngine]] | None = None
        self._turn = asyncio.Lock()
        self._publishing: int | None = None

    async def start(self) -> None:
        await self.coordinator.__aenter__()

    async def close(self) -> None:
        await self.coordinator.__aexit__()

    async def publish(self, ranks: Mapping[int, TrainerRank], version: int) -> PushReport:
        """Push the weights that these trainer ranks hold together; engines that are joining do so first.

        With the strategy `delta`, what has changed; everything if the engines cannot take that.

        Args:
            ranks: by number; their weights must not change until this returns.
            version: newer than the last one.

        Raises:
            ManifestError: these are not the model's tensors; nothing was sent.
            EngineDeadError: engines died or hang; it names them. The others serve the version if it was
                committed (see `coordinator.version`), else they are fenced until the next push.
            PushError: the push failed; names the engine, if it was one. See `Coordinator.push`.
            ValueError: the version is not newer, an engine cannot join, a host has no agent, or another push
                is under way.
        """
        if self._publishing is not None:
            raise ValueError(f"a push of version {self._publishing} is under way: wait until it has ended")
        self._publishing = version
        try:
            async with self._turn:
                return await self._publish(ranks, version)
        finally:
            self._publishing = None

    async def _publish(self, ranks: Mapping[int, TrainerRank], version: int) -> PushReport:
        manifests = [rank.manifest for rank in ranks.values()]
        full = self._planned(manifests, self._group(self.engines, version))
        if self._config.strategy != "delta" or self._held is None or self._held[1] != self.engines:
            return await self._push(full, ranks, version)
        base = self._held[0]
        changed = await _changes(ranks, full, base, version, self._config.deadline_s)
        plan = plan_delta(merge(manifests), full, changed, base, self.coordinator.together)
        try:
            return await self._push(plan, ranks, version)
        except TransferError as error:
            if not error.refused:
                raise
        # The engines are paused with their requests kept; this push lets them go on.
        return await self._push(full, ranks, version)

    async def _push(self, plan: Plan, ranks: Mapping[int, TrainerRank], version: int) -> PushReport:
        group = self._group(self.engines, version)
        # Of a delta, too, all hosts take part: those that have nothing to send keep the version.
        hosts = self._hosts({number: rank.host for number, rank in ranks.items()}, group)

        def invite() -> Invitations:
            address_for, deadline_s = self.coordinator.address_for, self._config.deadline_s
            return {
                Peer(SENDER, owner): ranks[owner].send(address_for(ranks[owner].host), deadline_s)
                for owner in plan.owners
            }

        self._held = None
        report = await self._carry_out(
            group, self.coordinator.push(version, plan, group.receivers, invite, group.join, hosts)
        )
        self._held = version, group.engines
        return report

    async def join(self, name: str, engine: ReceivingEngine) -> PushReport:
        """Bring the committed version into an engine that is new or was restarted; later pushes reach it too.

        It comes from an arena that holds it: neither the trainer nor any other engine takes part. Waits for
        a push under way.

        Args:
            name: that errors call it; an engine of that name is replaced.
            engine: on any host, which has an agent if it is another than this process's.

        Raises:
            EngineDeadError: it died or hangs.
            PushError: it failed, and holds nothing that it could serve; names a host's agent if it was one.
            ValueError: no committed version is there or kept, the engine cannot join, or its host has no
                agent: put it into `engines`, for the next push.
        """
        async with self._turn:
            version = self.coordinator.version
            group = self._group({name: engine}, -1 if version is None else version)
            hosts = self._hosts({}, group)
            report = await self._carry_out(group, self.coordinator.join(group.receivers, group.join, hosts))
            self.engines[name] = engine
            if self._held is not None:
                self._held[1][name] = engine
            return report

    def _group(self, engines: Mapping[str, ReceivingEngine], version: int) -> EngineGroup:
        return EngineGroup(engines, version, self.coordinator.address_for, self._config.deadline_s)

    def _hosts(self, of_ranks: Mapping[int, int], group: EngineGroup) -> Hosts | None:
        """What the coordinator needs to reach them; None if there is no host but its own.

        Raises:
            ValueError: a host has no agent.
        """
        needed = {*of_ranks.values(), *group.receivers.values()}
        if not self.agents and needed == {self._host}:
            return None
        if lacking := sorted(needed - self.agents.keys()):
            raise ValueError(f"hosts {lacking} have no agent: each host of a push over several needs one")
        return Hosts(of_ranks, self._invite_agents)

    def _invite_agents(self, hosts: Collection[int]) -> Invitations:
        deadline_s = self._config.deadline_s
        return {
            Peer(AGENT, host): self.agents.get(host, _no_agent)(
                self.coordinator.address_for(host), deadline_s
            )
            for host in hosts
        }

    async def _carry_out(self, group: EngineGroup, push: Awaitable[PushReport]) -> PushReport:
        """Wait for a push or a join, and see what has become of its engines."""
        try:
            report = await push
        except BaseException as error:
            # The engines' own word counts: one may have died of the push.
            outcomes = await group.settled(error)
            self._take_out_the_dead(group, outcomes, error)
            if isinstance(error, PushError) and (name := group.name_of(error.culprit)):
                refused = error.refused or any(
                    isinstance(why, DeltaRefusedError) for why in outcomes.values()
                )
                raise PushError(f"{name}: {error}", error.culprit, refused=refused) from error
            raise
        outcomes = await group.settled()
        self._take_out_the_dead(group, outcomes)
        for outcome in outcomes.values():
            raise outcome
        return report

    def _take_out_the_dead(
        self,
        group: EngineGroup,
        outcomes: Mapping[str, BaseException],
        error: BaseException | None = None,
    ) -> None:
        dead = {name: why for name, why in outcomes.items() if isinstance(why, EngineDeadError)}
        for name in dead:
            if self.engines.get(name) is group.engines[name]:
                del self.engines[name]
        if dead:
            reasons = [f"{name}: {why}" for name, why in dead.items()]
            if error is not None and error not in dead.values():
                reasons.append(str(error))
            raise EngineDeadError("; ".join(reasons)) from error

    def _planned(self, manifests: Sequence[Manifest], group: EngineGroup) -> Plan:
        """The plan for these tensors and engines; made once, as long as they stay the same."""
        needs = group.needs if self._config.strategy == "shard_aware" else None
        receivers = tuple(group.receivers)
        key = (manifests, receivers, needs)
        if self._plan is None or self._plan[0] != key:
            manifest = merge(manifests)
            check_same_model(manifest.tensors, self._expected)
            boxes = _complete(needs, manifest, receivers) if needs else None
            slots = RING_SLOTS if self._config.memory_mib else 0
            bucket_bytes = max(self._config.bucket_mib * MIB, largest_unit(manifest, boxes).nbytes)
            if slots:
                budget = int(self._config.memory_mib * MIB)
                bucket_bytes = min(bucket_bytes, fit_bucket(manifest, budget, slots, boxes))
            plan = plan_push(
                manifest,
                receivers,
                bucket_bytes=bucket_bytes,
                slots=slots,
                needs=boxes,
                cell_bytes=CELL_BYTES if self._config.strategy == "delta" else WHOLE_BUCKET,
            )
            self._plan = (key, plan)
        return self._plan[1]


async def _no_agent(address: Address, deadline_s: float) -> None:
    raise TransferError("it was taken away")


def _complete(needs: Mapping[int, Needs], manifest: Manifest, receivers: Iterable[int]) -> dict[int, Needs]:
    """Who does not know yet what it needs gets everything."""
    everything = {spec.name: (whole(spec),) for spec in manifest.tensors}
    return {receiver: needs.get(receiver, everything) for receiver in receivers}


def expected_tensors(folder: Path, dtype: str) -> dict[str, tuple[str, tuple[int, ...]]]:
    """What the model of a checkpoint takes, floating tensors in `dtype`, by the checkpoint's names."""
    from transformers import AutoConfig

    # What a file may hold besides: a tied head a second time, and what old versions saved of positions.
    tied = AutoConfig.from_pretrained(folder).tie_word_embeddings
    return {
        spec.name: (spec.dtype, spec.shape)
        for spec in checkpoint_manifest(folder, 1, dtype).tensors
        if not spec.name.endswith(".rotary_emb.inv_freq") and not (tied and spec.name == "lm_head.weight")
    }
