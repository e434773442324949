"""A run whose environment is served by processes of its own, one of which dies."""

from __future__ import annotations

import json
import os
import signal
import socket
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.integration.conftest import wait_for

pytestmark = [pytest.mark.integration, pytest.mark.slow]


def test_a_run_goes_on_when_a_service_is_killed(start: Callable[..., Any], tmp_path: Path) -> None:
    port = _free_ports()
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


def _free_ports() -> int:
    """The first of two that are free."""
    for port in range(20000 + os.getpid() % 10000, 60000, 2):
        try:
            for each in (port, port + 1):
                socket.create_server(("127.0.0.1", each)).close()
        except OSError:
            continue
        return port
    raise AssertionError("no ports")
