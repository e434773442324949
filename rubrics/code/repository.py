"""Repository tasks: a change of a repository, judged by tests that its author has not seen.

The tests run in a fresh sandbox, on the repository as it was with the change applied. Files that belong to
the tests or decide how they run are those of the task, whatever the change does to them.
"""

from __future__ import annotations

import ast
import json
import secrets
from collections.abc import Mapping
from functools import cache
from importlib.util import find_spec
from pathlib import Path, PurePosixPath

import msgspec

from rubrics.code.judge import JudgeError, Outcome, ending
from rubrics.code.sandboxed import WALL_FACTOR, module_source
from sandboxes.base import Backend, Limits, SandboxSpec
from sandboxes.errors import SandboxFileError

Files = Mapping[str, bytes]
Changes = Mapping[str, bytes | None]
"""Path -> new content, or None for a file that is removed."""

LIBRARIES = "/opt/k2rl"
PYTEST = ("_pytest", "pytest", "py", "pluggy", "iniconfig", "packaging", "pygments")
TEST_SETTINGS = (
    *("conftest.py", "pytest.ini", ".pytest.ini", "tox.ini", "setup.cfg", "pyproject.toml", "pytest.toml"),
    *("sitecustomize.py", "usercustomize.py"),
)
CONTROLS = """
def test_that_passes():
    assert [1] == [1]

def test_that_fails():
    assert [1] == [2]

def test_that_is_not_true():
    assert not 1

def test_that_raises():
    raise LookupError
"""
MUST_FAIL = ("test_that_fails", "test_that_is_not_true", "test_that_raises")


class RepositoryTests(msgspec.Struct, frozen=True):
    """Hidden tests, and which of them must pass; ids are pytest's, relative to the repository."""

    #: Test files that replace the repository's: path -> text.
    files: dict[str, str]
    fail_to_pass: tuple[str, ...]
    pass_to_pass: tuple[str, ...] = ()
    #: Folders that tests import from.
    roots: tuple[str, ...] = (".", "src")
    #: Whether objects that equal everything are looked for: the solution must pass like that.
    checks_equality: bool = True
    #: Seconds of CPU time for all tests.
    seconds: float = 60.0

    @property
    def required(self) -> tuple[str, ...]:
        return (*self.fail_to_pass, *self.pass_to_pass)


class Report(msgspec.Struct, frozen=True):
    """What became of each test that ran: `passed`, or anything else."""

    outcomes: dict[str, str]
    details: dict[str, str] = {}
    #: Why there are no outcomes; empty if there are.
    problem: str = ""


async def judge_repository(
    backend: Backend, repository: Files, changes: Changes, tests: RepositoryTests, image: str | None = None
) -> Outcome:
    """What a change makes of the tests; `image` as in `SandboxSpec`.

    Raises:
        JudgeError: pytest is not installed here, or the task is wrong.
        SandboxError: the sandbox failed.
    """
    report = await run_tests(backend, repository, changes, tests, image)
    passed = [test for test in tests.required if report.outcomes.get(test) == "passed"]
    missed = [test for test in tests.required if report.outcomes.get(test) != "passed"]
    detail = report.problem
    if missed and not detail:
        said = report.details.get(missed[0], "") or next(iter(report.details.values()), "")
        detail = f"{missed[0]}: {report.outcomes.get(missed[0], 'did not run')} {said}".strip()
    return Outcome(len(passed), len(tests.required), detail)


async def run_tests(
    backend: Backend, repository: Files, changes: Changes, tests: RepositoryTests, image: str | None = None
) -> Report:
    """Run the tests' files on the changed repository; see `judge_repository`."""
    equal, folder, token = (f"k2rl_{secrets.token_hex(8)}" for _ in range(3))
    controls = f"{folder}/test_controls.py"
    hidden = {**tests.files, controls: CONTROLS}
    if tests.checks_equality:
        hidden = {path: _instrumented(path, text, equal) for path, text in hidden.items()}
    files = {**changed(repository, changes, tests), **{path: text.encode() for path, text in hidden.items()}}
    paths = dict.fromkeys([*tests.files, *(test.split("::")[0] for test in tests.required)])
    request = {
        "token": token,
        "libraries": LIBRARIES,
        "roots": tests.roots,
        "equal": equal,
        "paths": [*(path for path in paths if path in files and path.endswith(".py")), controls],
    }
    program = f"{module_source('repository_runner')}\nmain(json.loads({json.dumps(json.dumps(request))}))\n"
    limits = Limits(wall_seconds=WALL_FACTOR * tests.seconds, cpu_seconds=tests.seconds, memory_bytes=2**30)
    spec = SandboxSpec(limits=limits, image=image, read_only=pytest_files())
    async with await backend.open(spec) as sandbox:
        try:
            await sandbox.upload(files)
        except SandboxFileError as error:
            return Report({}, problem=f"the change cannot be applied: {error}")
        ran = await sandbox.run_python(program)
    try:
        answer = json.loads(ran.stdout)
        outcomes = dict(answer["outcomes"])
        # The name of what compares is drawn anew for each run, and nobody's business.
        details = {test: str(said).replace(equal, "equal") for test, said in answer["details"].items()}
        genuine = answer["token"] == token
    except (ValueError, RecursionError, TypeError, KeyError, AttributeError):
        return Report({}, problem=f"the tests did not come to their end: {ending(ran)}")
    of_controls = {id.split("::")[-1]: outcomes.pop(id) for id in list(outcomes) if id.startswith(controls)}
    if not genuine or any(of_controls.get(name) != "failed" for name in MUST_FAIL):
        return Report({}, problem="the harness was tampered with: control tests do not fail")
    if of_controls.get("test_that_passes") != "passed":
        return Report({}, problem="the harness was tampered with: a control test does not pass")
    return Report(outcomes, details)


def changed(repository: Files, changes: Changes, tests: RepositoryTests) -> dict[str, bytes]:
    """The repository with a change, but for what belongs to the tests or decides how they run."""
    files = dict(repository)
    for path, content in changes.items():
        if not may_change(path, tests):
            continue
        if content is None:
            files.pop(path, None)
        else:
            files[path] = content
    return files


def may_change(path: str, tests: RepositoryTests) -> bool:
    """Whether a change of this file counts."""
    parts = PurePosixPath(path)
    inside = not parts.is_absolute() and ".." not in parts.parts and parts.parts[:1] != (".git",)
    in_tests = any(test.split("::")[0] == path for test in tests.required)
    settings = parts.name in TEST_SETTINGS or parts.suffix in (".pth", ".pyc")
    return inside and path not in tests.files and not in_tests and not settings


def _instrumented(path: str, text: str, equal: str) -> str:
    if not path.endswith(".py"):
        return text
    try:
        tree = ast.parse(text)
    except SyntaxError as error:
        raise JudgeError(f"the task's {path} is not Python: {error}") from error
    return ast.unparse(ast.fix_missing_locations(_Equality(equal).visit(tree)))


class _Equality(ast.NodeTransformer):
    """Makes of `a == b` a call; longer comparisons stay."""

    def __init__(self, name: str) -> None:
        self._name = name

    def visit_Compare(self, node: ast.Compare) -> ast.expr:
        self.generic_visit(node)
        if len(node.ops) != 1 or not isinstance(node.ops[0], ast.Eq):
            return node
        return ast.Call(ast.Name(self._name, ast.Load()), [node.left, node.comparators[0]], [])


@cache
def pytest_files() -> dict[str, str]:
    """Where a sandbox finds pytest, and where it is here.

    Raises:
        JudgeError: it is not installed.
    """
    found = {}
    for name in PYTEST:
        spec = find_spec(name)
        if spec is None or spec.origin is None:
            raise JudgeError(f"repository tasks need {name}: pip install pytest")
        path = Path(spec.origin).resolve()
        path = path.parent if path.name == "__init__.py" else path
        found[f"{LIBRARIES}/{path.name}"] = str(path)
    return found
