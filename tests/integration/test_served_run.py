"""A run whose environment is served, by processes of its own, one of which dies, or by its cluster."""

from __future__ import annotations

import json
import os
import shutil
import signal
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from k2rl.rollouts.recording import read_recording
from tests.integration.conftest import wait_for
from tests.ports import free_ports

pytestmark = [pytest.mark.integration, pytest.mark.slow]


def test_a_run_goes_on_when_a_service_is_killed(start: Callable[..., Any], tmp_path: Path) -> None:
    port = free_ports(2)
    urls = [f"http://127.0.0.1:{port}", f"http://127.0.0.1:{port + 1}"]
    services = start("envs", "serve", "calculator", "--port", str(port), "--processes", "2", cwd=tmp_path)
    for url in urls:
        wait_for(lambda url=url: _health(url) is not None, f"{url} answers", 60)  # type: ignore[misc]
    sizes = ("train.steps=12", "rollout.tasks_per_step=6", "env.eval_tasks=8", "rollout.max_failed_share=0.9")
    remote = ("env=remote", f"env.kwargs.urls=[{','.join(urls)}]", "hydra.run.dir=run", *sizes)
    command = start("train", "experiment=tiny", *remote, cwd=tmp_path)
    run = tmp_path / "run"
    wait_for(lambda: (run / "samples").is_dir(), "the first step")
    wait_for(lambda: bool(_health(urls[0])), "episodes are under way")
    children = Path(f"/proc/{services.process.pid}/task/{services.process.pid}/children").read_text().split()
    os.kill(int(children[0]), signal.SIGKILL)
    code, out, err = command.finish()
    assert code == 0, f"{out}\n{err}"
    summary = json.loads((run / "summary.json").read_text())
    assert summary["steps"] == 12
    assert summary["failed_episodes"] >= 0


def _health(url: str) -> int | None:
    """Episodes under way; None if nobody answers."""
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=5) as reply:
            return int(json.load(reply)["open"])
    except OSError:
        return None


SAYS_WHERE = '''
import os
from tail_env import Tail
from k2rl.types import Message


class SaysWhere(Tail):
    """Says in which process it is played."""

    def reset(self, *, seed=None, options=None):
        (message,), info = super().reset(seed=seed, options=options)
        return (Message("user", f"{os.getpid()} {message.content}"),), info
'''


def test_a_run_plays_in_services_of_its_cluster(start: Callable[..., Any], tmp_path: Path) -> None:
    shutil.copy(Path(__file__).with_name("tail_env.py"), tmp_path)
    (tmp_path / "says_where.py").write_text(SAYS_WHERE)
    sizes = ("train.steps=2", "env.eval_tasks=4", "budget.default=64", "hydra.run.dir=run")
    served = ("env.id=says_where:SaysWhere", "env.service.workers=2")
    command = start("train", "experiment=tiny", *served, *sizes, cwd=tmp_path)
    code, out, err = command.finish()
    assert code == 0, f"{out}\n{err}"
    recordings = [read_recording(tmp_path / "run", step) for step in (1, 2)]
    pids = {int(t.messages[0].content.split()[0]) for each in recordings for t in each.trajectories}
    assert len(pids) == 2
    assert command.process.pid not in pids
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["failed_episodes"] == 0
