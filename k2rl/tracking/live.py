"""The live view of a run in the terminal, or one plain line a step where there is none."""

from __future__ import annotations

import asyncio
import atexit
import time
from collections.abc import Callable

from rich.console import Console
from rich.live import Live

from k2rl.evaluation.results import EvaluationResult
from k2rl.tracking.live_panel import PanelState, evaluation_text, render_panel, step_text
from k2rl.tracking.metrics import Metrics

TICK_S = 1.0
MIN_REDRAW_S = 0.1
LONG_PHASES = {"start": "start of Ray, trainer and vLLM, a quarter of a minute or more"}
"""What a plain line says of a phase that is long and has no progress to show."""


class LiveView:
    """Shows where a run is and how it does.

    `mode` is `on`, `off`, or `auto`: the panel on a terminal, plain lines elsewhere. The panel is
    drawn by the caller's own thread (at each report, and once a second from the running asyncio
    loop), so nothing runs on beside an exception or Ctrl-C. `stop` gives the terminal back.
    """

    def __init__(
        self,
        name: str,
        total_steps: int,
        mode: str = "auto",
        done_steps: int = 0,
        console: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._console = console or Console(force_terminal=True if mode == "on" else None)
        self._state = PanelState(name, total_steps, clock, done_steps)
        self._show_panel = mode == "on" or (mode == "auto" and self._console.is_terminal)
        self._show_lines = mode == "auto" and not self._show_panel
        self._live: Live | None = None
        self._ticker: asyncio.TimerHandle | None = None
        self._drawn = float("-inf")

    def start(self) -> None:
        """Take the terminal and start the clock."""
        self._state.began = self._state.clock()
        if not self._show_panel:
            return
        self._live = Live(
            console=self._console,
            auto_refresh=False,
            get_renderable=lambda: render_panel(self._state, self._console.width),
        )
        # `stop` is the rule; this is for an exit that goes past it, so that the cursor comes back.
        atexit.register(self.stop)
        self._live.start(refresh=True)

    def phase(self, name: str, step: int = 0) -> None:
        """The run enters phase `name` of `step` (0: before RL)."""
        self._state.enter_phase(name, step)
        if self._show_lines and step == 0:
            self._print(f"… {LONG_PHASES.get(name, name)}")
        self._redraw()
        self._schedule_tick()

    def progress(self, done: int, total: int) -> None:
        """`done` of `total` parts of the current phase are through."""
        self._state.progress = (done, total)
        if done >= total or self._state.clock() - self._drawn >= MIN_REDRAW_S:
            self._redraw()

    def step(self, step: int, metrics: Metrics) -> None:
        """A step is finished."""
        self._state.finish_step(step, metrics)
        if self._show_lines:
            self._print(step_text(self._state))
        self._redraw()

    def evaluation(self, result: EvaluationResult) -> None:
        """The policy was evaluated on the held-out tasks."""
        self._state.evaluations[result.name] = result
        if self._show_lines:
            self._print(f"held-out reward, {evaluation_text(result)}")
        self._redraw()

    def note(self, text: str) -> None:
        """Something the user should know, in printable text."""
        self._state.notes.append((self._state.elapsed, text))
        if self._show_lines:
            self._print(f"! {text}")
        self._redraw()

    def stopping(self) -> None:
        """The user has asked the run to stop: give the terminal back and answer, whatever the mode."""
        self.stop()
        self._print("… stopping: a step that has begun is finished and saved; Ctrl-C again stops at once")

    def stop(self) -> None:
        """Leave the last state on the screen and give the terminal back; safe to call twice."""
        if self._ticker is not None:
            self._ticker.cancel()
            self._ticker = None
        if self._live is not None:
            live, self._live = self._live, None
            self._state.stopped = True
            live.stop()
            atexit.unregister(self.stop)

    def _print(self, line: str) -> None:
        self._console.print(line, markup=False, highlight=False, soft_wrap=True)

    def _redraw(self) -> None:
        if self._live is not None:
            self._drawn = self._state.clock()
            self._live.refresh()

    def _schedule_tick(self) -> None:
        """Redraw in a second, so that clocks move during long phases; only the loop's own thread does."""
        if self._ticker is not None:
            self._ticker.cancel()
            self._ticker = None
        if self._live is None:
            return
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:  # No asyncio here: the panel is redrawn at each report alone.
            return
        self._ticker = loop.call_later(TICK_S, self._tick)

    def _tick(self) -> None:
        self._redraw()
        self._schedule_tick()
