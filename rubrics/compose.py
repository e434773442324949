"""Several judges as one: a weighted sum, a gate, the worst, the first that is not content.

A judge that fails fails the whole: a sum without one of its terms would be another reward.
"""

from __future__ import annotations

import asyncio
import math
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import msgspec

from k2rl.types import Trajectory, Verdict, prepare
from rubrics import registry
from rubrics.base import Rubric, judge_safely
from rubrics.cache import MemoryCache, VerdictCache, content_key
from rubrics.groups import judge_group_safely


class Part(msgspec.Struct, frozen=True):
    """One judge of several."""

    name: str
    rubric: Rubric
    weight: float = 1.0
    #: Seconds each try may take.
    deadline_s: float = 30.0
    #: Further tries of a judgement that failed, if its judge is idempotent.
    retries: int = 0


class _Spec(msgspec.Struct, forbid_unknown_fields=True):
    """A part as configuration spells it."""

    id: str
    kwargs: dict[str, Any] = {}
    weight: float = 1.0
    deadline_s: float = 30.0
    retries: int = 0


def part_from(name: str, spec: Any) -> Part:
    """A part from `{id, kwargs, weight, deadline_s, retries}`, or from an id alone.

    Raises:
        ValueError: one line, about a key or a number that is wrong.
        ConfigError: the id or its arguments are wrong.
    """
    try:
        found = msgspec.convert({"id": spec} if isinstance(spec, str) else spec, _Spec)
    except msgspec.ValidationError as error:
        raise ValueError(f"judge {name!r}: {error}") from error
    if not (math.isfinite(found.weight) and found.weight >= 0):
        raise ValueError(f"judge {name!r}: weight={found.weight} must be finite and not negative")
    if not found.deadline_s > 0 or found.retries < 0:
        raise ValueError(f"judge {name!r}: deadline_s must be above 0, retries not negative")
    rubric = registry.make(found.id, **found.kwargs)
    return Part(name, rubric, found.weight, found.deadline_s, found.retries)


class Composite(Rubric):
    """Judges that are asked together; subclasses say what their values make."""

    def __init__(self, judges: Mapping[str, Any] | Sequence[Part], cache: VerdictCache | None = None) -> None:
        """`judges`: parts, or what configuration says of them by name. `cache`: in memory by default.

        Raises:
            ValueError: there are none, or what is said of one is wrong.
        """
        if isinstance(judges, Mapping):
            judges = [part_from(name, spec) for name, spec in judges.items()]
        if not judges:
            raise ValueError("there are no judges: judges={name: {id: …}}")
        self.judges = list(judges)
        self.cache: VerdictCache = cache or MemoryCache()
        self.needs_group = any(part.rubric.needs_group for part in self.judges)
        self.idempotent = all(part.rubric.idempotent for part in self.judges)
        self.reward_range = self.range_of(self.judges)

    @abstractmethod
    def range_of(self, judges: Sequence[Part]) -> tuple[float, float]:
        """Smallest and largest value; raises ValueError if the judges cannot be put together so."""

    @abstractmethod
    def combine(self, verdicts: Mapping[str, Verdict]) -> Verdict:
        """The value of the judges' verdicts by name, none of which failed."""

    @property
    def identity(self) -> str:
        inner = ", ".join(f"{p.name}={p.rubric.identity}*{p.weight:g}" for p in self.judges)
        return f"{type(self).__name__}({inner})"

    def parts(self) -> Sequence[Rubric]:
        return [part.rubric for part in self.judges]

    async def judge(self, trajectory: Trajectory) -> Verdict:
        verdicts = await asyncio.gather(*(self.ask(part, trajectory) for part in self.judges))
        return self._whole(dict(zip((part.name for part in self.judges), verdicts, strict=True)))

    async def judge_group(self, trajectories: Sequence[Trajectory]) -> list[Verdict]:
        columns = await asyncio.gather(*(self.ask_group(part, trajectories) for part in self.judges))
        names = [part.name for part in self.judges]
        return [self._whole(dict(zip(names, row, strict=True))) for row in zip(*columns, strict=True)]

    async def ask(self, part: Part, trajectory: Trajectory) -> Verdict:
        """A part's verdict: kept from before, or asked for as often as it may be."""
        key = content_key(part.rubric, trajectory)
        if key is not None and (kept := self.cache.get(key)) is not None:
            return kept
        verdict = await judge_safely(part.rubric, trajectory, part.deadline_s)
        for _ in range(part.retries if part.rubric.idempotent else 0):
            if verdict.ok:
                break
            verdict = await judge_safely(part.rubric, trajectory, part.deadline_s)
        if key is not None:
            self.cache.put(key, verdict)
        return verdict

    async def ask_group(self, part: Part, trajectories: Sequence[Trajectory]) -> list[Verdict]:
        if not part.rubric.needs_group:
            return list(await asyncio.gather(*(self.ask(part, t) for t in trajectories)))
        return await judge_group_safely(part.rubric, trajectories, part.deadline_s)

    def _whole(self, verdicts: Mapping[str, Verdict]) -> Verdict:
        for name, verdict in verdicts.items():
            if not verdict.ok:
                return Verdict.failed(f"judge {name!r}: {verdict.failure}")
        combined = self.combine(verdicts)
        evidence = [
            msgspec.structs.replace(item, component=f"{name}/{item.component}".rstrip("/"))
            for name, verdict in verdicts.items()
            for item in verdict.evidence
        ]
        components = {
            f"{name}/{component}": value
            for name, verdict in verdicts.items()
            for component, value in verdict.components.items()
        }
        judges = ", ".join(dict.fromkeys(v.judge for v in verdicts.values() if v.judge))
        value = combined.value if combined.value is not None else math.nan
        return Verdict.scored(
            value, {**components, **combined.components}, combined.weights, evidence, judges
        )


def values_of(verdicts: Mapping[str, Verdict]) -> dict[str, float]:
    """The values of verdicts that did not fail."""
    return {name: verdict.value for name, verdict in verdicts.items() if verdict.value is not None}


class WeightedSum(Composite):
    """The weighted mean of its judges' values; with `mean: false` their weighted sum."""

    def __init__(
        self,
        judges: Mapping[str, Any] | Sequence[Part],
        mean: bool = True,
        cache: VerdictCache | None = None,
    ) -> None:
        self.mean = mean
        super().__init__(judges, cache)

    def range_of(self, judges: Sequence[Part]) -> tuple[float, float]:
        total = math.fsum(part.weight for part in judges)
        if not (math.isfinite(total) and total > 0):
            raise ValueError(
                f"the judges' weights sum to {total:g}; they must be finite and sum to more than 0"
            )
        self._shares = {part.name: part.weight / (total if self.mean else 1.0) for part in judges}
        return self._sum(judges, 0), self._sum(judges, 1)

    def _sum(self, judges: Sequence[Part], end: int) -> float:
        return math.fsum(self._shares[part.name] * part.rubric.reward_range[end] for part in judges)

    def combine(self, verdicts: Mapping[str, Verdict]) -> Verdict:
        values = values_of(verdicts)
        value = math.fsum(self._shares[name] * number for name, number in values.items())
        return Verdict.scored(value, values, self._shares)


class Minimum(Composite):
    """The smallest of its judges' values."""

    def range_of(self, judges: Sequence[Part]) -> tuple[float, float]:
        return (
            min(part.rubric.reward_range[0] for part in judges),
            min(part.rubric.reward_range[1] for part in judges),
        )

    def combine(self, verdicts: Mapping[str, Verdict]) -> Verdict:
        values = values_of(verdicts)
        return Verdict.scored(min(values.values()), values)


class Gate(Composite):
    """The weighted mean of the last judges' values, if the first reaches `at_least`; else the lowest."""

    def __init__(
        self,
        judges: Mapping[str, Any] | Sequence[Part],
        at_least: float = 1.0,
        cache: VerdictCache | None = None,
    ) -> None:
        """Raises:
        ValueError: fewer than two judges, or a gate that nothing or everything passes.
        """
        self.at_least = at_least
        super().__init__(judges, cache)

    def range_of(self, judges: Sequence[Part]) -> tuple[float, float]:
        gate, *rest = judges
        low, high = gate.rubric.reward_range
        if not low < self.at_least <= high:
            raise ValueError(f"at_least={self.at_least:g} lies outside the gate's range ({low:g}, {high:g}]")
        self._rest = WeightedSum(rest)
        return self._rest.reward_range

    async def judge(self, trajectory: Trajectory) -> Verdict:
        """Whoever is stopped at the gate costs the other judges nothing."""
        gate, *rest = self.judges
        opened = await self.ask(gate, trajectory)
        verdicts = {gate.name: opened}
        if opened.value is not None and opened.value >= self.at_least:
            verdicts |= dict(
                zip(
                    (part.name for part in rest),
                    await asyncio.gather(*(self.ask(part, trajectory) for part in rest)),
                    strict=True,
                )
            )
        return self._whole(verdicts)

    def combine(self, verdicts: Mapping[str, Verdict]) -> Verdict:
        values = values_of(verdicts)
        name = self.judges[0].name
        if values[name] < self.at_least:
            return Verdict.scored(self.reward_range[0], {name: values[name]})
        inner = self._rest.combine({n: v for n, v in verdicts.items() if n != name})
        return Verdict.scored(inner.value or 0.0, values, inner.weights)


class FirstFailure(Composite):
    """Its judges in turn: the value of the first that is below `passes`, or of the last."""

    def __init__(
        self,
        judges: Mapping[str, Any] | Sequence[Part],
        passes: float = 1.0,
        cache: VerdictCache | None = None,
    ) -> None:
        self.passes = passes
        super().__init__(judges, cache)

    def range_of(self, judges: Sequence[Part]) -> tuple[float, float]:
        return (
            min(part.rubric.reward_range[0] for part in judges),
            max(part.rubric.reward_range[1] for part in judges),
        )

    async def judge(self, trajectory: Trajectory) -> Verdict:
        verdicts: dict[str, Verdict] = {}
        for part in self.judges:
            verdicts[part.name] = verdict = await self.ask(part, trajectory)
            if verdict.value is None or verdict.value < self.passes:
                break
        return self._whole(verdicts)

    def combine(self, verdicts: Mapping[str, Verdict]) -> Verdict:
        values = values_of(verdicts)
        first = next((v for v in values.values() if v < self.passes), list(values.values())[-1])
        return Verdict.scored(first, values)


class ByTask(Rubric):
    """A rubric for each environment or task kind: `cases={calculator: {id: …}}`, `default` for the rest."""

    def __init__(self, cases: Mapping[str, Any], by: str = "env") -> None:
        """`by`: `env` or `kind`, which of a task's fields chooses.

        Raises:
            ValueError: there are no cases, or `by` is another word.
        """
        chooses: dict[str, Callable[[Trajectory], str]] = {
            "env": lambda t: t.task.env,
            "kind": lambda t: t.task.kind,
        }
        if by not in chooses or not cases:
            raise ValueError(f"by={by!r} must be env or kind, and cases must not be empty")
        self._key = chooses[by]
        self.cases = {name: part_from(name, spec) for name, spec in cases.items()}
        self._asking = {name: WeightedSum([part], mean=False) for name, part in self.cases.items()}
        ranges = [inner.reward_range for inner in self._asking.values()]
        self.reward_range = min(low for low, _ in ranges), max(high for _, high in ranges)
        self.needs_group = any(inner.needs_group for inner in self._asking.values())
        self.idempotent = all(inner.idempotent for inner in self._asking.values())

    @property
    def identity(self) -> str:
        inner = ", ".join(f"{name}={case.identity}" for name, case in self._asking.items())
        return f"ByTask({inner})"

    def parts(self) -> Sequence[Rubric]:
        return list(self._asking.values())

    def _case(self, trajectory: Trajectory) -> Composite:
        key = self._key(trajectory)
        found = self._asking.get(key) or self._asking.get("default")
        if found is None:
            raise ValueError(f"no case for {key!r} and no `default` among: {', '.join(self._asking)}")
        return found

    async def judge(self, trajectory: Trajectory) -> Verdict:
        return await self._case(trajectory).judge(trajectory)

    async def judge_group(self, trajectories: Sequence[Trajectory]) -> list[Verdict]:
        return await self._case(trajectories[0]).judge_group(trajectories)


prepare(_Spec)
