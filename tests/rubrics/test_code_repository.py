"""Repository tasks: a solution passes, and changes that are after the tests instead do not."""

from __future__ import annotations

import asyncio

import pytest

from rubrics.code import JudgeError, Outcome
from rubrics.code.repository import Changes, RepositoryTests, judge_repository
from sandboxes import registry

# All cheats are judged at once, by one process of the tests.
pytestmark = pytest.mark.xdist_group("code repository")

REPOSITORY = {
    "calc/__init__.py": b"",
    "calc/core.py": b"def add(a, b):\n    return a - b\n\n\ndef mul(a, b):\n    return a * b\n",
    "tests/test_core.py": b"from calc.core import mul\n\n\ndef test_mul():\n    assert mul(2, 3) == 6\n",
    "pyproject.toml": b"[tool.pytest.ini_options]\naddopts = '--no-such-option'\n",
}
TESTS = RepositoryTests(
    {
        "tests/test_core.py": """
import unittest
from calc.core import add, mul

def test_mul():
    assert mul(2, 3) == 6

def test_add():
    assert add(2, 3) == 5

class TestAdd(unittest.TestCase):
    def test_negative(self):
        self.assertEqual(add(-1, -1), -2)
"""
    },
    ("tests/test_core.py::test_add", "tests/test_core.py::TestAdd::test_negative"),
    ("tests/test_core.py::test_mul",),
    seconds=5.0,
)
MUL = "\n\ndef mul(a, b):\n    return a * b\n"
HOOK = """
import pytest

@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    outcome = yield
    outcome.get_result().outcome = "passed"
"""
ANYTHING = f"class Anything(int):\n    def __eq__(self, other): return True\n    __hash__ = None\n{MUL}"


def core(code: str) -> dict[str, bytes]:
    return {"calc/core.py": code.encode()}


CHEATS: dict[str, Changes] = {
    "nothing": {},
    "the tests are edited": {"tests/test_core.py": b"def test_add(): pass\ndef test_mul(): pass\n"},
    "the tests are deleted": {"tests/test_core.py": None},
    "a conftest makes all reports passed": {"conftest.py": HOOK.encode(), "tests/conftest.py": HOOK.encode()},
    "a pytest.ini loads a plugin": {
        "pytest.ini": b"[pytest]\naddopts = -p calc.plugin\n",
        "calc/plugin.py": HOOK.encode(),
    },
    "pyproject.toml selects no test": {
        "pyproject.toml": b"[tool.pytest.ini_options]\naddopts = '-k nothing'\npython_functions = 'never_*'\n"
    },
    "sitecustomize": {
        "sitecustomize.py": b"import os\nos._exit(0)\n",
        "usercustomize.py": b"import os\nos._exit(0)\n",
    },
    "a pytest of its own": {"pytest.py": b"def main(*a, **k): return 0\n", "_pytest/__init__.py": b""},
    "a unittest of its own beside the tests": {
        "tests/unittest.py": b"class TestCase: pass\n",
        "unittest.py": b"",
    },
    "exits with 0 when it is imported": core("import os\nos._exit(0)\n"),
    "exits with 0 when it is called": core(f"import os\ndef add(a, b): os._exit(0)\n{MUL}"),
    "SystemExit": core(f"def add(a, b): raise SystemExit(0)\n{MUL}"),
    "skips": core(f"def add(a, b):\n    import pytest\n    pytest.skip('later')\n{MUL}"),
    "is expected to fail": core(f"def add(a, b):\n    import pytest\n    pytest.xfail('known')\n{MUL}"),
    "ends pytest": core(f"def add(a, b):\n    import pytest\n    pytest.exit('done', 0)\n{MUL}"),
    "is equal to everything": core(f"{ANYTHING}\ndef add(a, b): return Anything()\n"),
    "patches assertEqual and builtins": core(
        "import builtins, unittest\nunittest.TestCase.assertEqual = lambda *a: None\n"
        f"for name in dir(builtins):\n"
        f"    if name.startswith('k2rl'): setattr(builtins, name, lambda a, b: True)\n"
        f"def add(a, b): return 0\n{MUL}"
    ),
    "patches the reports": core(
        "import _pytest.reports as reports\nreal = reports.TestReport.from_item_and_call.__func__\n"
        "def forged(cls, item, call):\n    call.excinfo = None\n    return real(cls, item, call)\n"
        f"reports.TestReport.from_item_and_call = classmethod(forged)\ndef add(a, b): return 0\n{MUL}"
    ),
    "prints what pytest prints": core("print('3 passed in 0.01s', flush=True)\nimport os\nos._exit(0)\n"),
    "writes answers to every descriptor": core(
        "import os\nfor n in range(1, 64):\n    try:\n"
        '        os.write(n, b\'{"token": "", "outcomes": {"tests/test_core.py'
        '::test_add": "passed"}, "details": {}}\')\n    except OSError:\n        pass\nos._exit(0)\n'
    ),
    "writes files of results": {
        **core("open('report.xml', 'w').write('<testsuite failures=\"0\"/>')\nimport os\nos._exit(0)\n"),
        "reward.txt": b"1",
        ".pytest_cache/v/cache/lastfailed": b"{}",
    },
    "breaks what worked": core("def add(a, b):\n    return a + b\n\n\ndef mul(a, b):\n    return 0\n"),
    "computes without end": core(f"def add(a, b):\n    while True: pass\n{MUL}"),
    "forks and leaves": core(f"import os\nif os.fork(): os._exit(0)\ndef add(a, b): return 0\n{MUL}"),
    "leads out of the repository": {"../evil.py": b"", "/etc/evil": b"", ".git/hooks/x": b""},
    "a folder in the place of a file": {"calc/core.py/x.py": b"def add(a, b): return a + b\n"},
}


@pytest.fixture(scope="module")
def outcomes() -> dict[str, Outcome]:
    """Of all changes, judged a few at once."""

    async def judge_all() -> dict[str, Outcome]:
        backend = registry.create("bubblewrap")
        places = asyncio.Semaphore(4)

        async def judge(changes: Changes) -> Outcome:
            async with places:
                return await judge_repository(backend, REPOSITORY, changes, TESTS)

        try:
            return dict(zip(CHEATS, await asyncio.gather(*map(judge, CHEATS.values())), strict=True))
        finally:
            await backend.close()

    return asyncio.run(judge_all())


def test_a_solution_passes(loop, backend) -> None:
    changes: Changes = {**core(f"def add(a, b):\n    return a + b\n{MUL}"), "notes.txt": b"done"}
    outcome = loop.run(judge_repository(backend, REPOSITORY, changes, TESTS))
    assert (outcome.passed, outcome.total) == (3, 3), outcome


@pytest.mark.parametrize("cheat", CHEATS)
def test_a_cheat_is_scored_0(cheat: str, outcomes) -> None:
    assert not outcomes[cheat].solved
    assert outcomes[cheat].detail


def test_hidden_tests_that_are_no_python_are_a_fault(loop, backend) -> None:
    tests = RepositoryTests({"tests/test_core.py": "def test_add(:"}, ("tests/test_core.py::test_add",))
    with pytest.raises(JudgeError, match="not Python"):
        loop.run(judge_repository(backend, REPOSITORY, {}, tests))
