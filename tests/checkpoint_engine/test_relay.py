"""Bytes go from the host that has them to all others; a host that dies or hangs is an error, not a wait."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from itertools import pairwise

import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed import TCPStore

from k2rl.checkpoint_engine.manifest import Manifest, Shard, TensorSpec
from k2rl.checkpoint_engine.plan import plan_push
from k2rl.checkpoint_engine.runs import Run, messages, runs
from k2rl.checkpoint_engine.transaction import culprits
from tests import netns
from tests.checkpoint_engine.relay_host import pattern

DEADLINE_S = 3.0
MEMORY = 8 << 20
HOSTS = (0, 1, 2)

spans = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 40), st.integers(0, 900)), max_size=30)


@given(
    rows=st.lists(st.integers(1, 40), min_size=1, max_size=8),
    owners=st.integers(1, 4),
    hosts=st.integers(1, 3),
)
def test_runs_cover_what_each_host_has(rows: list[int], owners: int, hosts: int) -> None:
    specs = tuple(TensorSpec(f"t{i}", "float32", (n, 5)) for i, n in enumerate(rows))
    shards = tuple(
        Shard(index, owner, n * owner // owners, n * (owner + 1) // owners)
        for index, n in enumerate(rows)
        for owner in range(owners)
    )
    host_of = {owner: owner % hosts for owner in range(owners)}
    for bucket in plan_push(Manifest(specs, shards), [0], bucket_bytes=1024).buckets:
        found = runs(bucket, host_of)
        owned = {
            byte: host_of[part.owner]
            for block in bucket.blocks
            for part in block.parts
            for byte in range(block.place(part)[0], sum(block.place(part)))
        }
        covered = {byte: run.source for run in found for byte in range(run.offset, run.offset + run.nbytes)}
        assert len(covered) == sum(run.nbytes for run in found), "runs do not overlap"
        assert owned.items() <= covered.items()
        assert all(a.offset < b.offset for a, b in pairwise(found))
        if hosts == 1:
            assert len(found) == 1, "what one host has of a bucket is one run"


@given(spans=spans, message_bytes=st.integers(1, 500), pieces=st.integers(1, 5))
def test_messages_carry_each_byte_once(
    spans: list[tuple[int, int, int]], message_bytes: int, pieces: int
) -> None:
    sent, end = [], 0
    for source, gap, nbytes in spans:
        sent.append(Run(source, end + gap, nbytes))
        end += gap + nbytes
    found = messages(sent, message_bytes, pieces)
    for source, queue in found.items():
        for message in queue:
            assert 0 < message.nbytes <= message_bytes
            assert len(message.pieces) <= pieces
        moved = [piece for message in queue for piece in message.pieces]
        assert sorted(bytes_of(moved)) == bytes_of([run for run in sent if run.source == source])
    assert {run.source for run in sent if run.nbytes} == set(found)


def bytes_of(runs: Sequence[Run]) -> list[int]:
    return [byte for run in runs for byte in range(run.offset, run.offset + run.nbytes)]


def test_the_culprit_is_the_one_who_blames_nobody() -> None:
    assert culprits({1: 0, 2: 1}) == {0}
    assert culprits({0: 1, 2: 1}) == {1}
    assert culprits({0: 1, 1: 0}) == {0, 1}, "both live: it is the connection"
    assert culprits({}) == set()


class Cluster:
    """Three processes that each are a host, on this machine or in namespaces of their own."""

    def __init__(self, stack: ExitStack, hosts: Sequence[netns.Host] | None = None) -> None:
        self._stack = stack
        self._hosts = hosts
        self.epoch = 0
        if hosts is None:
            # Kept: the store ends with it.
            self._store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
            self._address, self._port = "127.0.0.1", self._store.port
        else:
            self._address, self._port = hosts[0].address, 29400
            script = (
                "import sys, torch.distributed as d; s = d.TCPStore(sys.argv[1], 29400, is_master=True, "
                "wait_for_workers=False); print('ready', flush=True); sys.stdin.read()"
            )
            store = self._run(hosts[0].command(sys.executable, "-c", script, self._address))
            assert store.stdout is not None
            assert store.stdout.readline() == "ready\n"
        self.processes = {host: self.start(host) for host in HOSTS}
        self.hear(HOSTS)

    def start(self, host: int) -> subprocess.Popen[str]:
        """A host's process. Its first answer says that it is ready: imports take longer than a deadline."""
        words = [sys.executable, "-m", "tests.checkpoint_engine.relay_host", str(host), self._address]
        words += [str(self._port), str(DEADLINE_S)]
        return self._run(self._hosts[host].command(*words) if self._hosts else words)

    def _run(self, words: list[str]) -> subprocess.Popen[str]:
        process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._stack.callback(process.communicate, timeout=10)
        self._stack.callback(process.kill)
        return process

    def tell(self, told: Sequence[int], **order: object) -> None:
        for host in told:
            print(json.dumps(order), file=self.processes[host].stdin, flush=True)

    def hear(self, hosts: Sequence[int]) -> dict[int, dict[str, object]]:
        answers = {}
        for host in hosts:
            stdout = self.processes[host].stdout
            assert stdout is not None
            answers[host] = json.loads(stdout.readline())
        return answers

    def ask(self, asked: Sequence[int], **order: object) -> dict[int, dict[str, object]]:
        self.tell(asked, **order)
        return self.hear(asked)

    def open(self, hosts: Sequence[int] = HOSTS) -> None:
        self.epoch += 1
        answers = self.ask(hosts, do="open", hosts=hosts, epoch=self.epoch)
        assert not any("error" in answer for answer in answers.values()), answers

    def check(self, moved: Sequence[Run], hosts: Sequence[int] = HOSTS) -> None:
        """Let hosts transfer, and compare what they then hold with what they should."""
        before = {host: pattern(host, MEMORY) for host in hosts}
        order = {"runs": [[run.source, run.offset, run.nbytes] for run in moved]}
        answers = self.ask(hosts, do="move", nbytes=MEMORY, **order)
        for host in hosts:
            expected = before[host].copy()
            for run in moved:
                place = slice(run.offset, run.offset + run.nbytes)
                expected[place] = before[run.source][place]
            assert answers[host].get("digest") == xxhash.xxh3_128_hexdigest(expected), answers[host]


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with ExitStack() as stack:
        yield Cluster(stack)


def scattered(sources: Sequence[int], seed: int = 0) -> list[Run]:
    """Runs of all lengths from all sources, as shards of small and large tensors make them, with gaps."""
    draw = random.Random(seed)
    found, end = [], 0
    while True:
        nbytes = draw.choice([1, 100, 1000, 4000, 300_000, 1_500_000])
        offset = end + draw.choice([0, 0, 256])
        if offset + nbytes > MEMORY:
            return found
        found.append(Run(draw.choice(sources), offset, nbytes))
        end = offset + nbytes


def test_everyone_gets_everything(cluster: Cluster) -> None:
    cluster.open()
    for source in HOSTS:
        cluster.check([Run(source, 0, MEMORY)])
    for seed in range(3):
        cluster.check(scattered(HOSTS, seed))
    cluster.check([Run(host, host, 1) for host in HOSTS])
    cluster.check([])


def test_a_host_that_does_not_come_is_named(cluster: Cluster) -> None:
    cluster.epoch += 1
    answers = cluster.ask([0, 2], do="open", hosts=HOSTS, epoch=cluster.epoch)
    for host in (0, 2):
        assert f"host {host} waited {DEADLINE_S:g} s for hosts [1]" in str(answers[host]["error"])
        assert answers[host]["host"] == 1


def test_a_host_that_is_killed_in_the_middle_is_named_and_replaced(cluster: Cluster) -> None:
    fail_and_go_on(cluster, signal.SIGKILL, 1, scattered(HOSTS))
    cluster.processes[1].wait(10)
    cluster.processes[1] = cluster.start(1)
    cluster.hear([1])
    cluster.open()
    cluster.check(scattered(HOSTS))


@pytest.mark.parametrize("victim", [0, 2])
def test_a_host_that_hangs_in_the_middle_is_named_and_comes_back(cluster: Cluster, victim: int) -> None:
    fail_and_go_on(cluster, signal.SIGSTOP, victim, [Run(0, 0, MEMORY)])
    wake(cluster, victim)
    cluster.check(scattered(HOSTS))


def fail_and_go_on(cluster: Cluster, number: signal.Signals, victim: int, moved: Sequence[Run]) -> None:
    """A signal ends a transfer on all hosts, and the others can go on without the victim."""
    rest = [host for host in HOSTS if host != victim]
    idle = {host: answer["sockets"] for host, answer in cluster.ask(HOSTS, do="close").items()}
    cluster.open()
    order = {"runs": [[run.source, run.offset, run.nbytes] for run in moved]}
    cluster.tell(HOSTS, do="move for ever", nbytes=MEMORY, **order)
    assert all(answer["moving"] for answer in cluster.hear(HOSTS).values())
    os.kill(cluster.processes[victim].pid, number)
    answers = cluster.hear(rest)
    assert culprits({host: int(str(answer["host"])) for host, answer in answers.items()}) == {victim}
    for host, answer in answers.items():
        assert f"host {answer['host']} " in str(answer["error"])
        assert answer["sockets"] == idle[host], "the relay has let go of its connections"
    cluster.open(rest)
    cluster.check(scattered(rest), rest)


def wake(cluster: Cluster, victim: int) -> None:
    """A host that hung goes on, and is one of them again."""
    os.kill(cluster.processes[victim].pid, signal.SIGCONT)
    assert "error" in cluster.hear([victim])[victim], "it must not think that nothing has happened"
    cluster.open()


@pytest.mark.skipif(
    not netns.available() and not os.environ.get("CI"), reason="network namespaces need root and iproute2"
)
def test_hosts_with_networks_of_their_own() -> None:
    """As above, over veth; each byte crosses each link once; a cut cable is found too."""
    with netns.network(len(HOSTS)) as hosts, ExitStack() as stack:
        cluster = Cluster(stack, hosts)
        cluster.open()
        before = [host.sent_bytes() for host in hosts]
        cluster.check([Run(1, 0, MEMORY)])
        sent = [host.sent_bytes() - b for host, b in zip(hosts, before, strict=True)]
        assert MEMORY <= sent[1] < 1.2 * MEMORY, "the source sends the payload once"
        assert MEMORY <= sent[2] < 1.2 * MEMORY, "and the next host passes it on"
        assert sent[0] < 0.1 * MEMORY, "the last one sends nothing"
        fail_and_go_on(cluster, signal.SIGSTOP, 2, scattered(HOSTS))
        wake(cluster, 2)
        fail_and_go_on(cluster, signal.SIGKILL, 1, scattered(HOSTS))
        cluster.tell([0, 2], do="move for ever", nbytes=MEMORY, runs=[[0, 0, MEMORY]])
        cluster.hear([0, 2])
        hosts[2].disconnect()
        assert {host: answer["host"] for host, answer in cluster.hear([0, 2]).items()} == {0: 2, 2: 0}
