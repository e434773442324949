"""What every backend promises (`sandboxes.base`), tested on each: see `CASES` in conftest.py."""

from __future__ import annotations

import asyncio
import sys
import time

import pytest

from sandboxes.base import SandboxSpec
from sandboxes.errors import SandboxClosedError, SandboxError, SandboxFileError, SandboxUnsupportedError

# A module's backend is made once.
pytestmark = pytest.mark.xdist_group("sandboxes")

#: Long enough for what must not take so long on a loaded machine.
AMPLE = 60.0


# --------------------------------------------------------------------------------------------------- runs


def test_a_program_and_what_it_says(lab):
    result = lab.exec("sh", "-c", "cat; echo problem >&2; exit 3", stdin=b"in\xff\x00put")
    assert (result.exit_code, result.ended) == (3, "exited")
    assert (result.stdout, result.stderr) == (b"in\xff\x00put", b"problem\n")
    assert result.text == "in�\0put"
    assert 0 < result.duration < AMPLE
    assert not result.ok


def test_without_stdin_there_is_end_of_file(lab):
    result = lab.exec("cat")
    assert result.ok
    assert result.stdout == b""


@pytest.mark.parametrize(
    ("argv", "code"),
    [(("no-such-program",), 127), (("/no/such/program",), 127), (("/etc/passwd",), 126), (("/work",), 126)],
    ids=str,
)
def test_a_program_that_cannot_be_started(lab, argv, code):
    result = lab.exec(*argv)
    assert (result.exit_code, result.ended) == (code, "exited")
    assert argv[0].encode() in result.stderr + result.stdout


def test_a_folder_to_start_in_that_is_not_there(lab):
    result = lab.exec("true", cwd="/nowhere")
    assert (result.exit_code, result.ended) == (126, "exited")


def test_words_reach_the_program_as_they_are(lab):
    words = ["", "a b", "$HOME", "'\"\\", "é\n", "*", "-n"]
    result = lab.exec("sh", "-c", 'printf "%s\\0" "$@"', "sh", *words)
    assert result.stdout.decode().split("\0")[:-1] == words


def test_environment_and_folder(lab):
    with lab.open(env={"COLOUR": "blue", "SHAPE": "round"}) as sandbox:
        result = sandbox.exec(
            ["sh", "-c", "echo $COLOUR $SHAPE $HOME $PWD"], env={"SHAPE": "flat"}, cwd="/tmp"
        )
        assert result.text == f"blue flat {sandbox.home} /tmp\n"
        assert sandbox.exec(["pwd"]).text == f"{sandbox.home}\n"
        sandbox.write_file("inner/file", b"")
        assert sandbox.exec(["ls"], cwd="inner").text == "file\n"


def test_nothing_of_the_drivers_environment_is_passed_on(lab, monkeypatch):
    monkeypatch.setenv("SECRET_TOKEN", "hunter2")
    result = lab.exec("env")
    assert "SECRET_TOKEN" not in result.text
    assert {line.partition("=")[0] for line in result.text.splitlines()} <= {
        *("PATH", "HOME", "LANG", "TMPDIR", "PWD", "HOSTNAME", "SHLVL", "_", "OLDPWD"),
    }


@pytest.mark.parametrize("argv", [[], ["a\0b"], ["sh", "\0"], ["\ud800"]], ids=ascii)
def test_what_no_program_can_be_called_with(lab, argv):
    with lab.open() as sandbox, pytest.raises(ValueError, match=r"empty|NUL|encode"):
        sandbox.exec(argv)


def test_a_user_that_is_not_there(lab):
    with lab.open() as sandbox, pytest.raises(SandboxUnsupportedError, match="nobody-knows"):
        sandbox.exec(["true"], user="nobody-knows")


def test_a_crash_is_the_programs_own_end(lab):
    result = lab.exec("sh", "-c", "kill -SEGV $$")
    assert (result.exit_code, result.ended) == (-11, "exited")


def test_many_runs_at_once_in_one_sandbox(lab):
    async def many():
        sandbox = await lab.backend.open(SandboxSpec())
        runs = [sandbox.exec(["sh", "-c", f"echo {number}; exit {number}"]) for number in range(12)]
        results = await asyncio.gather(*runs)
        await sandbox.close()
        return results

    results = lab.run(many())
    assert [each.exit_code for each in results] == list(range(12))
    assert [each.text for each in results] == [f"{number}\n" for number in range(12)]


# --------------------------------------------------------------------------------------------------- Python


def test_python_source(lab):
    result = lab.python("import sys\nprint(sys.argv[1:], input(), __name__)", stdin=b"x\n", argv=["1", "2"])
    assert result.text == "['1', '2'] x __main__\n"
    assert result.ok


@pytest.mark.parametrize(
    ("code", "status", "said"),
    [
        ("def f(:", 1, "SyntaxError"),
        ("1/0", 1, "ZeroDivisionError"),
        ("import sys; sys.exit(5)", 5, ""),
        ("raise SystemExit", 0, ""),
        ("raise SystemExit('last words')", 1, "last words"),
        ("exit(7)", 7, ""),
        ("import os; os._exit(9)", 9, ""),
        ("import os; os.abort()", -6, ""),
        ("def f(): return f()\nf()", 1, "RecursionError"),
        ("import nothing_of_that_name", 1, "ModuleNotFoundError"),
        ("raise KeyboardInterrupt", None, "KeyboardInterrupt"),
        (
            "import threading, time; threading.Timer(0.1, print, ['late']).start()",
            0,
            "",
        ),
        ("import atexit; atexit.register(lambda: print('at the end'))", 0, ""),
        ("\0", 1, "null"),
        ("", 0, ""),
    ],
    ids=lambda value: value[:30] if isinstance(value, str) else None,
)
def test_how_python_source_can_end(lab, code, status, said):
    result = lab.python(code)
    assert result.ended == "exited"
    assert said in result.error_text
    if status is not None:
        assert result.exit_code == status
    assert ("late" in code) == ("late" in result.text)
    assert ("at the end" in code) == ("at the end" in result.text)


def test_source_larger_than_any_packet(lab):
    result = lab.python(f"x = '{'a' * 2_000_000}'\nprint(len(x))", stdin=b"b" * 1_000_000)
    assert result.text == "2000000\n"


def test_two_runs_of_python_share_no_variables(lab):
    with lab.open() as sandbox:
        sandbox.run_python(
            "import builtins, sys, os\nbuiltins.len = None\nsys.path.clear()\nos.environ['A'] = '1'"
        )
        result = sandbox.run_python("import json, os\nprint(len([1]), os.environ.get('A'), dir().count('x'))")
    assert result.text == "1 None 0\n"


def test_modules_can_be_imported_beforehand(lab):
    with lab.open(preload=("json",)) as sandbox:
        assert sandbox.run_python("import sys; print('json' in sys.modules)").text == "True\n"


# --------------------------------------------------------------------------------------------------- ends


LEAVE = """
import os
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        {}
    os._exit(0)
os.wait()
"""


def test_what_forked_away_ends_with_the_run(lab):
    stay = "import time\n        while True: open('/tmp/alive', 'w').close(); time.sleep(0.01)"
    with lab.open() as sandbox:
        assert sandbox.run_python(LEAVE.format(stay)).ok
        sandbox.exec(["rm", "-f", "/tmp/alive"])
        time.sleep(0.1)  # had it lived, it would have written the file anew
        assert not sandbox.exec(["ls", "/tmp/alive"]).ok


def test_a_run_is_over_although_its_children_hold_the_pipes(lab):
    result = lab.exec("sh", "-c", "sleep 1000 & echo done", timeout=AMPLE)
    assert (result.text, result.ended) == ("done\n", "exited")
    assert result.duration < AMPLE


def test_a_run_that_kills_everything_it_can(lab):
    with lab.open() as sandbox:
        result = sandbox.exec(["sh", "-c", "kill -9 -1; kill -9 1; echo alive"])
        assert result.ended in ("exited", "killed")
        assert sandbox.exec(["echo", "still here"]).text == "still here\n"


def test_cancelling_ends_the_run(lab):
    async def cancelled():
        sandbox = await lab.backend.open(SandboxSpec())
        run = asyncio.ensure_future(sandbox.exec(["sh", "-c", "while :; do touch alive; sleep 0.01; done"]))
        while not (await sandbox.exec(["ls"])).text:
            await asyncio.sleep(0.01)
        run.cancel()
        with pytest.raises(asyncio.CancelledError):
            await run
        deadline = time.monotonic() + AMPLE
        while time.monotonic() < deadline:  # until it writes the file no more
            await sandbox.exec(["rm", "-f", "alive"])
            await asyncio.sleep(0.1)
            if not (await sandbox.exec(["ls"])).text:
                break
        else:
            pytest.fail("it still runs")
        await sandbox.close()

    lab.run(cancelled())


def test_a_closed_sandbox(lab):
    with lab.open() as sandbox:
        assert sandbox.is_alive()
    assert not sandbox.is_alive()
    sandbox.close()
    for call in (
        lambda: sandbox.exec(["true"]),
        lambda: sandbox.run_python("1"),
        lambda: sandbox.read_file("x"),
        lambda: sandbox.write_file("x", b""),
        lambda: sandbox.shell(),
    ):
        with pytest.raises(SandboxClosedError, match="closed"):
            call()


def test_closing_ends_what_runs(lab):
    async def closed():
        sandbox = await lab.backend.open(SandboxSpec())
        run = asyncio.ensure_future(sandbox.exec(["sh", "-c", "echo begun > begun; sleep 1000"]))
        while not (await sandbox.exec(["ls"])).text:
            await asyncio.sleep(0.01)
        await sandbox.close()
        return await run

    assert lab.run(closed()).ended == "killed"


# --------------------------------------------------------------------------------------------------- files


def test_files_go_in_and_come_out(lab):
    content = bytes(range(256)) * 5000
    with lab.open() as sandbox:
        sandbox.write_file("deep/er/data.bin", content)
        sandbox.write_file("/tmp/empty", b"")
        sandbox.write_file("run.sh", b"#!/bin/sh\necho ran", executable=True)
        assert sandbox.read_file("deep/er/data.bin") == content
        assert sandbox.read_file(f"{sandbox.home}/deep/../deep/er/data.bin") == content
        assert sandbox.read_file("/tmp/empty") == b""
        assert sandbox.exec(["./run.sh"]).text == "ran\n"
        sandbox.write_file("run.sh", b"other")
        assert sandbox.read_file("run.sh") == b"other"
        sandbox.upload({"a": b"1", "b/c": b"2"})
        assert sandbox.exec(["cat", "a", "b/c"]).text == "12"


@pytest.mark.parametrize(
    ("prepare", "path", "problem"),
    [
        ("true", "nothing", "missing"),
        ("true", "no/folder/file", "missing"),
        ("mkdir d", "d", "not_a_file"),
        ("mkfifo f", "f", "not_a_file"),
        ("touch f", "f/inner", "not_a_file"),
        ("ln -s /etc/passwd l", "l", "symlink"),
        ("ln -s nowhere l", "l", "symlink"),
        ("ln -s l l", "l", "symlink"),
        ("ln -s /etc e", "e/passwd", "symlink"),
        ("mkdir d; ln -s d e; touch d/x", "e/x", "symlink"),
        ("touch f; chmod 0 f", "f", "denied"),
        ("head -c 2000000 /dev/zero > f", "f", "too_large"),
        ("true", "/dev/zero", "not_a_file"),
        ("true", "/", "not_a_file"),
        ("true", "n" * 300, "missing"),
    ],
    ids=lambda value: value[:20],
)
def test_files_that_cannot_be_read(lab, prepare, path, problem):
    with lab.open({"file_bytes": 4_000_000}) as sandbox:
        assert sandbox.exec(["sh", "-c", prepare]).ok
        with pytest.raises(SandboxFileError) as raised:
            sandbox.read_file(path, limit=1_000_000)
        assert (raised.value.problem, raised.value.path) == (problem, path)


@pytest.mark.parametrize(
    ("prepare", "path", "problem"),
    [
        ("ln -s /tmp/target l", "l", "symlink"),
        ("ln -s /tmp l", "l/x", "symlink"),
        ("mkdir d", "d", "not_a_file"),
        ("mkfifo f", "f", "not_a_file"),
        ("touch f", "f/inner", "not_a_file"),
        ("mkdir d; chmod 0500 d", "d/x", "denied"),
        ("true", "/etc/passwd", "denied"),
        ("true", "/usr/bin/new", "denied"),
        ("head -c 3900000 /dev/zero > f", "g", "no_space"),
    ],
    ids=lambda value: value[:20],
)
def test_files_that_cannot_be_written(lab, prepare, path, problem):
    with lab.open({"disk_bytes": 4_096_000}) as sandbox:
        assert sandbox.exec(["sh", "-c", prepare]).ok
        with pytest.raises(SandboxFileError) as raised:
            sandbox.write_file(path, b"x" * 500_000)
        assert raised.value.problem == problem
        assert not sandbox.exec(["ls", "/tmp/target", "/tmp/x"]).ok
        assert sandbox.exec(["sh", "-c", "ls -A | grep new"]).text == ""


def test_a_swapped_symlink_leads_nowhere(lab):
    """While something swaps a file and a link to a secret, a reader gets the file or a refusal."""

    async def race():
        sandbox = await lab.backend.open(SandboxSpec())
        await sandbox.write_file("/tmp/secret", b"secret")
        swap = (
            "mkdir d; echo plain > d/f; ln -s /tmp/secret l; ln -s /tmp t; echo secret > /tmp/f\n"
            "while :; do\n"
            "    cp -P l d/n; mv -T d/n d/f; echo plain > d/m; mv -T d/m d/f\n"
            "    mv -T d e; mv -T t d; mv -T d t; mv -T e d\n"
            "done"
        )
        swapping = asyncio.ensure_future(sandbox.exec(["sh", "-c", swap], timeout=AMPLE))
        seen = {}
        for _ in range(60):
            try:
                outcome = (await sandbox.read_file("d/f")).decode().strip()
            except SandboxFileError as error:
                outcome = error.problem
            seen[outcome] = seen.get(outcome, 0) + 1
        swapping.cancel()
        await sandbox.close()
        return seen

    seen = lab.run(race())
    assert set(seen) <= {"plain", "symlink", "missing", ""}
    assert "symlink" in seen


def test_a_file_that_never_ends_is_not_read_forever(lab):
    async def growing():
        sandbox = await lab.backend.open(SandboxSpec())
        grow = asyncio.ensure_future(sandbox.exec(["sh", "-c", "while :; do echo line >> log; done"]))
        while not (await sandbox.exec(["ls"])).text:
            await asyncio.sleep(0.01)
        content = await sandbox.read_file("log")
        grow.cancel()
        await sandbox.close()
        return content

    assert set(lab.run(growing()).splitlines()) <= {b"line", b"lin", b"li", b"l"}


def test_host_files_that_are_lent_are_read_only(lab):
    with lab.open(read_only={"/data": "/usr/share/doc"}) as sandbox:
        assert sandbox.exec(["sh", "-c", "ls /data | head -1"]).text
        assert not sandbox.exec(["touch", "/data/new"]).ok


def test_a_snapshot_brings_the_files_back(lab):
    with lab.open() as sandbox:
        sandbox.exec(
            ["sh", "-c", "echo one > a; mkdir d; echo two > d/b; ln -s a l; chmod 700 d/b; echo t > /tmp/t"]
        )
        snapshot = sandbox.snapshot()
        sandbox.exec(["sh", "-c", "echo changed > a; rm -r d; echo new > n; rm /tmp/t; mkdir -m 0 shut"])
        sandbox.restore(snapshot)
        listing = "cat a l d/b /tmp/t; ls; stat -c %a d/b"
        assert sandbox.exec(["sh", "-c", listing]).text == "one\none\ntwo\nt\na\nd\nl\n700\n"
    with lab.open() as other:
        other.restore(snapshot)
        assert other.exec(["sh", "-c", listing]).text == "one\none\ntwo\nt\na\nd\nl\n700\n"
        with pytest.raises(SandboxError, match="not restored"):
            other.restore(b"no snapshot")


# --------------------------------------------------------------------------------------------------- shell


def test_a_shell_keeps_its_state(lab):
    with lab.open() as sandbox:
        shell = type(sandbox)(lab, sandbox.shell(env={"V": "1"}))
        assert shell.run("cd /tmp && export W=2 && f() { echo f$1; }").ok
        assert shell.run("pwd; echo $V$W; f 3").text == "/tmp\n12\nf3\n"
        assert shell.run("echo out; echo err >&2").text == "out\nerr\n"
        assert shell.run("false").exit_code == 1
        assert shell.run("(exit 42)").exit_code == 42
        assert shell.run("cat <<'E'\n$x \\ \"'\nE").text == "$x \\ \"'\n"
        assert shell.run("cat").text == ""  # there is nothing to read, rather than the next command
        assert shell.run("echo $((").exit_code != 0
        assert shell.run("python3 -c 'print(1)'").text == "1\n"
        assert shell.run("printf 'no newline'").text == "no newline"
        assert shell.run("head -c 3 /dev/zero").stdout == b"\0\0\0"
        assert shell.run(f"echo {'x' * 300_000} | wc -c").text == "300001\n"
        shell.close()
        assert not shell.is_alive()
        with pytest.raises(SandboxClosedError):
            shell.run("true")
        shell.close()


def test_background_jobs_live_as_long_as_their_shell(lab):
    with lab.open() as sandbox:
        shell = type(sandbox)(lab, sandbox.shell())
        shell.run("(while :; do touch /tmp/alive; sleep 0.01; done) &")
        shell.run("rm -f /tmp/alive; while ! test -e /tmp/alive; do sleep 0.01; done", timeout=AMPLE)
        shell.close()
        sandbox.exec(["rm", "-f", "/tmp/alive"])
        time.sleep(0.1)  # had it lived, it would have written the file anew
        assert not sandbox.exec(["ls", "/tmp/alive"]).ok


def test_a_command_that_takes_too_long_leaves_the_shell(lab):
    with lab.open() as sandbox:
        shell = type(sandbox)(lab, sandbox.shell())
        shell.run("X=kept")
        result = shell.run("echo begun; sleep 1000", timeout=0.5)
        assert result.ended == "timed_out"
        assert result.text.startswith("begun\n")  # bash then says what it thinks of it
        assert shell.run("echo $X").text == "kept\n"


def test_a_shell_that_hangs_itself_or_leaves(lab):
    with lab.open() as sandbox:
        shell = type(sandbox)(lab, sandbox.shell())
        assert shell.run("while :; do :; done", timeout=0.5).ended == "timed_out"
        assert not shell.is_alive()
        shell = type(sandbox)(lab, sandbox.shell())
        result = shell.run("echo bye; exit 4")
        assert (result.exit_code, result.text, result.ended) == (4, "bye\n", "exited")
        assert not shell.is_alive()
        assert sandbox.exec(["echo", "here"]).text == "here\n"


def test_a_shell_that_says_too_much(lab):
    with lab.open({"output_bytes": 10_000}) as sandbox:
        shell = type(sandbox)(lab, sandbox.shell())
        result = shell.run("yes")
        assert result.ended == "output_limit"
        assert len(result.stdout) == 10_000
        if shell.is_alive():
            assert shell.run("echo after").text == "after\n"


# ---------------------------------------------------------------------------------------------------
# ephemeral


def test_nothing_survives_a_run_in_an_ephemeral_sandbox(lab):
    leave = (
        "mkdir -p a/b/c .hidden; touch a/b/c/f /tmp/t /dev/shm/s; ln -s / a/root; mkdir -m 0 shut; mkfifo p; "
        "chmod 500 a/b; chmod 0 . ; (setsid sleep 1000 &)"
    )
    look = "ls -A . /tmp /dev/shm; ps ax 2>/dev/null | grep -c 'sleep 100[0]'; stat -c %a ."
    with lab.open(ephemeral=True) as sandbox:
        fresh = sandbox.exec(["sh", "-c", look]).text
        assert sandbox.exec(["sh", "-c", leave]).ok
        assert sandbox.exec(["sh", "-c", look]).text == fresh
        sandbox.write_file("input", b"for one run")
        assert sandbox.exec(["cat", "input"]).text == "for one run"
        assert not sandbox.exec(["cat", "input"]).ok


def test_a_deep_tree_is_removed_as_well(lab):
    code = "import os\nfor n in range(3000):\n    os.mkdir('d'); open('f', 'w').close(); os.chdir('d')"
    with lab.open(ephemeral=True) as sandbox:
        assert sandbox.run_python(code).ok
        assert sandbox.exec(["ls", "-A"]).text == ""


def test_runs_in_an_ephemeral_sandbox_take_turns(lab):
    async def both():
        sandbox = await lab.backend.open(SandboxSpec(ephemeral=True))
        code = (
            "import os, time\nassert not os.listdir()\nopen('mine', 'w').close()\n"
            "time.sleep(0.05)\nprint(os.listdir())"
        )
        results = await asyncio.gather(*(sandbox.run_python(code) for _ in range(4)))
        with pytest.raises(SandboxUnsupportedError, match="ephemeral"):
            await sandbox.shell()
        await sandbox.close()
        return results

    assert {result.text for result in lab.run(both())} == {"['mine']\n"}


def test_a_cancelled_run_does_not_spoil_the_next_in_an_ephemeral_sandbox(lab):
    async def cancel_and_go_on():
        sandbox = await lab.backend.open(SandboxSpec(ephemeral=True))
        results = []
        for _ in range(5):
            run = asyncio.ensure_future(sandbox.exec(["sh", "-c", "touch left; sleep 1000"]))
            await asyncio.sleep(0.02)
            run.cancel()
            results.append(await sandbox.exec(["ls", "-A"]))
        await sandbox.close()
        return results

    for result in lab.run(cancel_and_go_on()):
        assert (result.ended, result.text) == ("exited", "")


# --------------------------------------------------------------------------------------------------- many


def test_sandboxes_know_nothing_of_each_other(lab):
    with lab.open() as one, lab.open() as other:
        one.write_file("/tmp/x", b"one")
        other.write_file("/tmp/x", b"other")
        assert one.read_file("/tmp/x") == b"one"
        assert one.id != other.id
        assert sys.getsizeof(one.exec(["ps", "ax"]).stdout) < 2000
