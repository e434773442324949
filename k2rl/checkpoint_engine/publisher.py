"""Brings the weights of a trainer's ranks into inference engines, push after push."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from k2rl.checkpoint_engine.cells import CELL_BYTES
from k2rl.checkpoint_engine.coordinator import Coordinator
from k2rl.checkpoint_engine.disk import checkpoint_manifest
from k2rl.checkpoint_engine.manifest import Manifest, check_same_model, merge
from k2rl.checkpoint_engine.messages import RECEIVER, SENDER, Address, DeltaRefusedError, Peer, TransferError
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


class ReceivingEngine(Protocol):
    """An inference engine as the publisher sees it."""

    @property
    def num_receivers(self) -> int:
        """Number of its workers; each is a receiver of a push."""
        ...

    @property
    def needs(self) -> Sequence[Needs] | None:
        """What each of them reads of a push; None: everything, as far as is known."""
        ...

    async def join_push(
        self, address: Address, version: int, deadline_s: float, first_receiver: int
    ) -> Invitations:
        """Pause and let the workers take part; returns once paused. The engine is fenced until the commit.

        Its workers are receivers `first_receiver` and following.
        """
        ...

    async def push_settled(self) -> BaseException | None:
        """Wait until it has left the push; returns why it does not serve what was pushed, if it does not."""
        ...


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


def local_rank(sender: Sender, source: Source, run: Callable[..., Awaitable[Any]]) -> TrainerRank:
    """A rank in this process; `run` calls a function in the thread that may touch its weights."""
    return TrainerRank(
        source.manifest,
        lambda address, deadline_s: run(sender.send, source, address, deadline_s),
        lambda plan, base, version: run(sender.changes, source, plan, base, version),
    )


async def _changes(
    ranks: Mapping[int, TrainerRank], plan: Plan, base: int, version: int
) -> dict[str, list[tuple[int, int]]]:
    """What any rank says has changed since version `base`, once none reads its weights any more."""
    calls = (rank.changes(plan, base, version) for rank in ranks.values())
    changed: dict[str, list[tuple[int, int]]] = {}
    for answer in await asyncio.gather(*calls, return_exceptions=True):
        if isinstance(answer, BaseException):
            raise answer
        for name, rows in answer.items():
            changed.setdefault(name, []).extend(rows)
    return changed


class Publisher:
    """Pushes of a trainer's ranks into all engines, on one host."""

    def __init__(
        self,
        engines: Mapping[str, ReceivingEngine],
        config: CheckpointEngineConfig,
        expected: Mapping[str, tuple[str, tuple[int, ...]]],
    ) -> None:
        """
        Args:
            engines: that receive, by the names that errors call them.
            config: strategy, bucket size, memory, deadline.
            expected: dtype and shape of every tensor that the engines' model takes, by name.
        """
        #: Of the next push. One that dies in a push is taken out; what replaces it may be put in.
        self.engines = dict(engines)
        self._config = config
        self._expected = expected
        #: Of its pushes.
        self.coordinator = Coordinator(config.deadline_s)
        self._plan: tuple[object, Plan] | None = None
        #: The version that these engines hold, if the last push has brought it there.
        self._held: tuple[int, Mapping[str, ReceivingEngine]] | None = None

    async def start(self) -> None:
        await self.coordinator.__aenter__()

    async def close(self) -> None:
        await self.coordinator.__aexit__()

    async def publish(self, ranks: Mapping[int, TrainerRank], version: int) -> PushReport:
        """Push the weights that these trainer ranks hold together.

        With the strategy `delta`, what has changed; everything if the engines cannot take that.

        Args:
            ranks: by number; their weights must not change until this returns.
            version: newer than the last one.

        Raises:
            ManifestError: these are not the model's tensors; nothing was sent.
            EngineDeadError: engines died or hang; it names them. The others serve the version if it was
                committed (see `coordinator.version`), else they are fenced until the next push.
            PushError: the push failed; names the engine, if it was one. See `Coordinator.push`.
            ValueError: the version is not newer, or an engine cannot join.
        """
        manifests = [rank.manifest for rank in ranks.values()]
        full = self._planned(manifests, _Engines(self.engines, version))
        if self._config.strategy != "delta" or self._held is None or self._held[1] != self.engines:
            return await self._push(full, ranks, version)
        base = self._held[0]
        changed = await _changes(ranks, full, base, version)
        plan = plan_delta(merge(manifests), full, changed, base, self.coordinator.together)
        try:
            return await self._push(plan, ranks, version)
        except TransferError as error:
            if not error.refused:
                raise
        # The engines are paused with their requests kept; this push lets them go on.
        return await self._push(full, ranks, version)

    async def _push(self, plan: Plan, ranks: Mapping[int, TrainerRank], version: int) -> PushReport:
        group = _Engines(self.engines, version)
        deadline_s = self._config.deadline_s

        def invite() -> Invitations:
            address = self.coordinator.address
            return {Peer(SENDER, owner): ranks[owner].send(address, deadline_s) for owner in plan.owners}

        async def pause() -> Invitations:
            return await group.join(self.coordinator.address, deadline_s)

        self._held = None
        try:
            report = await self.coordinator.push(
                version, plan, dict.fromkeys(plan.receivers, 0), invite, pause
            )
        except BaseException as error:
            # The engines' own word counts: one may have died of the push.
            outcomes = await group.settled(error)
            self._take_out_the_dead(outcomes, error)
            if isinstance(error, PushError) and (name := group.name_of(error.culprit)):
                refused = error.refused or any(
                    isinstance(why, DeltaRefusedError) for why in outcomes.values()
                )
                raise PushError(f"{name}: {error}", error.culprit, refused=refused) from error
            raise
        outcomes = await group.settled()
        self._take_out_the_dead(outcomes)
        for outcome in outcomes.values():
            raise outcome
        self._held = version, dict(self.engines)
        return report

    def _take_out_the_dead(
        self, outcomes: Mapping[str, BaseException], error: BaseException | None = None
    ) -> None:
        dead = {name: why for name, why in outcomes.items() if isinstance(why, EngineDeadError)}
        for name in dead:
            del self.engines[name]
        if dead:
            reasons = [f"{name}: {why}" for name, why in dead.items()]
            if error is not None and error not in dead.values():
                reasons.append(str(error))
            raise EngineDeadError("; ".join(reasons)) from error

    def _planned(self, manifests: Sequence[Manifest], group: _Engines) -> Plan:
        """The plan for these tensors and engines; made once, as long as they stay the same."""
        needs = group.needs if self._config.strategy == "shard_aware" else None
        key = (manifests, group.num_receivers, needs)
        if self._plan is None or self._plan[0] != key:
            manifest = merge(manifests)
            check_same_model(manifest.tensors, self._expected)
            receivers = range(group.num_receivers)
            boxes = _complete(needs, manifest, receivers) if needs else None
            slots = RING_SLOTS if self._config.memory_mib else 0
            bucket_bytes = max(self._config.bucket_mib * MIB, largest_unit(manifest, boxes).nbytes)
            if slots:
                budget = int(self._config.memory_mib * MIB)
                bucket_bytes = min(bucket_bytes, fit_bucket(manifest, budget, slots, boxes))
            plan = plan_push(
                manifest,
                tuple(receivers),
                bucket_bytes=bucket_bytes,
                slots=slots,
                needs=boxes,
                cell_bytes=CELL_BYTES if self._config.strategy == "delta" else WHOLE_BUCKET,
            )
            self._plan = (key, plan)
        return self._plan[1]


class _Engines:
    """The engines of one push: which receivers are whose, and what became of each."""

    def __init__(self, engines: Mapping[str, ReceivingEngine], version: int) -> None:
        """Raises:
        EngineDeadError: there is none.
        """
        if not engines:
            raise EngineDeadError("no engine is left that could take a push")
        self._engines = dict(engines)
        self._version = version
        self._first: dict[str, int] = {}
        self.num_receivers = 0
        for name, engine in engines.items():
            self._first[name] = self.num_receivers
            self.num_receivers += engine.num_receivers
        self._joining: dict[str, asyncio.Future[Invitations]] = {}

    @property
    def needs(self) -> dict[int, Needs]:
        """By receiver, of those that know what they need."""
        return {
            self._first[name] + index: needs
            for name, engine in self._engines.items()
            for index, needs in enumerate(engine.needs or ())
        }

    async def join(self, address: Address, deadline_s: float) -> Invitations:
        """Pause them all, and let their workers take part.

        Raises:
            EngineDeadError, ValueError: one cannot.
        """
        self._joining = {
            name: asyncio.ensure_future(self._join(name, address, deadline_s)) for name in self._engines
        }
        try:
            # All answer before an error ends the push: none may still be on its way into it.
            answers = await asyncio.gather(*self._joining.values(), return_exceptions=True)
            invitations: dict[Peer, Awaitable[object]] = {}
            for answer in answers:
                if isinstance(answer, BaseException):
                    raise answer
                invitations.update(answer)
            return invitations
        except BaseException:
            for joining in self._joining.values():
                if joining.done() and not joining.cancelled() and joining.exception() is None:
                    for call in joining.result().values():
                        asyncio.ensure_future(call).cancel()  # nobody will await it
            raise

    async def _join(self, name: str, address: Address, deadline_s: float) -> Invitations:
        engine = self._engines[name]
        try:
            return await engine.join_push(address, self._version, deadline_s, self._first[name])
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error

    async def settled(self, failure: BaseException | None = None) -> dict[str, BaseException]:
        """Wait until all have left the push; why those do not serve it that do not, `failure` aside."""
        outcomes = await asyncio.gather(*(engine.push_settled() for engine in self._engines.values()))
        found = {name: why for name, why in zip(self._engines, outcomes, strict=True) if why is not None}
        for name, joining in self._joining.items():
            if not joining.done() or joining.cancelled():
                if isinstance(failure, PushError) and failure.culprit is None:
                    found[name] = EngineDeadError("it does not pause")
            elif error := joining.exception():
                found.setdefault(name, error)
        return found

    def name_of(self, culprit: Peer | None) -> str:
        """The engine whose worker this is; empty: of none."""
        if culprit is None or culprit.role != RECEIVER:
            return ""
        return max(
            (name for name in self._first if self._first[name] <= culprit.rank), key=self._first.__getitem__
        )


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
