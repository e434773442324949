"""The examples of a report: what the model did with the same held-out task before and after RL."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile, zip_longest

from k2rl.evaluation.results import EvaluationResult
from k2rl.tracking.samples import format_call
from k2rl.types import Message, Trajectory

MAX_CHARS = 1500
OUTCOMES = ("improved", "got worse", "unchanged", "not comparable")


@dataclass(frozen=True)
class Bubble:
    """One chat message, ready to show; `omitted` counts the characters cut off its end."""

    role: str
    text: str
    calls: tuple[str, ...]
    omitted: int


@dataclass(frozen=True)
class Side:
    """One evaluation's answer to a task."""

    label: str
    color: str
    score: str
    components: str
    good: bool
    stop: str
    tokens: int
    bubbles: tuple[Bubble, ...]


@dataclass(frozen=True)
class Example:
    """One held-out task, the messages that all sides share, and what each made of it."""

    task: str
    kind: str
    outcome: str
    prompt: tuple[Bubble, ...]
    sides: tuple[Side, ...]


@dataclass(frozen=True)
class Examples:
    """The chosen examples, and how many of the kept tasks had which outcome.

    `system` holds the opening messages if they are the same for all: they are shown once.
    """

    system: tuple[Bubble, ...]
    shown: tuple[Example, ...]
    tally: dict[str, int]
    kept: int


def build_examples(results: Sequence[tuple[str, str, EvaluationResult]], count: int) -> Examples:
    """Choose up to `count` examples from one or two evaluations, given as (label, colour, result).

    With two, the tasks both kept are shown in turn from those that improved, got worse and stayed
    the same, so that the choice does not flatter.
    """
    by_task: dict[str, list[tuple[str, str, Trajectory]]] = defaultdict(list)
    for label, color, result in results:
        for trajectory in result.examples:
            by_task[trajectory.task.id].append((label, color, trajectory))
    complete = {task: sides for task, sides in by_task.items() if len(sides) == len(results)}
    outcomes = {task: _outcome([side[2] for side in sides]) for task, sides in complete.items()}
    groups = [[task for task in complete if outcomes[task] == outcome] for outcome in OUTCOMES]
    in_turn = [task for round_ in zip_longest(*groups) for task in round_ if task is not None]
    chosen = [complete[task] for task in in_turn[:count]]
    openings = {tuple(_opening(sides[0][2])) for sides in chosen}
    system = next(iter(openings)) if len(openings) == 1 else ()
    return Examples(
        system=tuple(bubble(message) for message in system),
        shown=tuple(_example(sides, outcomes[sides[0][2].task.id], len(system)) for sides in chosen),
        tally=dict(Counter(outcomes.values())) if len(results) == 2 else {},
        kept=len(complete),
    )


def _outcome(trajectories: Sequence[Trajectory]) -> str:
    if len(trajectories) < 2 or any(trajectory.failed for trajectory in trajectories):
        return "not comparable"
    before, after = (trajectory.reward for trajectory in trajectories)
    if after == before:
        return "unchanged"
    return "improved" if after > before else "got worse"


def _opening(trajectory: Trajectory) -> Iterator[Message]:
    """The system messages that a conversation starts with."""
    return takewhile(lambda message: message.role == "system", trajectory.messages)


def _example(sides: Sequence[tuple[str, str, Trajectory]], outcome: str, skip: int) -> Example:
    first = sides[0][2]
    shared = _shared_prefix([trajectory.messages for _, _, trajectory in sides])
    return Example(
        task=first.task.id,
        kind=first.task.kind,
        outcome=outcome if len(sides) > 1 else "",
        prompt=tuple(bubble(message) for message in first.messages[skip:shared]),
        sides=tuple(_side(label, color, trajectory, shared) for label, color, trajectory in sides),
    )


def _shared_prefix(conversations: Sequence[Sequence[Message]]) -> int:
    """How many messages from the start are the task's own: the same everywhere and not the policy's."""
    shared = 0
    for messages in zip(*conversations, strict=False):
        if messages[0].role == "assistant" or any(message != messages[0] for message in messages):
            break
        shared += 1
    return shared


def _side(label: str, color: str, trajectory: Trajectory, skip: int) -> Side:
    verdict = trajectory.verdict
    scored = verdict is not None and verdict.value is not None and not trajectory.failed
    components = verdict.components if verdict is not None else {}
    reason = (verdict.failure if verdict is not None else None) or trajectory.stop_reason
    return Side(
        label=label,
        color=color,
        score=f"{trajectory.reward:.2f}" if scored else "failed",
        components=", ".join(f"{name} {value:g}" for name, value in components.items()) if scored else reason,
        good=scored and trajectory.reward > 0,
        stop=trajectory.stop_reason.replace("_", " "),
        tokens=trajectory.num_sampled,
        bubbles=tuple(bubble(message) for message in trajectory.messages[skip:]),
    )


def bubble(message: Message) -> Bubble:
    """A message, ready to show."""
    calls = tuple(format_call(call.name, call.arguments) for call in message.tool_calls)
    omitted = max(0, len(message.content) - MAX_CHARS)
    return Bubble(message.role, message.content[:MAX_CHARS], calls, omitted)
