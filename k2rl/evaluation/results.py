"""What an evaluation on held-out tasks found, and where a run keeps it (`evaluations/<name>.json`)."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence
from itertools import zip_longest
from pathlib import Path

import msgspec

from k2rl.errors import RunError
from k2rl.evaluation.stats import Estimate, Interval, difference_ci95, mean_ci95
from k2rl.types import Trajectory

FOLDER = "evaluations"


class KindResult(msgspec.Struct, frozen=True):
    """One task kind's share of an evaluation; `reward` is None if every episode failed."""

    reward: float | None
    n: int
    ci95: Interval | None = None
    failed: int = 0


class EvaluationResult(msgspec.Struct, frozen=True):
    """Mean held-out reward with its 95 % interval.

    `n` counts the scored episodes alone: a failed episode is not a zero, so it is left out of every
    mean and counted in `failed`. `reward` and `ci95` are None if nothing was scored. `step` is the
    number of RL steps the evaluated policy had taken. By convention the names are `base` (the
    untouched model), `before` (directly before RL, after a warm start), `step_<n>` and `after`.
    """

    name: str
    step: int
    reward: float | None
    ci95: Interval | None
    n: int
    failed: int
    per_kind: dict[str, KindResult] = {}
    mean_tokens: float = 0.0
    examples: list[Trajectory] = []

    @property
    def estimate(self) -> Estimate | None:
        """The mean reward as an estimate; None if nothing was scored."""
        if self.reward is None or self.ci95 is None:
            return None
        return Estimate(self.reward, self.ci95, self.n)

    @property
    def metrics(self) -> dict[str, float]:
        """The scalars of this evaluation as metrics: `eval/…`, a curve over the RL steps from `before` on.

        Those of `base` are `eval/base/…`: it shares step 0 with `before`, which would hide it.
        """
        prefix = "eval/base" if self.name == "base" else "eval"
        values = {
            f"{prefix}/n": float(self.n),
            f"{prefix}/failed": float(self.failed),
            f"{prefix}/tokens": self.mean_tokens,
        }
        if self.reward is not None:
            values[f"{prefix}/reward"] = self.reward
        for kind, result in self.per_kind.items():
            if result.reward is not None:
                values[f"{prefix}/reward/{kind}"] = result.reward
        return values


def summarise(
    name: str, step: int, trajectories: Sequence[Trajectory], max_examples: int = 12
) -> EvaluationResult:
    """Sum up the judged `trajectories` of an evaluation.

    The examples are chosen by task, never by outcome, so two evaluations on the same tasks keep the
    same examples and can be set side by side.
    """
    by_kind: defaultdict[str, list[Trajectory]] = defaultdict(list)
    for trajectory in trajectories:
        by_kind[trajectory.task.kind].append(trajectory)
    whole = _score(trajectories)
    scored = [trajectory for trajectory in trajectories if not trajectory.failed]
    return EvaluationResult(
        name=name,
        step=step,
        reward=whole.reward,
        ci95=whole.ci95,
        n=whole.n,
        failed=whole.failed,
        per_kind={kind: _score(by_kind[kind]) for kind in sorted(by_kind)},
        mean_tokens=sum(trajectory.num_sampled for trajectory in scored) / max(1, len(scored)),
        examples=_choose_examples(trajectories, max_examples),
    )


def reward_gain(before: EvaluationResult | None, after: EvaluationResult | None) -> Estimate | None:
    """`after` minus `before` with its interval; None where one is missing or has nothing scored."""
    if before is None or after is None or before.estimate is None or after.estimate is None:
        return None
    return difference_ci95(before.estimate, after.estimate)


def _score(trajectories: Sequence[Trajectory]) -> KindResult:
    rewards = [trajectory.reward for trajectory in trajectories if not trajectory.failed]
    estimate = mean_ci95(rewards)
    failed = len(trajectories) - len(rewards)
    if estimate is None:
        return KindResult(reward=None, n=0, failed=failed)
    return KindResult(reward=estimate.mean, n=estimate.n, ci95=estimate.ci95, failed=failed)


def _choose_examples(trajectories: Sequence[Trajectory], count: int) -> list[Trajectory]:
    """The first episode of each of the first `count` tasks, taken from every kind in turn."""
    first_of_task: dict[str, Trajectory] = {}
    for trajectory in sorted(trajectories, key=lambda t: (t.task.id, t.id)):
        first_of_task.setdefault(trajectory.task.id, trajectory)
    by_kind: defaultdict[str, list[Trajectory]] = defaultdict(list)
    for trajectory in first_of_task.values():
        by_kind[trajectory.task.kind].append(trajectory)
    rounds = zip_longest(*(by_kind[kind] for kind in sorted(by_kind)))
    in_turn = [trajectory for round_ in rounds for trajectory in round_ if trajectory is not None]
    return in_turn[:count]


def save_result(run_dir: Path, result: EvaluationResult) -> Path:
    """Write `result` to `evaluations/<name>.json`, replacing an earlier one of that name whole.

    Raises:
        ValueError: if it holds a number that is not finite.
    """
    path = run_dir / FOLDER / f"{result.name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".tmp")
    # msgspec's own encoder refuses text with lone surrogates, which a tool may well hand over.
    text = json.dumps(msgspec.to_builtins(result), ensure_ascii=False, allow_nan=False)
    unfinished.write_text(text, encoding="utf-8", errors="replace")
    unfinished.replace(path)
    return path


def load_result(path: Path) -> EvaluationResult:
    """Read one saved evaluation.

    Raises:
        RunError: if the file does not hold one.
    """
    try:
        return msgspec.json.decode(path.read_bytes(), type=EvaluationResult)
    except msgspec.DecodeError as error:
        raise RunError(f"{path} is not a saved evaluation: {error}") from error


def load_results(run_dir: Path) -> dict[str, EvaluationResult]:
    """All saved evaluations of a run by name: `base` first, then by step, `after` last of its step."""
    results = [load_result(path) for path in (run_dir / FOLDER).glob("*.json")]
    rank = {"base": 0, "before": 1, "after": 3}
    results.sort(key=lambda result: (result.step, rank.get(result.name, 2), result.name))
    return {result.name: result for result in results}


def rewind_results(run_dir: Path, step: int) -> None:
    """Make the saved evaluations those of a run that has only done `step` steps.

    Later ones are removed. An `after` that is not later belonged to an end that is none any more:
    it becomes `step_<n>`.
    """
    for name, result in load_results(run_dir).items():
        path = run_dir / FOLDER / f"{name}.json"
        if result.step > step:
            path.unlink()
        elif name == "after":
            save_result(run_dir, msgspec.structs.replace(result, name=f"step_{result.step}"))
            path.unlink()
