"""Cheats against the code judge, each scored 0, beside a right answer that is scored 1 by the same tests."""

from __future__ import annotations

import asyncio
import textwrap

import pytest

from rubrics.code import AssertTests, CallCase, CodeJudge, FunctionTests, Outcome, ProgramCase, ProgramTests
from rubrics.code.values import encode

# All cheats are judged at once, by one process of the tests.
pytestmark = pytest.mark.xdist_group("code cheats")

FUNCTION = FunctionTests(
    "f", [CallCase([2, 3], 5), CallCase([10, -4], 6), CallCase([0, 0], 0)], tolerance=1e-9, seconds=1.0
)
ASSERTS = AssertTests(
    "def check(candidate):\n"
    "    for a in range(4):\n"
    "        assert candidate(a, 3) == a + 3\n"
    "    assert abs(candidate(1.5, 1.5) - 3) < 1e-6\n"
    "    assert candidate(1, 2) != 4\n",
    "f",
    reference="def f(a, b):\n    return a + b\n",
    seconds=1.0,
)
PROGRAM = ProgramTests(
    [ProgramCase("2 3\n", "5\n"), ProgramCase("10 -4\n", "6\n")], tolerance=1e-9, seconds=1.0
)
RIGHT = {
    "function": (FUNCTION, "def f(a, b):\n    return a + b\n"),
    "asserts": (ASSERTS, "def f(a, b):\n    return a + b\n"),
    "program": (PROGRAM, "a, b = map(int, input().split())\nprint(a + b)\n"),
}

ANYTHING = """
class Anything(int):
    def __eq__(self, other): return True
    def __ne__(self, other): return True
    def __lt__(self, other): return True
    def __abs__(self): return self
    def __sub__(self, other): return self
    def __hash__(self): return 0
"""

#: Against functions, whose results are compared here, and against tests that are code.
CALLED = {
    "nothing": "",
    "pass": "def f(a, b):\n    pass",
    "not Python": "def f(a, b:\n    return a +",
    "null bytes": "def f(a, b):\n    return a\x00 + b",
    "exits with 0 when it is loaded": "import os\nos._exit(0)",
    "exits with 0 when it is called": "def f(a, b):\n    import os\n    os._exit(0)",
    "SystemExit when it is called": "def f(a, b):\n    raise SystemExit(0)",
    "is equal to everything": f"{ANYTHING}\ndef f(a, b):\n    return Anything()",
    "a class that is equal to everything": "class Meta(type):\n    def __eq__(self, other): return True\n"
    "    __hash__ = None\nclass f(metaclass=Meta):\n    def __init__(self, a, b): pass\n"
    "    def __eq__(self, other): return True",
    "patched builtins": "import builtins\nbuiltins.abs = lambda x: 0\nbuiltins.AssertionError = KeyError\n"
    "builtins.len = builtins.isinstance = lambda *a: 1\ndef f(a, b):\n    return -99",
    "patched json": "import json\nreal = json.dumps\njson.dumps = lambda *a, **k: real(['v', True])\n"
    "def f(a, b):\n    return None",
    "patched comparison in the harness": "import sys\nvalues = sys.modules['rubrics.code.values']\n"
    "values.same = lambda *a, **k: True\ndef f(a, b):\n    return None",
    "patched encoder": "import sys\nsys.modules['rubrics.code.candidate'].encode = lambda *a: True\n"
    "def f(a, b):\n    return None",
    "printed answers": "print('[\"t\"]')\nprint('[\"v\", true]\\n' * 9)\nimport os\nos._exit(0)",
    "words that harnesses look for": "print('OK\\nPASSED\\n1 passed in 0.01s\\nall tests passed')\n"
    "import os\nos._exit(0)",
    "answers written to every descriptor": "import os\nfor n in range(3, 64):\n    try:\n"
    "        os.write(n, b'[\"t\"]\\n' + b'[\"v\",true]\\n' * 9)\n    except OSError:\n        pass\n"
    "os._exit(0)",
    "a verdict written to every descriptor": "import os\nfor n in range(1, 64):\n    try:\n"
    '        os.write(n, b\'[{"name": '
    '"check", "status": "passed", "detail": "", "asked": []}]\')\n    except OSError:\n        pass\n'
    "os._exit(0)",
    "looks for the tests in its frames": """
        import gc, sys
        def f(a, b):
            frame = sys._getframe()
            while frame:
                for value in [*frame.f_locals.values(), *frame.f_globals.values()]:
                    if isinstance(value, dict) and "expected" in value:
                        return value["expected"]
                frame = frame.f_back
            for thing in gc.get_objects():
                if isinstance(thing, dict) and "expected" in thing:
                    return thing["expected"]
    """,
    "looks for the tests on the disk": """
        import pathlib
        def f(a, b):
            for folder in ("/tmp", "/home", "/root", "/work", "/proc/self", "/proc/1", "."):
                for path in list(pathlib.Path(folder).glob("*"))[:200]:
                    try:
                        text = path.read_bytes()
                    except OSError:
                        continue
                    if b"assert candidate" in text:
                        return a + b
            return None
    """,
    "sleeps": "import time\ndef f(a, b):\n    time.sleep(1000)\n    return a + b",
    "computes without end": "def f(a, b):\n    while True: pass",
    "ignores signals and computes": "import signal\nsignal.signal(signal.SIGXCPU, signal.SIG_IGN)\n"
    "def f(a, b):\n    while True: pass",
    "nan": "def f(a, b):\n    return float('nan')",
    "infinity": "def f(a, b):\n    return float('inf')",
    "minus infinity": "def f(a, b):\n    return float('-inf')",
    "a number that is too large for JSON": "def f(a, b):\n    return 10 ** 10000",
    "a text of the number": "def f(a, b):\n    return str(a + b)",
    "too much": "def f(a, b):\n    return [0] * 10_000_000",
    "deep": "def f(a, b):\n    x = []\n    for _ in range(100000): x = [x]\n    return x",
    "a list that holds itself": "def f(a, b):\n    x = []\n    x.append(x)\n    return x",
    "forks and leaves": "import os\nif os.fork(): os._exit(0)\ndef f(a, b):\n    return a + b + 1",
    "forks, and the child answers": "import os\ndef f(a, b):\n    if os.fork(): os._exit(0)\n    return 0",
    "a thread that ends the process": "import threading, os\nthreading.Timer(0, os._exit, [0]).start()\n"
    "def f(a, b):\n    import time\n    time.sleep(1)",
    "kills its parent": "import os, signal\nos.kill(os.getppid(), signal.SIGKILL)\ndef f(a, b):\n"
    "    return 0",
    "kills everybody": "import os, signal\ntry:\n    os.kill(-1, signal.SIGKILL)\nexcept OSError: pass\n"
    "def f(a, b):\n    return 0",
    "kills itself": "import os, signal\nos.kill(os.getpid(), signal.SIGKILL)",
    "crashes": "import ctypes\nctypes.string_at(0)",
    "raises what asserts raise": "def f(a, b):\n    raise AssertionError",
    "raises an error whose text raises": "class E(Exception):\n    def __str__(self): raise SystemExit(0)\n"
    "def f(a, b):\n    raise E",
    "a flood": "import sys\nwhile True: sys.stdout.write('x' * 100000); sys.stderr.write('x' * 100000)",
    "writes a file of results": "open('results.json', 'w').write('{\"passed\": true}')\n"
    "open('reward.txt', 'w').write('1')\ndef f(a, b):\n    return None",
    "registers its exit": "import atexit, os\natexit.register(os._exit, 0)\ndef f(a, b):\n    return None",
    "deletes itself": "import sys\ndel sys.modules['solution']\ndef f(a, b):\n    del globals()['f']\n"
    "    return None",
}
PRINTED = {
    "nothing": "",
    "exits with 0": "import os\nos._exit(0)",
    "one answer for all": "print(5)",
    "all answers": "print(5)\nprint(6)",
    "nan": "print('nan')",
    "infinity": "print('inf')",
    "a number that only looks like one": "a, b = map(int, input().split())\nprint(f'0_{a + b}')",
    "the right answer, then a crash": "a, b = map(int, input().split())\nprint(a + b)\nraise KeyError",
    "the right answer, then a failure": "a, b = map(int, input().split())\nprint(a + b)\nexit(3)",
    "the right answer, then a flood": "a, b = map(int, input().split())\nprint(a + b)\n"
    "while True: print(' ' * 100000)",
    "sleeps": "import time\ntime.sleep(1000)",
    "forks, and both answer": "import os\na, b = map(int, input().split())\nchild = os.fork()\n"
    "print(a + b, flush=True)\nif child: os.wait()",
    "bytes that are no text": "import sys\nsys.stdout.buffer.write(b'\\xff5')",
    "what the first case said, kept": "import pathlib\np = pathlib.Path('/tmp/kept')\n"
    "print(p.read_text() if p.exists() else 5)\np.write_text('6')",
}


@pytest.mark.parametrize("kind", RIGHT)
def test_a_right_answer_is_scored(kind: str, judge) -> None:
    tests, code = RIGHT[kind]
    outcome = judge(tests, code)
    assert outcome.solved, outcome


TABLE = [
    *(("function", name, code) for name, code in CALLED.items()),
    *(("asserts", name, code) for name, code in CALLED.items()),
    *(("program", name, code) for name, code in PRINTED.items()),
]


@pytest.fixture(scope="module")
def outcomes() -> dict[tuple[str, str], Outcome]:
    """Of the whole table, judged at once: cheats that wait do so together."""

    async def judge_all() -> dict[tuple[str, str], Outcome]:
        judge = CodeJudge(parallel=6)
        try:
            jobs = {
                (kind, name): judge.judge(RIGHT[kind][0], textwrap.dedent(code)) for kind, name, code in TABLE
            }
            return dict(zip(jobs, await asyncio.gather(*jobs.values()), strict=True))
        finally:
            await judge.close()

    return asyncio.run(judge_all())


@pytest.mark.parametrize(("kind", "cheat"), [(kind, name) for kind, name, _ in TABLE])
def test_a_cheat_is_scored_0(kind: str, cheat: str, outcomes) -> None:
    outcome = outcomes[kind, cheat]
    assert not outcome.solved
    assert outcome.detail


def test_the_next_question_does_not_give_away_an_answer(judge) -> None:
    """In a test of a round trip, what is decoded is what `encode` had to say."""
    tests = AssertTests(
        "from solution import encode, decode\ndef test_there_and_back():\n"
        "    assert encode('abc') == 'bcd'\n    assert decode(encode('hello')) == 'hello'\n",
        reference="def encode(text):\n    return ''.join(chr(ord(c) + 1) for c in text)\n"
        "def decode(text):\n    return ''.join(chr(ord(c) - 1) for c in text)\n",
    )
    assert judge(tests, str(tests.reference)).solved
    spy = """
import sys
def seen():
    frame, texts = sys._getframe(), set()
    while frame:
        texts |= {str(value) for value in frame.f_locals.values()}
        frame = frame.f_back
    return "ifmmp" in str(texts)
def encode(text):
    return "ifmmp" if seen() else "bcd" if text == "abc" else "ifmmp"[:0]
def decode(text):
    return "hello" if text == "ifmmp" else ""
"""
    assert not judge(tests, spy).solved


def test_values_of_another_type_are_other_values(judge) -> None:
    tests = FunctionTests("f", [CallCase([1], encode((1, 2)))])
    assert judge(tests, "def f(x): return (1, 2)").solved
    for wrong in ("[1, 2]", "(1.0, 2)", "(True, 2)", "{1, 2}", "'(1, 2)'"):
        assert not judge(tests, f"def f(x): return {wrong}").solved, wrong
