"""One iteration as the paper tells it: roll out, judge, train, publish."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from contextlib import nullcontext
from statistics import fmean

from k2rl.checkpointed import uninterrupted
from k2rl.config import Config
from k2rl.errors import RunError
from k2rl.objective.advantages import group_advantages, is_uniform
from k2rl.objective.temperature import temperature_at
from k2rl.rollouts.groups import learnable, rewards_of
from k2rl.rollouts.scheduler import check_failures
from k2rl.run import Rollouts, Run
from k2rl.seeds import derive_seed
from k2rl.tracking import phases
from k2rl.training.batch import BatchTotals, SupervisedSequence, TrainSequence, num_sampled
from k2rl.types import Trajectory


async def train(run: Run) -> None:
    """Train from the run's next step to its last.

    After each step the inference engine serves the weights of that step, and everything the step
    found out is on disk.

    Raises:
        RunError: a dead worker, too many failed episodes or a loss that is not finite.
    """
    for step in range(run.finished_steps + 1, run.config.train.steps + 1):
        rollouts, seconds = await roll_out(run, step)
        check_failures(rollouts.trajectories, run.config.rollout.max_failed_share, f"step {step}")
        metrics = rollout_metrics(rollouts.trajectories, seconds) | rollouts.metrics
        # From here on the weights change: an interruption waits until step and record agree again.
        await uninterrupted(learn(run, step, rollouts, metrics))
        await run.after_step(step)


async def roll_out(run: Run, step: int) -> tuple[Rollouts, float | None]:
    """A step's judged trajectories, and the seconds it took to sample them; None if some were recorded."""
    config, tracker = run.config, run.tracker
    with tracker.phase(phases.ROLLOUT, step):
        if (recorded := await run.recorded(step)) is not None:
            return recorded, None
        temperature = temperature_at(config.temperature, step - 1, config.train.steps, run.rewards)
        rollouts, new = await run.play(step, temperature)
    return rollouts, tracker.timeline.of_step(step)[-1].seconds if new else None


async def learn(run: Run, step: int, rollouts: Rollouts, metrics: dict[str, float]) -> None:
    """Train on a step's trajectories, publish the new weights and record the step.

    The two halves that `debug` may leave out are left out.
    """
    tracker = run.tracker
    if run.trains:
        run.settled = False
        metrics |= await _learned(run, step, rollouts)
    run.finished_steps = step
    run.rewards.append(metrics["reward/mean"])
    tracker.step(step, metrics)
    tracker.samples(step, rollouts.trajectories)
    run.settled = run.trains


async def _learned(run: Run, step: int, rollouts: Rollouts) -> dict[str, float]:
    """Train and publish; returns what there is to say of it."""
    config, tracker = run.config, run.tracker
    metrics, judgements = await _critic(run, step, rollouts.trajectories)
    groups, totals, shaped = policy_batch(config, rollouts.trajectories, step, rollouts.version)
    if shaped is not None:
        metrics["reward/shaped_mean"] = shaped
    learned: dict[str, float] = {}
    with tracker.phase(phases.TRAIN, step) if groups or judgements else nullcontext():
        if groups:
            ptx, temperature = run.ptx.sample(step), rollouts.trajectories[0].temperature
            learned = await run.worker.policy_step(groups, config, temperature, ptx, totals)
        if judgements:
            lr = config.optimizer.lr
            imitated = [await run.worker.sft_step(batch, lr) for batch in judgements]
            learned["critic/loss"] = fmean(each["loss"] for each in imitated)
        if learned:
            learned |= await held_out(run)
    if learned:
        published = {}
        if run.serves:
            with tracker.phase(phases.PUBLISH, step):
                published = await run.worker.publish()
        metrics |= train_metrics(learned, published)
    if not groups:
        why = (
            "every group's rewards are all equal" if totals.sequences else "no group has two scored responses"
        )
        tracker.note(f"step {step}: {why}; nothing to learn")
    metrics["rollout/informative_groups"] = len(groups) / config.rollout.tasks_per_step
    return metrics


async def held_out(run: Run) -> dict[str, float]:
    """How likely the texts are that the run never sees, by the trainer's weights; empty if there are none."""
    if not run.prepared.held_out:
        return {}
    return {"ptx/held_out_nll": (await run.worker.nll(run.prepared.held_out))["nll"]}


async def _critic(
    run: Run, step: int, trajectories: Sequence[Trajectory]
) -> tuple[dict[str, float], list[list[SupervisedSequence]]]:
    """Where the policy judges itself: how well it does before this step, and judgements for it to imitate."""
    if run.critic is None:
        return {}, []
    pairs = run.critic.pairs(trajectories, run.config.seed)
    seed = derive_seed(run.config.seed, step)
    judgements = run.critic.judgements(pairs, seed)
    metrics = {"critic/pairs": float(len(pairs)), "critic/examples": float(len(judgements))}
    if run.serves:
        before = run.critic.standing
        run.critic.keep_first(trajectories)
        with run.tracker.phase(phases.ROLLOUT, step):
            metrics |= await run.critic.examine(pairs) | await run.critic.now_of_first()
        if run.critic.agreement is not None and run.critic.standing != before:
            run.tracker.note(
                f"step {step}: the critic agrees with the verifier on {run.critic.agreement:.0%} of "
                f"held-out pairs; its reward counts for {metrics['critic/trust']:.0%} of its weight"
            )
    return metrics, run.critic.batches(judgements, trajectories, seed)


def policy_batch(
    config: Config, trajectories: Sequence[Trajectory], step: int, version: int
) -> tuple[list[list[TrainSequence]], BatchTotals, float | None]:
    """The groups to learn from, with advantages, what the loss is averaged over, and the mean shaped reward.

    Failed episodes are left out; a group needs two scored ones. Groups whose rewards are all equal
    have no gradient on policy: they count in the average, unless others were drawn in their place, and cost
    no computation. With `rollout.old_tokens=mask` only what the weights of now (`version`) have sampled is
    learned from; advantages are those of the whole responses. Each branch of an episode is a sequence of its
    own, with the episode's advantage.
    """
    by_group: defaultdict[str, list[Trajectory]] = defaultdict(list)
    for trajectory in trajectories:
        by_group[trajectory.group_id].append(trajectory)
    only = version if config.rollout.old_tokens == "mask" else None
    groups, num_sequences, num_tokens = [], 0, 0
    shaped: list[float] = []
    for group in by_group.values():
        members = learnable(group)
        if not members:
            continue
        rewards = rewards_of(members, config, step)
        shaped += rewards
        if config.rollout.refill and is_uniform(rewards):
            continue
        num_sequences += sum(len(member.lines) for member in members)
        num_tokens += sum(num_sampled(line, only) for member in members for line in member.lines)
        if config.rollout.drop_uniform_groups and is_uniform(rewards):
            continue
        advantages = group_advantages(rewards, config.objective.baseline, config.objective.tau)
        sequences = [
            TrainSequence.from_trajectory(line, advantage, only)
            for member, advantage in zip(members, advantages, strict=True)
            for line in member.lines
            if num_sampled(line, only)
        ]
        if sequences:
            groups.append(sequences)
    return groups, BatchTotals(num_sequences, num_tokens), fmean(shaped) if shaped else None


def rollout_metrics(trajectories: Sequence[Trajectory], seconds: float | None) -> dict[str, float]:
    """What the rollouts of a step say; rewards are those of the judge, without budget penalties.

    Raises:
        RunError: no episode was scored.
    """
    scored = [trajectory for trajectory in trajectories if not trajectory.failed]
    by_kind: defaultdict[str, list[float]] = defaultdict(list)
    for trajectory in scored:
        by_kind[trajectory.task.kind].append(trajectory.reward)
    components: defaultdict[str, list[float]] = defaultdict(list)
    for trajectory in scored:
        for name, value in (trajectory.verdict.components if trajectory.verdict else {}).items():
            components[name].append(value)
    tokens = [trajectory.num_sampled for trajectory in scored]
    ends = [trajectory.stop_reason for trajectory in scored]
    if not scored:
        raise RunError("no episode of the step was scored")
    return {
        "reward/mean": fmean(trajectory.reward for trajectory in scored),
        **{f"reward/kind/{kind}": fmean(rewards) for kind, rewards in sorted(by_kind.items())},
        **{f"reward/component/{name}": fmean(values) for name, values in sorted(components.items())},
        "rollout/episodes": len(trajectories),
        "rollout/failed": len(trajectories) - len(scored),
        "reward/judge_failed_share": _not_judged(trajectories),
        "rollout/tokens_mean": fmean(tokens),
        "rollout/truncated_share": ends.count("token_budget") / len(ends),
        "rollout/context_share": ends.count("context") / len(ends),
        "rollout/temperature": trajectories[0].temperature,
        **({} if seconds is None else _rates(len(trajectories), sum(tokens), seconds)),
    }


def _not_judged(trajectories: Sequence[Trajectory]) -> float:
    """Share of the episodes that were played to their end without a verdict coming of it."""
    played = [trajectory for trajectory in trajectories if trajectory.stop_reason != "failed"]
    return sum(trajectory.failed for trajectory in played) / max(1, len(played))


def _rates(episodes: int, tokens: int, seconds: float) -> dict[str, float]:
    return {
        "rollout/tokens_per_second": tokens / seconds,
        "rollout/episodes_per_second": episodes / seconds,
    }


def train_metrics(learned: dict[str, float], published: dict[str, float]) -> dict[str, float]:
    """The trainer's and the publication's numbers under their metric names."""
    renamed = {
        "ptx_loss": "ptx/loss",
        "logprob_gap_mean": "mismatch/mean_abs_gap",
        "logprob_gap_max": "mismatch/max_abs_gap",
        "ratio_min": "mismatch/ratio_min",
        "ratio_max": "mismatch/ratio_max",
        "other_experts_share": "mismatch/other_experts_share",
    }
    metrics = {renamed.get(name, _in_group("train", name)): value for name, value in learned.items()}
    return metrics | {_in_group("publish", name): value for name, value in published.items()}


def _in_group(group: str, name: str) -> str:
    """`name`, unless it has a group of its own, in `group`."""
    return name if "/" in name else f"{group}/{name}"
