"""Sample trajectories as text a person can read: `samples/step_000003.txt`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from k2rl.types import NO_WEIGHT_VERSION, Message, Trajectory, Verdict

WIDTH = 100
FOLDER = "samples"


def write_samples(run_dir: Path, step: int, trajectories: Sequence[Trajectory], count: int) -> Path | None:
    """Write `count` chosen trajectories of `step`; returns the file, or None if there is nothing to write."""
    chosen = choose_samples(trajectories, count)
    if not chosen:
        return None
    path = run_dir / FOLDER / f"step_{step:06d}.txt"
    path.parent.mkdir(parents=True, exist_ok=True)
    parts = [_summary_line(step, trajectories)]
    for number, (label, trajectory) in enumerate(chosen, start=1):
        title = f" {number} of {len(chosen)} · {label} "
        parts.append(title.center(WIDTH, "═"))
        parts.append(format_trajectory(trajectory))
    path.write_text("\n\n".join(parts) + "\n", encoding="utf-8", errors="backslashreplace")
    return path


def choose_samples(trajectories: Sequence[Trajectory], count: int) -> list[tuple[str, Trajectory]]:
    """The best, the worst and evenly spaced ones between them, best first, each with its label.

    The choice is deterministic: by reward, then by id. When some failed and there is room for more
    than one sample, the last place shows a failed one.
    """
    scored = sorted((t for t in trajectories if not t.failed), key=lambda t: (-t.reward, t.id))
    failed = sorted((t for t in trajectories if t.failed), key=lambda t: t.id)
    show_failed = count > 0 and bool(failed) and (count > 1 or not scored)
    places = min(count - show_failed, len(scored))
    if places == 1:
        chosen = [("best", scored[0])]
    else:
        ranks = [round(place * (len(scored) - 1) / (places - 1)) for place in range(max(0, places))]
        chosen = [(_rank_label(rank, len(scored)), scored[rank]) for rank in ranks]
    if show_failed:
        chosen.append((f"failed ({len(failed)} in this step)", failed[0]))
    return chosen


def format_trajectory(trajectory: Trajectory) -> str:
    """One trajectory: what it was about, how it was judged, and the conversation."""
    task = trajectory.task
    facts = [
        ("task", f"{task.id}  ({task.env}, kind {task.kind}, {task.split}, seed {task.seed})"),
        ("verdict", _verdict_text(trajectory.verdict)),
        ("stopped", f"{trajectory.stop_reason} after {_turns(trajectory)}, {trajectory.seconds:.1f} s"),
        ("tokens", f"{trajectory.num_sampled} sampled, {len(trajectory.token_ids)} in all"),
        ("temperature", f"{trajectory.temperature:.3f}"),
        ("weights", _versions_text(trajectory)),
        ("episode", f"{trajectory.id}  (group {trajectory.group_id})"),
    ]
    lines = [f"{name:<12}{visible(text)}" for name, text in facts]
    for message in trajectory.messages:
        lines += ["", *_message_lines(message)]
    return "\n".join(lines)


def format_call(name: str, arguments: dict[str, object]) -> str:
    """A tool call as one line: `search(query="k2", limit=3)`."""
    shown = ", ".join(f"{key}={json.dumps(value, ensure_ascii=False)}" for key, value in arguments.items())
    return f"{name}({shown})"


def visible(text: str) -> str:
    r"""`text` with control characters escaped, except newlines and tabs.

    A model may write terminal escape sequences; showing its text must not run them.
    """
    return "".join(c if c in "\n\t" or not _is_control(c) else f"\\x{ord(c):02x}" for c in text)


def _is_control(char: str) -> bool:
    code = ord(char)
    return code < 0x20 or 0x7F <= code < 0xA0 or 0xD800 <= code < 0xE000


def _message_lines(message: Message) -> list[str]:
    title = {"tool": "tool result"}.get(message.role, message.role)
    if message.tool_call_id:
        title += f" · {visible(message.tool_call_id)}"
    # Tool results are fenced off with a bar: they are the world's words, not the policy's.
    margin = "│ " if message.role == "tool" else ""
    body = [margin + line for line in visible(message.content).split("\n")]
    calls = [f"→ calls {visible(format_call(call.name, call.arguments))}" for call in message.tool_calls]
    return [f"── {title} ".ljust(WIDTH // 2, "─"), *body, *calls]


def _verdict_text(verdict: Verdict | None) -> str:
    if verdict is None:
        return "none: not judged"
    if not verdict.ok:
        return f"FAILED, no score: {verdict.failure}"
    components = " · ".join(f"{name} {value:g}" for name, value in verdict.components.items())
    return f"{verdict.value:.3f}" + (f"   ({components})" if components else "")


def _versions_text(trajectory: Trajectory) -> str:
    versions = sorted(set(trajectory.weight_versions) - {NO_WEIGHT_VERSION})
    if not versions:
        return "none: nothing was sampled"
    return f"version{'s' if len(versions) > 1 else ''} {', '.join(map(str, versions))}"


def _turns(trajectory: Trajectory) -> str:
    turns = sum(message.role == "assistant" for message in trajectory.messages)
    return f"{turns} turn{'' if turns == 1 else 's'}"


def _rank_label(rank: int, scored: int) -> str:
    if rank == 0:
        return "best"
    return "worst" if rank == scored - 1 else f"rank {rank + 1} of {scored}"


def _summary_line(step: int, trajectories: Sequence[Trajectory]) -> str:
    rewards = [t.reward for t in trajectories if not t.failed]
    mean = f"mean reward {sum(rewards) / len(rewards):.3f}" if rewards else "none scored"
    return f"Step {step}: {len(trajectories)} episodes, {len(trajectories) - len(rewards)} failed, {mean}"
