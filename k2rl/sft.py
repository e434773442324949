"""Supervised fine-tuning (`k2rl sft`): chats to imitate, with the workers and checkpoints of an RL run."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from k2rl import lifecycle
from k2rl.checkpointed import CheckpointedRun, uninterrupted
from k2rl.config import Config
from k2rl.config_check import check
from k2rl.errors import ConfigError
from k2rl.lifecycle import Record, started_workers
from k2rl.models.chat import ChatTemplate
from k2rl.models.hub import resolve_model
from k2rl.preflight import check_trainable, check_warm_up
from k2rl.tracking import phases
from k2rl.tracking.summary import Summary
from k2rl.training.batch import SupervisedSequence
from k2rl.training.checkpoint import checkpoint_folder
from k2rl.training.schedule import learning_rate
from k2rl.training.supervised import Corpus, held_out_of, load_sequences
from k2rl.workers.recovery import Recovery
from k2rl.workers.spec import worker_spec

COMMAND = "sft"


@dataclass(frozen=True)
class Texts:
    """What the checks have found: a model, chats to imitate, and chats that it never sees."""

    config: Config
    model_path: Path
    chat: ChatTemplate
    train: list[SupervisedSequence]
    held_out: list[SupervisedSequence]

    @property
    def epochs(self) -> float:
        """Passes over the chats."""
        return self.config.train.steps * self.config.sft.chats_per_step / len(self.train)


@dataclass
class SFTRun(CheckpointedRun):
    """A started run: what the loop works with."""

    texts: Texts
    corpus: Corpus


def prepare(config: Config) -> Texts:
    """Check a configuration against the model and the chats that it names.

    Raises:
        ConfigError: one line that says what is wrong and how to mend it.
    """
    check(config)
    data, limit = config.data, config.train.micro_batch_tokens
    if data.path is None:
        raise ConfigError("k2rl sft needs data.path=FILE.jsonl, chats to imitate; `curated` for shipped ones")
    if config.debug.mode != "none":
        raise ConfigError(f"debug={config.debug.mode} is about rollouts; `k2rl sft` has none")
    check_warm_up("sft", config.sft.schedule, config.train.steps)
    model_path = resolve_model(config.model.path)
    check_trainable(config, model_path)
    chat = ChatTemplate.from_pretrained(model_path)
    train = load_sequences(data.path, "data.path", chat, limit)
    held_out: list[SupervisedSequence] = []
    if data.held_out is not None:
        held_out = load_sequences(data.held_out, "data.held_out", chat, limit)
        _check_overlap(train, held_out)
    elif data.held_out_share:
        try:
            train, held_out = held_out_of(train, data.held_out_share)
        except ValueError as error:
            raise ConfigError(
                f"data.path={data.path}: {error}; name others in data.held_out, or set data.held_out_share=0"
            ) from error
    return Texts(config, model_path, chat, train, held_out)


def _check_overlap(train: list[SupervisedSequence], held_out: list[SupervisedSequence]) -> None:
    known = {sequence.token_ids: sequence.id for sequence in train}
    for sequence in held_out:
        if sequence.token_ids in known:
            raise ConfigError(
                f"{sequence.id} is held out, but {known[sequence.token_ids]} says the same: leave one out"
            )


def execute(texts: Texts, run_dir: Path, record: Record) -> Summary:
    """Train on the chats; see `lifecycle.execute`."""

    def start(step: int | None, recovery: Recovery) -> AbstractAsyncContextManager[SFTRun]:
        return started(texts, run_dir, step, recovery)

    return lifecycle.execute(lifecycle.Job(COMMAND, texts, start, _work), run_dir, record)


@asynccontextmanager
async def started(
    texts: Texts, run_dir: Path, resume_step: int | None, recovery: Recovery
) -> AsyncIterator[SFTRun]:
    """Tracker, Ray and the workers, which are trainers alone."""
    config = texts.config
    spec = worker_spec(config, texts.model_path, texts.chat.stop_token_ids, run_dir, serves=False)
    async with started_workers(config, spec, run_dir, resume_step, COMMAND, recovery) as (tracker, worker):
        corpus = Corpus(texts.train, config.sft.chats_per_step, config.seed)
        run = SFTRun(config, run_dir, tracker, worker, texts, corpus, finished_steps=resume_step or 0)
        with recovery.begun(tracker.note, lambda: run.finished_steps):
            yield run


async def _work(run: SFTRun, resume_step: int | None, record: Record) -> None:
    if resume_step is not None:
        with run.tracker.phase(phases.LOAD):
            await run.worker.load(checkpoint_folder(run.run_dir, resume_step))
        record()
    else:
        texts = run.texts
        run.tracker.note(
            f"{len(texts.train)} chats to imitate, {texts.epochs:.3g} times; {len(texts.held_out)} held out"
        )
        await uninterrupted(_before(run))
    run.settled = True
    if resume_step is None:
        await run.begin_checkpoint()
    await train(run)
    await run.checkpoint()
    # Last: a run is over when its model is there.
    with run.tracker.phase(phases.SAVE, run.finished_steps):
        await run.worker.save_pretrained(run.run_dir / "model")


async def _before(run: SFTRun) -> None:
    """The untouched model, as step 0 of the record."""
    if metrics := await _held_out(run, 0):
        run.tracker.step(0, metrics)


async def train(run: SFTRun) -> None:
    """Train from the run's next step to its last; what each step found out is on disk after it.

    Raises:
        RunError: a dead worker, or a loss that is not finite.
    """
    for step in range(run.finished_steps + 1, run.config.train.steps + 1):
        # Once the weights change, an interruption waits until step and record agree again.
        await uninterrupted(_learn(run, step))
        await run.checkpoint_if_due(step)


async def _learn(run: SFTRun, step: int) -> None:
    """One step, recorded, with the held-out chats when it is time."""
    config, every = run.config, run.config.train.eval_every
    run.settled = False
    with run.tracker.phase(phases.TRAIN, step):
        lr = learning_rate(config.sft.lr, config.sft.schedule, step, config.train.steps)
        learned = await run.worker.sft_step(run.corpus.sample(step), lr)
    run.finished_steps = step
    metrics = {name if "/" in name else f"sft/{name}": value for name, value in learned.items()}
    if step == config.train.steps or (every and step % every == 0):
        metrics |= await _held_out(run, step)
    run.tracker.step(step, metrics)
    run.settled = True


async def _held_out(run: SFTRun, step: int) -> dict[str, float]:
    """What the chats that are held out say of the model."""
    if not run.texts.held_out:
        return {}
    with run.tracker.phase(phases.EVALUATE, step):
        scored = await run.worker.nll(run.texts.held_out)
    return {"eval/nll": scored["nll"], "eval/nll_tokens": scored["tokens"]}
