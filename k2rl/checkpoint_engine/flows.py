"""A discrete-event simulation of transfers that share links: the core of the push simulator. Pure Python."""

from __future__ import annotations

import heapq
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Task:
    """`setup` seconds, `nbytes` over all of `links` at once, and `latency` seconds until it counts as done.

    A lane does one task at a time, in the order in which they are given; latency does not occupy it.
    """

    stage: str
    lane: str
    after: Sequence[int]
    setup: float = 0.0
    nbytes: float = 0.0
    links: Sequence[str] = ()
    latency: float = 0.0
    bucket: int = -1


@dataclass
class Span:
    """When a task had its lane, and when it was done; seconds."""

    start: float = 0.0
    end: float = 0.0
    done: float = 0.0


@dataclass
class Traffic:
    """What a link carried: bytes, and the highest rate (bytes a second)."""

    nbytes: float = 0.0
    peak: float = 0.0


@dataclass
class _Flow:
    left: float
    links: tuple[str, ...]
    rate: float = 0.0
    since: float = 0.0
    #: Counts changes of rate: an event of an earlier count is void.
    version: int = 0


@dataclass
class _State:
    tasks: Sequence[Task]
    rates: Mapping[str, float]
    spans: list[Span]
    traffic: dict[str, Traffic]
    waiting: list[int] = field(default_factory=list)
    heirs: dict[int, list[int]] = field(default_factory=lambda: defaultdict(list))
    next_of: dict[int, int] = field(default_factory=dict)
    flows: dict[int, _Flow] = field(default_factory=dict)
    on: dict[str, set[int]] = field(default_factory=lambda: defaultdict(set))
    events: list[tuple[float, int, int, int]] = field(default_factory=list)


_SET_UP, _SENT, _DONE = 0, 1, 2


def simulate_tasks(
    tasks: Sequence[Task], rates: Mapping[str, float]
) -> tuple[list[Span], dict[str, Traffic]]:
    """Run tasks over links of `rates` bytes a second; flows share a link max-min fairly.

    Args:
        tasks: in an order in which each comes after those that it waits for.

    Raises:
        ValueError: a task waits for a later one, or for itself.
    """
    state = _State(tasks, rates, [Span() for _ in tasks], {name: Traffic() for name in rates})
    last: dict[str, int] = {}
    for number, task in enumerate(tasks):
        if any(other >= number for other in task.after):
            raise ValueError(f"task {number} ({task.stage}) waits for a later one")
        before = set(task.after)
        for other in before:
            state.heirs[other].append(number)
        state.waiting.append(len(before) + (task.lane in last))
        if task.lane in last:
            state.next_of[last[task.lane]] = number
        last[task.lane] = number
    for number in range(len(tasks)):
        if state.waiting[number] == 0:
            _start(state, number, 0.0)
    while state.events:
        now, kind, number, version = heapq.heappop(state.events)
        if kind == _SET_UP:
            _send(state, number, now)
        elif kind == _SENT:
            if number in state.flows and state.flows[number].version == version:
                _sent(state, number, now)
        else:
            for heir in state.heirs[number]:
                _one_less(state, heir, now)
    return state.spans, state.traffic


def _start(state: _State, number: int, now: float) -> None:
    state.spans[number].start = now
    heapq.heappush(state.events, (now + state.tasks[number].setup, _SET_UP, number, 0))


def _one_less(state: _State, number: int, now: float) -> None:
    state.waiting[number] -= 1
    if state.waiting[number] == 0:
        _start(state, number, now)


def _send(state: _State, number: int, now: float) -> None:
    task = state.tasks[number]
    if task.nbytes <= 0 or not task.links:
        _release(state, number, now)
        return
    state.flows[number] = _Flow(task.nbytes, tuple(task.links), since=now)
    for link in task.links:
        state.on[link].add(number)
    _share(state, task.links, now)


def _sent(state: _State, number: int, now: float) -> None:
    flow = state.flows[number]
    _account(state, flow, now)
    del state.flows[number]
    for link in flow.links:
        state.on[link].discard(number)
    _release(state, number, now)
    _share(state, flow.links, now)


def _release(state: _State, number: int, now: float) -> None:
    span, latency = state.spans[number], state.tasks[number].latency
    span.end, span.done = now, now + latency
    heapq.heappush(state.events, (span.done, _DONE, number, 0))
    if number in state.next_of:
        _one_less(state, state.next_of[number], now)


def _account(state: _State, flow: _Flow, now: float) -> None:
    moved = flow.rate * (now - flow.since)
    flow.left -= moved
    for link in flow.links:
        state.traffic[link].nbytes += moved
    flow.since = now


def _share(state: _State, links: Sequence[str], now: float) -> None:
    """Max-min fair rates, anew, for the flows that are connected with `links` through common links."""
    group, open_links = _connected(state, links)
    for number in group:
        _account(state, state.flows[number], now)
    left = {link: state.rates[link] for link in open_links}
    users = {link: len(state.on[link]) for link in open_links}
    unset = set(group)
    while unset:
        tight = min((link for link in open_links if users[link]), key=lambda link: left[link] / users[link])
        share = left[tight] / users[tight]
        for number in sorted(state.on[tight] & unset):
            flow = state.flows[number]
            flow.rate = share
            unset.discard(number)
            for link in flow.links:
                left[link] = max(0.0, left[link] - share)
                users[link] -= 1
    for number in sorted(group):
        flow = state.flows[number]
        flow.version += 1
        heapq.heappush(state.events, (now + max(0.0, flow.left) / flow.rate, _SENT, number, flow.version))
    for link in open_links:
        carried = sum(state.flows[number].rate for number in state.on[link])
        state.traffic[link].peak = max(state.traffic[link].peak, carried)


def _connected(state: _State, links: Sequence[str]) -> tuple[set[int], list[str]]:
    group: set[int] = set()
    seen = dict.fromkeys(links)
    queue = list(links)
    while queue:
        for number in state.on[queue.pop()] - group:
            group.add(number)
            for link in state.flows[number].links:
                if link not in seen:
                    seen[link] = None
                    queue.append(link)
    return group, [link for link in seen if state.on[link]]
