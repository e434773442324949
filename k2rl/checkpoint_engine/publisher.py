"""Brings a trainer's weights into the inference engine beside it, push after push."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Protocol

from k2rl.checkpoint_engine.coordinator import Coordinator
from k2rl.checkpoint_engine.disk import checkpoint_manifest
from k2rl.checkpoint_engine.manifest import check_same_model
from k2rl.checkpoint_engine.messages import SENDER, Address, Peer
from k2rl.checkpoint_engine.plan import RING_SLOTS, Plan, fit_bucket, largest_unit, plan_push
from k2rl.checkpoint_engine.push import Invitations, PushReport
from k2rl.checkpoint_engine.sender import Sender, Source
from k2rl.config import CheckpointEngineConfig
from k2rl.inference.engine import EngineDeadError

MIB = 1 << 20


class ReceivingEngine(Protocol):
    """An inference engine as the publisher sees it."""

    @property
    def receivers(self) -> tuple[int, ...]:
        """Numbers of its workers, as receivers of a push."""
        ...

    async def join_push(self, address: Address, version: int, deadline_s: float) -> Invitations:
        """Pause and let the workers take part; returns once paused. The engine is fenced until the commit."""
        ...

    async def push_settled(self) -> BaseException | None:
        """Wait until it has left the push; returns why it does not serve what was pushed, if it does not."""
        ...


class Publisher:
    """Pushes of one trainer rank into one engine on the same host."""

    def __init__(
        self,
        engine: ReceivingEngine,
        config: CheckpointEngineConfig,
        expected: Mapping[str, tuple[str, tuple[int, ...]]],
    ) -> None:
        """
        Args:
            engine: that receives.
            config: bucket size, memory, deadline.
            expected: dtype and shape of every tensor that the engine's model takes, by name.
        """
        self._engine = engine
        self._config = config
        self._expected = expected
        #: Of its pushes.
        self.coordinator = Coordinator(config.deadline_s)
        self._sender = Sender(0)
        self._plan: tuple[object, Plan] | None = None

    async def start(self) -> None:
        await self.coordinator.__aenter__()

    async def close(self) -> None:
        await self.coordinator.__aexit__()

    async def publish(self, source: Source, version: int, run: Callable[..., Awaitable[int]]) -> PushReport:
        """Push `source` as `version`.

        Args:
            source: the weights; they must not change until this returns.
            version: newer than the last one.
            run: calls a function with arguments in the thread that may touch the weights.

        Raises:
            ManifestError: these are not the model's tensors; nothing was sent.
            PushError: the push failed; see `Coordinator.push`.
            ValueError: the version is not newer.
        """
        plan = self._planned(source)
        deadline_s = self._config.deadline_s

        def invite() -> Invitations:
            return {Peer(SENDER, 0): run(self._sender.send, source, self.coordinator.address, deadline_s)}

        async def pause() -> Invitations:
            return await self._engine.join_push(self.coordinator.address, version, deadline_s)

        hosts = dict.fromkeys(self._engine.receivers, 0)
        try:
            report = await self.coordinator.push(version, plan, hosts, invite, pause)
        except BaseException as error:
            # The engine's own word counts: it may have died of the push.
            outcome = await self._engine.push_settled()
            if isinstance(outcome, EngineDeadError):
                raise outcome from error
            raise
        outcome = await self._engine.push_settled()
        if outcome is not None:
            raise outcome
        return report

    def _planned(self, source: Source) -> Plan:
        """The plan for these tensors; made once, as long as they stay the same."""
        manifest = source.manifest
        if self._plan is None or self._plan[0] != manifest:
            check_same_model(manifest.tensors, self._expected)
            slots = RING_SLOTS if self._config.memory_mib else 0
            bucket_bytes = max(self._config.bucket_mib * MIB, largest_unit(manifest).nbytes)
            if slots:
                bucket_bytes = min(
                    bucket_bytes, fit_bucket(manifest, int(self._config.memory_mib * MIB), slots)
                )
            plan = plan_push(manifest, self._engine.receivers, bucket_bytes=bucket_bytes, slots=slots)
            self._plan = (manifest, plan)
        return self._plan[1]


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
