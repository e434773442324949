from collections.abc import Callable
from pathlib import Path

from k2rl.tracking.samples import choose_samples, format_trajectory, visible, write_samples
from k2rl.types import Message, ToolCall, Trajectory

Make = Callable[..., Trajectory]

EXPECTED = """\
task        t0  (calculator, kind add, train, seed 164)
verdict     1.000   (correct 1 · format 1)
stopped     env_done after 2 turns, 1.5 s
tokens      27 sampled, 73 in all
temperature 1.250
weights     versions 3, 4
episode     e0  (group g-t0)

── system ────────────────────────────────────────
You can call tools. Give the final number alone.

── user ──────────────────────────────────────────
What is 16 plus 14?

── assistant ─────────────────────────────────────
I will use the calculator.
→ calls calculator(expression="16+14")

── tool result · functions.calculator:0 ──────────
│ 30
│ (exact)

── assistant ─────────────────────────────────────
The answer is 30."""


def test_a_trajectory_reads_like_a_conversation(trajectory: Make) -> None:
    assert format_trajectory(trajectory()) == EXPECTED


def test_a_failed_trajectory_says_why_and_has_no_score(trajectory: Make) -> None:
    text = format_trajectory(trajectory(reward=None))
    assert "verdict     FAILED, no score: sandbox died: out of memory" in text
    assert "stopped     failed after" in text


def test_an_unfinished_trajectory_can_be_shown(trajectory: Make) -> None:
    bare = trajectory()
    bare.verdict, bare.segments, bare.messages = None, [], []
    text = format_trajectory(bare)
    assert "verdict     none: not judged" in text
    assert "weights     none: nothing was sampled" in text


def test_control_characters_of_the_model_do_not_reach_the_terminal(trajectory: Make) -> None:
    nasty = trajectory()
    call = ToolCall("functions.x:0", "x\x1b[2J", {"a": "\x07"})
    nasty.messages = [Message("assistant", "hi\x1b[31m\r\nthere\x00\u009b", tool_calls=(call,))]
    text = format_trajectory(nasty)
    assert not any((ord(c) < 0x20 and c != "\n") or 0x7F <= ord(c) < 0xA0 for c in text)
    assert "hi\\x1b[31m\\x0d\nthere\\x00\\x9b" in text


def test_visible_keeps_ordinary_text() -> None:
    assert visible("a\tb\n漢字 é 🙂") == "a\tb\n漢字 é 🙂"


def test_the_choice_spans_best_to_worst_and_does_not_depend_on_the_order(trajectory: Make) -> None:
    episodes = [trajectory(f"e{n:02d}", n / 10) for n in range(11)]
    chosen = choose_samples(episodes, 4)
    assert [(label, t.id) for label, t in chosen] == [
        ("best", "e10"),
        ("rank 4 of 11", "e07"),
        ("rank 8 of 11", "e03"),
        ("worst", "e00"),
    ]
    assert choose_samples(episodes[::-1], 4) == chosen


def test_equal_rewards_are_ordered_by_id(trajectory: Make) -> None:
    episodes = [trajectory(name, 1.0) for name in ("c", "a", "b")]
    assert [t.id for _, t in choose_samples(episodes, 3)] == ["a", "b", "c"]


def test_a_failed_one_takes_the_last_place(trajectory: Make) -> None:
    episodes = [trajectory(f"e{n}", float(n)) for n in range(5)] + [
        trajectory("bad", None),
        trajectory("x", None),
    ]
    labels = [(label, t.id) for label, t in choose_samples(episodes, 3)]
    assert labels == [("best", "e4"), ("worst", "e0"), ("failed (2 in this step)", "bad")]


def test_few_many_and_no_samples(trajectory: Make) -> None:
    episodes = [trajectory("a", 1.0), trajectory("b", 0.0)]
    assert [t.id for _, t in choose_samples(episodes, 1)] == ["a"]
    assert [t.id for _, t in choose_samples(episodes, 9)] == ["a", "b"]
    assert choose_samples(episodes, 0) == []
    assert choose_samples([], 4) == []
    assert [t.id for _, t in choose_samples([trajectory("f", None)], 1)] == ["f"]


def test_samples_are_written_for_the_step(tmp_path: Path, trajectory: Make) -> None:
    path = write_samples(tmp_path, 3, [trajectory("a", 1.0), trajectory("b", 0.5), trajectory("c", None)], 4)
    assert path == tmp_path / "samples" / "step_000003.txt"
    text = path.read_text(encoding="utf-8")
    assert text.startswith("Step 3: 3 episodes, 1 failed, mean reward 0.750\n")
    assert "3 of 3 · failed (1 in this step)" in text
    assert write_samples(tmp_path, 4, [], 4) is None
