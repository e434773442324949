"""A run without Ray and vLLM: trainer and sampling in this process, with one set of weights.

For many short trainings of a tiny model on a machine that has other work: the rest of the loop is as it is.
Sampling is transformers' forward pass with its cache, in batches of prompts of one length.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, cast

import torch

from k2rl.config import Config
from k2rl.inference.engine import Generation, Sampling
from k2rl.preflight import Preflight
from k2rl.rollouts.pool import Pool
from k2rl.rollouts.scheduler import RolloutScheduler
from k2rl.rollouts.store.sqlite import SQLiteStore
from k2rl.run import Run
from k2rl.seeds import derive_seed
from k2rl.tracking.tracker import Tracker
from k2rl.training.batch import BatchTotals, SupervisedSequence, TrainSequence
from k2rl.training.engine import TrainEngine
from k2rl.workers.group import WorkerGroup

QUIET_S = 0.02
"""A batch begins when no request has come for so long."""

Waiting = tuple[list[int], Sampling, "asyncio.Future[Generation]"]


class InProcessWorker:
    """What a run asks of its `WorkerGroup`."""

    def __init__(self, prepared: Preflight) -> None:
        config = prepared.config
        threads = config.train.num_threads
        self._trainer = TrainEngine(
            prepared.model_path,
            "float32",
            config.optimizer,
            config.train.micro_batch_tokens,
            seed=config.seed,
            num_threads=threads,
        )
        self._stop = frozenset(prepared.chat.stop_token_ids)
        self._waiting: list[Waiting] = []
        self._batch: asyncio.Task[None] | None = None
        self.lost = False

    @property
    def version(self) -> int:
        return self._trainer.step_count

    async def generate(self, prompt_ids: list[int], sampling: Sampling) -> Generation:
        future: asyncio.Future[Generation] = asyncio.get_running_loop().create_future()
        self._waiting.append((list(prompt_ids), sampling, future))
        if self._batch is None or self._batch.done():
            self._batch = asyncio.create_task(self._answer())
        return await future

    async def _answer(self) -> None:
        while self._waiting:
            count = 0
            while count < len(self._waiting):
                count = len(self._waiting)
                await asyncio.sleep(QUIET_S)
            taken, self._waiting = self._waiting, []
            by_length: defaultdict[int, list[Waiting]] = defaultdict(list)
            for request in taken:
                by_length[len(request[0])].append(request)
            for batch in by_length.values():
                self._sample(batch)

    @torch.no_grad()
    def _sample(self, batch: Sequence[Waiting]) -> None:
        """Answer requests whose prompts are of one length."""
        model = cast("Any", self._trainer)._model
        generator = torch.Generator().manual_seed(derive_seed(batch[0][1].seed or 0, len(batch)) % 2**63)
        temperatures = torch.tensor([sampling.temperature for _, sampling, _ in batch])
        ids: list[list[int]] = [[] for _ in batch]
        logprobs: list[list[float]] = [[] for _ in batch]
        over = [False] * len(batch)
        inputs, cache = torch.tensor([prompt for prompt, _, _ in batch]), None
        while not all(over):
            output = model(input_ids=inputs, past_key_values=cache, use_cache=True, logits_to_keep=1)
            cache, logits = output.past_key_values, output.logits[:, -1]
            scaled = torch.log_softmax(
                logits / torch.where(temperatures > 0, temperatures, 1)[:, None], dim=-1
            )
            drawn = torch.multinomial(scaled.exp(), 1, generator=generator)[:, 0]
            chosen = torch.where(temperatures > 0, drawn, logits.argmax(dim=-1))
            said = scaled.gather(1, chosen[:, None])[:, 0].tolist()
            for row, token in enumerate(chosen.tolist()):
                if not over[row]:
                    ids[row].append(token)
                    logprobs[row].append(said[row])
                    over[row] = token in self._stop or len(ids[row]) >= batch[row][1].max_tokens
            inputs = chosen[:, None]
        for (_, _, future), tokens, values in zip(batch, ids, logprobs, strict=True):
            if not future.done():  # else nobody waits for it any more
                reason = "stop" if tokens[-1] in self._stop else "length"
                spans = ((0, self.version),)
                future.set_result(Generation(tuple(tokens), tuple(values), spans, reason))  # type: ignore[arg-type]

    async def interrupt(self) -> None:
        """Nothing is under way when anybody else has a turn."""

    async def policy_step(
        self,
        groups: Sequence[Sequence[TrainSequence]],
        config: Config,
        temperature: float,
        ptx_sequences: Sequence[SupervisedSequence],
        totals: BatchTotals,
    ) -> dict[str, float]:
        return self._trainer.policy_step(
            groups,
            objective=config.objective,
            temperature=temperature,
            ptx_sequences=ptx_sequences,
            ptx_weight=config.ptx.weight,
            updates=config.train.updates_per_step,
            totals=totals,
        )

    async def sft_step(self, sequences: Sequence[SupervisedSequence], lr: float) -> dict[str, float]:
        return self._trainer.sft_step(sequences, lr)

    async def nll(self, sequences: Sequence[SupervisedSequence]) -> dict[str, float]:
        return self._trainer.nll(sequences)

    async def reset_optimizer(self, lr: float) -> None:
        self._trainer.reset_optimizer(lr)

    async def publish(self) -> dict[str, float]:
        return {}

    async def weights_digest(self) -> str:
        return str(self.version)

    async def save(self, folder: Path) -> None:
        self._trainer.save(folder)

    async def saved(self) -> None:
        self._trainer.saved()

    async def load(self, folder: Path) -> None:
        self._trainer.load(folder)


@asynccontextmanager
async def started(prepared: Preflight, run_dir: Path) -> AsyncIterator[Run]:
    config = prepared.config
    worker = cast("WorkerGroup", InProcessWorker(prepared))
    tracker = Tracker(run_dir, config.tracking, config.train.steps)
    scheduler = RolloutScheduler(
        config, worker, prepared.chat, prepared.make_env, prepared.rubric, None, prepared.env.rubric
    )
    pool = Pool(config, scheduler, worker, SQLiteStore(Path(":memory:")), prepared.train_tasks)
    try:
        yield Run(config, run_dir, tracker, worker, prepared, scheduler, pool, prepared.corpus())
    finally:
        await pool.close()
