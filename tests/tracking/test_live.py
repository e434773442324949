import asyncio
import io
import os
import pty
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

import k2rl
from k2rl.evaluation.results import EvaluationResult
from k2rl.tracking.live import LiveView
from k2rl.tracking.live_panel import PanelState, clock_text, render_panel, sparkline

SHOW_CURSOR, HIDE_CURSOR = "\x1b[?25h", "\x1b[?25l"
METRICS = {
    "reward/mean": 0.25,
    "rollout/episodes": 96.0,
    "rollout/failed": 2.0,
    "rollout/tokens_per_second": 1234.4,
    "rollout/episodes_per_second": 3.21,
    "mismatch/mean_abs_gap": 0.0031,
    "time/step_s": 60.0,
}


def terminal(width: int = 100) -> Console:
    return Console(file=io.StringIO(), force_terminal=True, width=width)


def written(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def panel_text(state: PanelState, width: int = 100) -> str:
    console = Console(file=io.StringIO(), width=width)
    console.print(render_panel(state, width))
    return written(console)


def test_the_panel_shows_where_the_run_is(clock: Any, evaluation: Callable[..., EvaluationResult]) -> None:
    state = PanelState("calculator", 10, clock, began=clock.now)
    state.evaluations["before"] = evaluation("before", 0, 0.2)
    state.enter_phase("rollout", 1)
    clock.now += 60
    state.finish_step(1, METRICS)
    state.finish_step(2, METRICS | {"reward/mean": 0.5})
    state.enter_phase("warm start", 3)
    clock.now += 15
    state.progress = (30, 96)
    state.notes.append((61.0, "2 of 96 episodes failed"))
    text = panel_text(state)
    for part in (
        "k2rl · calculator",
        "2/10",
        "1:15 · 7:45 left",  # 8 steps of 60 s, 15 s into the third
        "warm start",
        "30/96",
        "0.500 ▲ 0.250   last 2 0.375   ▁█",
        "before: 0.208 [0.145, 0.289], n = 120",
        "1,234 tokens/s · 3.21 episodes/s · 60.0 s a step",
        "log-prob gap 0.0031 nats",
        "2 failed",
        "1:01  2 of 96 episodes failed",
    ):
        assert part in text


@pytest.mark.parametrize("width", [40, 60, 80, 200])
def test_the_panel_fits_the_terminal(clock: Any, width: int) -> None:
    state = PanelState("calculator", 10, clock)
    state.finish_step(1, METRICS)
    state.notes.append((1.0, "x" * 300))
    assert max(map(len, panel_text(state, width).splitlines())) <= width


def test_a_panel_without_anything_yet_can_be_drawn(clock: Any) -> None:
    assert "0/10" in panel_text(PanelState("calculator", 10, clock))


def test_markup_of_others_is_text(clock: Any) -> None:
    state = PanelState("[red]run[/red]", 10, clock)
    state.notes.append((1.0, "[bold]model[/bold] [/] said"))
    text = panel_text(state)
    assert "[red]run[/red]" in text
    assert "[bold]model[/bold] [/] said" in text


@pytest.mark.parametrize("mode", ["on", "auto", "off"])
def test_a_wish_to_stop_is_answered_and_gives_the_terminal_back(clock: Any, mode: str) -> None:
    console = terminal()
    view = LiveView("run", 3, mode, console=console, clock=clock)
    view.start()
    view.stopping()
    view.phase("checkpoint", 2)
    view.stop()
    assert written(console).rstrip().endswith("Ctrl-C again stops at once")
    assert written(console).count(HIDE_CURSOR) == written(console).count(SHOW_CURSOR)


def test_off_writes_nothing(clock: Any) -> None:
    console = terminal()
    view = LiveView("run", 3, "off", console=console, clock=clock)
    view.start()
    view.phase("rollout", 1)
    view.step(1, METRICS)
    view.note("hm")
    view.stop()
    assert written(console) == ""


def test_auto_without_a_terminal_prints_one_plain_line_a_step(
    clock: Any, evaluation: Callable[..., EvaluationResult]
) -> None:
    console = Console(file=io.StringIO(), width=40)
    view = LiveView("run", 15, "auto", console=console, clock=clock)
    view.start()
    view.phase("warm start")
    view.evaluation(evaluation("before", 0, 0.2))
    view.phase("rollout", 1)
    view.progress(5, 96)
    clock.now += 60
    view.step(1, METRICS)
    view.note("disk [31mnearly full")
    view.stop()
    assert written(console).splitlines() == [
        "… warm start",
        "held-out reward, before: 0.208 [0.145, 0.289], n = 120",
        "step  1/15  reward 0.250 (last 5: 0.250)  1,234 tokens/s · 3.21 episodes/s · 60.0 s a step  "
        "episodes 96 · 2 failed  log-prob gap 0.0031  1:00 elapsed  14:00 left",
        "! disk [31mnearly full",
    ]


def test_the_cursor_comes_back_after_an_exception(clock: Any) -> None:
    console = terminal()
    view = LiveView("run", 3, "auto", console=console, clock=clock)

    def train() -> None:
        try:
            view.start()
            view.phase("train", 1)
            raise ZeroDivisionError
        finally:
            view.stop()

    with pytest.raises(ZeroDivisionError):
        train()
    view.stop()
    assert written(console).count(HIDE_CURSOR) == written(console).count(SHOW_CURSOR) == 1


def test_progress_is_redrawn_at_most_ten_times_a_second_but_always_at_the_end(clock: Any) -> None:
    console = terminal()
    view = LiveView("run", 3, "on", console=console, clock=clock)
    view.start()
    view.phase("rollout", 1)
    drawn = written(console).count("rollout")
    for done in range(1, 1001):
        clock.now += 0.001
        view.progress(done, 1000)
    view.stop()
    assert 9 <= written(console).count("rollout") - drawn <= 13
    assert "1000/1000" in written(console)


def test_the_clock_moves_while_the_loop_awaits(clock: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("k2rl.tracking.live.TICK_S", 0.01)
    console = terminal()
    view = LiveView("run", 3, "on", console=console, clock=clock)

    async def train() -> None:
        view.phase("train", 1)
        clock.now += 83
        await asyncio.sleep(0.2)

    view.start()
    asyncio.run(train())
    assert "1:23" in written(console)
    asyncio.run(train())  # a second event loop: the ticker of the first is gone with it
    assert "2:46" in written(console)
    view.stop()
    before = len(written(console))
    asyncio.run(asyncio.sleep(0.05))
    assert len(written(console)) == before


def test_ctrl_c_gives_the_terminal_back(tmp_path: Path) -> None:
    script = tmp_path / "run.py"
    script.write_text(
        "import asyncio, signal\n"
        "from pathlib import Path\n"
        "from k2rl.config import TrackingConfig\n"
        # A shell lets what it starts in the background ignore Ctrl-C, and that is inherited.
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from k2rl.tracking.tracker import Tracker\n"
        "async def main():\n"
        "    with Tracker(Path('run'), TrackingConfig(tensorboard=False), 3) as tracker:\n"
        "        with tracker.phase('train', 1):\n"
        "            await asyncio.sleep(60)\n"
        "asyncio.run(main())\n"
    )
    main_end, child_end = pty.openpty()
    env = os.environ | {"PYTHONPATH": str(Path(k2rl.__file__).parents[1]), "TERM": "xterm"}
    child = subprocess.Popen(
        [sys.executable, str(script)], cwd=tmp_path, env=env, stdout=child_end, stderr=subprocess.DEVNULL
    )
    os.close(child_end)
    screen = read_until(main_end, "train")
    child.send_signal(signal.SIGINT)
    screen += read_until(main_end, SHOW_CURSOR)
    assert child.wait(timeout=20) != 0
    os.close(main_end)
    assert HIDE_CURSOR in screen
    assert SHOW_CURSOR in screen
    assert '"phase":"train"' in (tmp_path / "run" / "timeline.jsonl").read_text()


def read_until(descriptor: int, text: str, seconds: float = 20.0) -> str:
    """What the terminal shows until `text` comes."""
    screen, deadline = "", time.monotonic() + seconds
    while text not in screen and time.monotonic() < deadline:
        if select.select([descriptor], [], [], 0.1)[0]:
            screen += os.read(descriptor, 65536).decode(errors="replace")
    return screen


def test_sparkline() -> None:
    assert sparkline([0.0, 0.5, 1.0]) == "▁▅█"
    assert sparkline([2.0, 2.0]) == "▅▅"
    assert len(sparkline(list(range(100)), width=30)) == 30
    assert sparkline(list(range(100)), width=30)[-1] == "█"


@pytest.mark.parametrize(("seconds", "text"), [(0, "0:00"), (75.9, "1:15"), (3661, "1:01:01"), (-3, "0:00")])
def test_clock_text(seconds: float, text: str) -> None:
    assert clock_text(seconds) == text
