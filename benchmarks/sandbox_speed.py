"""What a sandbox costs beside a plain interpreter, in turns in one run: a cold start, a snippet, many at
once.

    make bench-sandbox                          plain python3, bare bubblewrap, our sandboxes, docker if it
    runs make bench-sandbox ARGS="--open 500"        and so many sandboxes open at once
"""

from __future__ import annotations

import argparse
import asyncio
import shutil
import statistics
import subprocess
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

from sandboxes.base import Backend, SandboxSpec
from sandboxes.bubblewrap import command
from sandboxes.bubblewrap.backend import BubblewrapBackend
from sandboxes.bubblewrap.keeper import descendants

SNIPPET = "print(sum(range(10)))"
ROUNDS, SNIPPETS, CONTAINERS = 60, 600, 10


def milliseconds(times: list[float]) -> str:
    ordered = sorted(times)
    p50, p95 = statistics.median(ordered), ordered[int(len(ordered) * 0.95)]
    return f"p50 {p50 * 1e3:7.2f} ms   p95 {p95 * 1e3:7.2f} ms"


async def timed(times: list[float], call: Callable[[], Awaitable[object]]) -> None:
    began = time.perf_counter()
    await call()
    times.append(time.perf_counter() - began)


async def plain(argv: list[str]) -> None:
    done = await asyncio.to_thread(subprocess.run, argv, capture_output=True, check=True)
    assert done.stdout == b"45\n", done


async def starts(backend: Backend, python: str) -> None:
    """Cold starts, in turns."""
    bare = ["bwrap", "--unshare-all", "--die-with-parent", "--new-session", "--clearenv", "--cap-drop", "ALL"]
    bare += [*command.host_system(python), "--proc", "/proc", "--dev", "/dev", "--tmpfs", "/tmp"]
    interpreter: list[float] = []
    namespaces: list[float] = []
    opened: list[float] = []
    ran: list[float] = []

    async def ours() -> None:
        began = time.perf_counter()
        sandbox = await backend.open(SandboxSpec())
        opened.append(time.perf_counter() - began)
        result = await sandbox.run_python(SNIPPET)
        ran.append(time.perf_counter() - began)
        assert result.text == "45\n", result
        await sandbox.close()

    await ours()
    opened.clear()
    ran.clear()
    for _ in range(ROUNDS):
        await timed(interpreter, lambda: plain([python, "-I", "-c", SNIPPET]))
        await timed(namespaces, lambda: plain([*bare, python, "-I", "-c", SNIPPET]))
        await ours()
    base = statistics.median(interpreter)
    print(f"cold starts, {ROUNDS} rounds in turn")
    for name, times in {
        "python3 -I": interpreter,
        "bwrap python3 -I": namespaces,
        "sandbox, ready to run": opened,
        "sandbox, first snippet done": ran,
    }.items():
        print(f"  {name:28} {milliseconds(times)}   {statistics.median(times) / base:5.2f}x")


async def snippets(backend: Backend) -> float:
    """Snippets a second, one after the other and in two sandboxes at once."""
    times: list[float] = []
    spec = SandboxSpec(ephemeral=True)
    pair = [await backend.open(spec) for _ in range(2)]
    for sandbox in pair:  # each has imported what it imports when idle
        await sandbox.run_python(SNIPPET)
    await asyncio.sleep(0.5)
    for _ in range(SNIPPETS):
        await timed(times, lambda: pair[0].run_python(SNIPPET))

    async def work(number: int) -> None:
        for _ in range(SNIPPETS):
            result = await pair[number].run_python(SNIPPET)
            assert result.text == "45\n", result

    began = time.perf_counter()
    await asyncio.gather(work(0), work(1))
    rate = 2 * SNIPPETS / (time.perf_counter() - began)
    for sandbox in pair:
        await sandbox.close()
    print(f"snippets\n  one after the other          {milliseconds(times)}")
    print(f"  in two sandboxes at once     {rate:.0f} /s")
    return rate


def containers(rate: float, image: str) -> None:
    """`docker run` for each snippet."""
    argv = ["docker", "run", "--rm", "--network", "none", image, "python3", "-I", "-c", SNIPPET]
    began = time.perf_counter()
    for _ in range(CONTAINERS):
        subprocess.run(argv, check=True, capture_output=True)
    docker = CONTAINERS / (time.perf_counter() - began)
    print(f"  docker run for each          {docker:.1f} /s   a sandbox does {rate / docker:.0f}x")


async def crowd(backend: Backend, count: int) -> None:
    began = time.perf_counter()
    sandboxes = await asyncio.gather(*(backend.open(SandboxSpec()) for _ in range(count)))
    opened = time.perf_counter() - began
    results = await asyncio.gather(*(each.run_python(SNIPPET, timeout=120) for each in sandboxes))
    assert all(result.text == "45\n" for result in results)
    ran = time.perf_counter() - began - opened
    assert isinstance(backend, BubblewrapBackend)
    assert backend._keeper is not None
    processes = descendants(backend._keeper._process.pid)
    private = sum(memory(pid) for pid in processes) / count
    began = time.perf_counter()
    await asyncio.gather(*(each.close() for each in sandboxes))
    closed = time.perf_counter() - began
    print(
        f"{count} sandboxes at once: opened in {opened:.1f} s, "
        f"a snippet in each {ran:.1f} s, closed {closed:.1f} s"
    )
    print(f"  {private:.1f} MiB of memory each, shared pages counted in shares")


def memory(pid: int) -> float:
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("Pss:")) / 1024


async def measure(arguments: argparse.Namespace) -> None:
    backend = BubblewrapBackend()
    python = command.find_python(backend._uid)
    await starts(backend, python)
    rate = await snippets(backend)
    if arguments.image and shutil.which("docker"):
        containers(rate, arguments.image)
    if arguments.open:
        await crowd(backend, arguments.open)
    await backend.close()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--open", type=int, default=0, help="sandboxes to open at once")
    parser.add_argument("--image", default="", help="an image with python3, for `docker run` beside it")
    asyncio.run(measure(parser.parse_args()))


if __name__ == "__main__":
    main()
