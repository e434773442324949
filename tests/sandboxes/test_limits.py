"""Every limit, tested on each backend: see `CASES` and `LIMIT_CASES` in conftest.py."""

from __future__ import annotations

import time

import pytest

from sandboxes.base import MIB, Limits

# A module's backend is made once.
pytestmark = pytest.mark.xdist_group("sandboxes")

#: Long enough for what must not take so long on a loaded machine.
AMPLE = 60.0


def test_real_time(lab):
    result = lab.exec("sleep", "1000", limits={"wall_seconds": 0.3})
    assert (result.ended, result.exit_code) == ("timed_out", -9)
    result = lab.exec("sh", "-c", "echo said; sleep 1000", timeout=1.0)
    assert (result.ended, result.text) == ("timed_out", "said\n")


def test_a_run_that_ignores_every_signal(lab):
    code = (
        "import signal, time\n"
        "for n in range(1, 65):\n"
        "    try: signal.signal(n, signal.SIG_IGN)\n"
        "    except (OSError, ValueError): pass\n"
        "time.sleep(1000)"
    )
    assert lab.python(code, timeout=1.0).ended == "timed_out"


def test_processor_time(lab):
    result = lab.python("while True: pass", limits={"cpu_seconds": 1, "wall_seconds": AMPLE})
    assert result.ended == "timed_out"
    assert result.duration < AMPLE


def test_memory_of_one_process(lab):
    code = "x = bytearray(10)\nwhile True: x += bytearray(1 << 24)"
    result = lab.python(code, limits={"memory_bytes": 128 * MIB, "wall_seconds": AMPLE})
    # A process that is told of its limit can end by itself.
    assert result.ended == "out_of_memory" or (result.exit_code == 1 and "MemoryError" in result.error_text)


def test_memory_of_the_whole_tree(lab):
    code = (
        "import os, time\n"
        "for _ in range(8):\n"
        "    if os.fork() == 0:\n"
        "        x = bytearray(40 << 20)\n"
        "        time.sleep(1000)\n"
        "os.wait()\n"
        "raise SystemExit(1)"
    )
    result = lab.python(code, limits={"memory_bytes": 128 * MIB, "wall_seconds": AMPLE})
    assert result.ended == "out_of_memory"


def test_the_sandbox_lives_on_after_it_ran_out_of_memory(lab):
    with lab.open({"memory_bytes": 128 * MIB, "wall_seconds": AMPLE}) as sandbox:
        code = "x = [bytearray(1 << 24) for _ in range(1000)]"
        assert not sandbox.run_python(code).ok
        assert sandbox.run_python("print(1)").text == "1\n"


@pytest.mark.parametrize("stream", [1, 2])
def test_output_is_counted_while_it_streams(lab, stream):
    limits = {"output_bytes": 100_000, "wall_seconds": AMPLE}
    began = time.monotonic()
    result = lab.exec("sh", "-c", f"head -c 200000000 /dev/zero >&{stream}; sleep 1000", limits=limits)
    assert result.ended == "output_limit"
    assert time.monotonic() - began < AMPLE
    assert (result.stdout, result.stderr)[stream - 1] == bytes(100_000)
    assert (result.stdout, result.stderr)[2 - stream] == b""


def test_output_of_exactly_the_limit_is_whole(lab):
    result = lab.exec("head", "-c", "100000", "/dev/zero", limits={"output_bytes": 100_000})
    assert result.ok
    assert len(result.stdout) == 100_000
    result = lab.exec("head", "-c", "100001", "/dev/zero", limits={"output_bytes": 100_000})
    assert result.ended == "output_limit"


def test_processes(lab):
    code = (
        "import os, time\n"
        "count = 0\n"
        "try:\n"
        "    while True:\n"
        "        if os.fork() == 0: time.sleep(1000)\n"
        "        count += 1\n"
        "except OSError: print(count)"
    )
    with lab.open({"pids": 20}) as sandbox:
        result = sandbox.run_python(code)
        assert result.ended == "exited"
        assert 10 <= int(result.text) <= 30
        assert sandbox.run_python("print(1)").text == "1\n"


def test_open_files(lab):
    code = "import os\nn = 0\ntry:\n    while True: os.dup(0); n += 1\nexcept OSError as e: print(n, e.errno)"
    count, errno = lab.python(code, limits={"open_files": 50}).text.split()
    assert (int(count) < 50, errno) == (True, "24")


def test_file_size(lab):
    result = lab.exec(
        "sh", "-c", "head -c 3000000 /dev/zero > big; wc -c < big", limits={"file_bytes": 1_000_000}
    )
    assert int(result.text) == 1_000_000


def test_disk_is_one_budget_for_all_places(lab):
    fill = (
        "for d in . /tmp /dev/shm; do head -c 6000000 /dev/zero > $d/x; done; cat x /tmp/x /dev/shm/x | wc -c"
    )
    result = lab.exec("sh", "-c", fill, limits={"disk_bytes": 8_000_000})
    assert 7_000_000 <= int(result.text) <= 8_100_000
    assert "No space left" in result.error_text


def test_number_of_files(lab):
    make = "while True: open(f'/tmp/{n}', 'w').close(); n += 1"
    code = f"n = 0\ntry:\n    {make}\nexcept OSError as e: print(n, e.errno)"
    count, errno = lab.python(code, limits={"inodes": 500, "wall_seconds": AMPLE}).text.split()
    assert (400 <= int(count) <= 500, errno) == (True, "28")


def test_limits_that_are_none(lab):
    for name in ("wall_seconds", "memory_bytes", "pids"):
        for value in (0, -1, float("inf"), float("nan")):
            with pytest.raises(ValueError, match=name):
                Limits(**{name: value})
