"""A run over two nodes of a Ray cluster, which are network namespaces; one of them dies and is replaced."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import psutil
import pytest

from k2rl.tracking.metrics import read_metrics
from k2rl.tracking.restarts import read_restarts
from tests import netns
from tests.integration.conftest import Command, wait_for

pytestmark = [
    pytest.mark.integration,
    pytest.mark.slow,
    pytest.mark.timeout(1500),
    pytest.mark.skipif(not netns.available(), reason="needs root and iproute2 for network namespaces"),
]

STEPS = 6
#: Four vLLM front ends and as many trainers start one after the other, on as few cores as there are.
DEADLINE_S = 480.0


def environment() -> dict[str, str]:
    """This process's, for a cluster without a token, which else is in the home of whoever started it."""
    return os.environ | {"RAY_AUTH_MODE": "disabled"}


class Node:
    """A node of a Ray cluster; a process that stands for it, and those that it has started."""

    def __init__(self, host: netns.Host, *arguments: str) -> None:
        ray = Path(sys.executable).with_name("ray")
        limits = ["--num-cpus=1", "--object-store-memory=200000000", "--disable-usage-stats", "--block"]
        self.process = subprocess.Popen(
            host.command(str(ray), "start", f"--node-ip-address={host.address}", *limits, *arguments),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env=environment(),
        )
        self._process = psutil.Process(self.process.pid)

    def processes(self) -> list[psutil.Process]:
        return self._process.children(recursive=True)

    def named(self, name: str) -> psutil.Process:
        (found,) = (process for process in self.processes() if name in process.name())
        return found

    def stop(self) -> None:
        processes = [*self.processes(), self._process]
        self.process.terminate()
        psutil.wait_procs(processes, timeout=10)
        for process in processes:
            if process.is_running():
                process.kill()
        self.process.wait()


@contextmanager
def started(host: netns.Host, *arguments: str) -> Iterator[Node]:
    node = Node(host, *arguments)
    try:
        yield node
    finally:
        node.stop()


def nodes_alive(host: netns.Host, address: str) -> int:
    code = f"import ray; ray.init({address!r}, log_to_driver=False, logging_level='error'); "
    code += "print('NODES', sum(node['Alive'] for node in ray.nodes()))"
    done = subprocess.run(
        host.command(sys.executable, "-c", code),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env=environment(),
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("NODES")]
    return int(lines[0].split()[1]) if lines else 0


def test_a_run_over_two_nodes_outlives_one_of_them(tmp_path: Path) -> None:
    with ExitStack() as stack:
        head, other = stack.enter_context(netns.network(2))
        for host in (head, other):
            # Ray finds a host's own address by where its default route leads.
            subprocess.run(host.command("ip", "route", "add", "default", "dev", netns.INTERFACE), check=True)
        scratch = stack.enter_context(tempfile.TemporaryDirectory(prefix="r", dir="/tmp"))  # sockets: short
        address = f"{head.address}:6379"
        at_head = ("--head", "--port=6379", "--include-dashboard=false", f"--temp-dir={scratch}")
        stack.enter_context(started(head, *at_head))
        wait_for(lambda: nodes_alive(head, address) == 1, "the head node is there")
        second = stack.enter_context(started(other, f"--address={address}"))
        wait_for(lambda: nodes_alive(head, address) == 2, "the second node is there")

        run_dir = tmp_path / "run"
        command = Command(
            *("train", "experiment=tiny", f"train.steps={STEPS}", "train.checkpoint_every=1"),
            *("cluster.workers=2", "cluster.strategy=STRICT_SPREAD", f"cluster.address={address}"),
            *("optimizer=adamw", f"hydra.run.dir={run_dir}"),
            cwd=tmp_path,
            program=head.command(sys.executable, "-m", "k2rl.cli"),
            env=environment(),
        )
        stack.callback(lambda: [process.kill() for process in command.descendants()])

        def until(condition: Callable[[], bool], what: str) -> None:
            wait_for(lambda: condition() or command.process.poll() is not None, what, DEADLINE_S)
            assert command.process.poll() is None, command.finish()

        until(lambda: (run_dir / "metrics.jsonl").exists() and len(read_metrics(run_dir)) >= 2, "two steps")
        assert other.received_bytes() > 2**20, "weights went there"
        second.named("raylet").kill()
        until(lambda: len(read_restarts(run_dir)) == 1, "the death of the node is found")
        stack.enter_context(started(other, f"--address={address}"))
        code, out, err = command.finish(DEADLINE_S)
        assert code == 0, f"{out}\n{err}"
        assert [row["step"] for row in read_metrics(run_dir)] == list(range(1, STEPS + 1))
        assert "worker 1" in read_restarts(run_dir)[0].why
        assert (run_dir / "model" / "model.safetensors").stat().st_size > 0
