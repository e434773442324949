"""The code judge: whether a candidate solves a problem.

The candidate runs in a sandbox, and says there what its functions returned or its program printed. What the
right answers are is known in another place: this process, for values and text, or a sandbox that the
candidate never enters, for tests that are code. So it can gain nothing by ending early, by patching what it
finds, by printing what a harness would print, or by objects that say that they equal everything.
"""

from __future__ import annotations

import hashlib
import json
from collections import OrderedDict
from typing import Any

import msgspec

from k2rl.types import Verdict
from rubrics.code import text, values
from rubrics.code.problems import AssertTests, CodeTests, FunctionTests, ProgramTests
from rubrics.code.sandboxed import Runner, cores, limited, packed
from sandboxes import registry
from sandboxes.base import Backend, ExecResult, Limits
from sandboxes.errors import SandboxError

MOST_ROUNDS = 400
"""Times that a candidate is asked anew, for tests whose questions depend on its answers."""
REMEMBERED = 4096
"""Problems whose questions are kept."""


class JudgeError(Exception):
    """The judge, not the candidate, failed: there is no score."""


class Outcome(msgspec.Struct, frozen=True):
    """What a candidate made of a problem's tests; `detail` tells of the first that failed."""

    passed: int
    total: int
    detail: str = ""

    @property
    def solved(self) -> bool:
        return self.total > 0 and self.passed == self.total

    @property
    def verdict(self) -> Verdict:
        share = self.passed / self.total if self.total else 0.0
        return Verdict.scored(float(self.solved), {"tests_passed": share})


class CodeJudge:
    """Judges candidates, as many at once as it has pairs of sandboxes. Belongs to one event loop."""

    def __init__(
        self, sandbox: str | Backend = "bubblewrap", parallel: int = 0, limits: Limits | None = None
    ) -> None:
        """`parallel` 0: as many as there are cores. `limits` bound candidates and tests alike."""
        self.backend = registry.create(sandbox) if isinstance(sandbox, str) else sandbox
        limits = limits or Limits(wall_seconds=30, cpu_seconds=60, output_bytes=16 * 2**20)
        parallel = parallel or cores()
        self._candidates = Runner(self.backend, parallel, limits)
        self._testers = Runner(self.backend, parallel, limits)
        self._questions: OrderedDict[str, list[tuple[str, list[Any]]]] = OrderedDict()

    async def close(self) -> None:
        """End all sandboxes."""
        await self.backend.close()

    async def verdict(self, tests: CodeTests, code: str) -> Verdict:
        """As `judge`; a fault of ours, or of the problem, is a failed verdict."""
        try:
            return (await self.judge(tests, code)).verdict
        except (JudgeError, SandboxError) as error:
            return Verdict.failed(f"{type(error).__name__}: {error}")

    async def judge(self, tests: CodeTests, code: str) -> Outcome:
        """What `code` makes of the tests.

        Raises:
            JudgeError: the problem's own tests, checker or reference don't work.
            SandboxError: a sandbox failed.
        """
        if isinstance(tests, FunctionTests):
            return await self._calls(tests, code)
        if isinstance(tests, ProgramTests):
            return await self._program(tests, code)
        return await self._asserts(tests, code)

    async def _calls(self, tests: FunctionTests, code: str) -> Outcome:
        questions: list[list[Any]] = []
        holder = 0
        *classes, name = tests.entry_point.split(".")
        for part in classes:
            questions += [["get", holder, part], ["call", holder + 1, [], {"d": []}]]
            holder += 2
        questions.append(["get", holder, name])
        first = len(questions)
        questions += [["call", holder + 1, case.args, {"d": []}] for case in tests.cases]
        asked = await self._ask(code, "solution", [questions], tests.seconds)
        answers = asked.answers[0][first:]
        passed, detail = 0, ""
        for number, case in enumerate(tests.cases):
            problem = asked.ending if number >= len(answers) else _call_problem(case, answers[number], tests)
            passed += not problem
            detail = detail or (problem and f"{name}{_shown(case.args)}: {problem}")
        return Outcome(passed, len(tests.cases), detail)

    async def _program(self, tests: ProgramTests, code: str) -> Outcome:
        """The cases in order, until one fails: contests give no points for some of them."""
        for number, case in enumerate(tests.cases):
            ran = await self._candidates.run(
                limited(code, tests.seconds), seconds=tests.seconds, stdin=case.stdin.encode()
            )
            problem = "" if ran.ok else ending(ran)
            if not problem and tests.checker is not None:
                problem = (
                    ""
                    if await self._checked(tests.checker, case.stdin, case.expected, ran)
                    else "not accepted"
                )
            elif not problem:
                problem = text.difference(case.expected, ran.stdout, tests.whitespace, tests.tolerance)
            if problem:
                return Outcome(number, len(tests.cases), f"case {number + 1}: {problem}")
        return Outcome(len(tests.cases), len(tests.cases))

    async def _checked(self, checker: str, stdin: str, expected: str, ran: ExecResult) -> bool:
        call = ["call", 1, [stdin, expected, ran.text], {"d": []}]
        asked = await self._ask(checker, "checker", [[["get", 0, "check"], call]], 10.0, self._testers)
        answers = asked.answers[0]
        if len(answers) != 2 or answers[1][0] != "v" or type(answers[1][1]) is not bool:
            said = answers[-1][1:] if answers else asked.ending
            raise JudgeError(f"the problem's checker gave no True or False: {said!s:.300}")
        return bool(answers[1][1])

    async def _asserts(self, tests: AssertTests, code: str) -> Outcome:
        questions = await self._expected_questions(tests)
        status: dict[str, str] = {}
        total = len(questions)
        open_tests = list(range(total))
        for _ in range(MOST_ROUNDS):
            asked = await self._ask(code, tests.module, [questions[i][1] for i in open_tests], tests.seconds)
            transcripts: list[Any] = [[] for _ in questions]
            for index, answers in zip(open_tests, asked.answers, strict=True):
                transcripts[index] = [
                    [question, answer] for question, answer in zip(questions[index][1], answers, strict=False)
                ]
            replayed = await self._replay(tests, transcripts)
            if replayed is None:
                return Outcome(0, total, "its answers are more than the tests can take")
            still_open = []
            for index, answers in zip(open_tests, asked.answers, strict=True):
                outcome = replayed[index]
                name = outcome["name"]
                if outcome["status"] != "pending":
                    status[name] = "" if outcome["status"] == "passed" else str(outcome["detail"])
                elif len(answers) < len(questions[index][1]) and len(outcome["asked"]) > len(answers):
                    status[name] = asked.ending
                else:
                    questions[index] = (name, outcome["asked"])
                    still_open.append(index)
            open_tests = still_open
            if not open_tests:
                failed = [f"{name}: {detail}" for name, detail in status.items() if detail]
                return Outcome(total - len(failed), total, failed[0] if failed else "")
        raise JudgeError(f"the tests were not through after {MOST_ROUNDS} rounds of questions")

    async def _expected_questions(self, tests: AssertTests) -> list[tuple[str, list[Any]]]:
        """Each test's name and what it will ask, as far as the reference tells."""
        key = hashlib.sha256(msgspec.json.encode(tests)).hexdigest()
        if key not in self._questions:
            outcomes = await self._test(tests, tests.reference, [])
            for outcome in outcomes:
                if tests.reference is not None and outcome["status"] != "passed":
                    raise JudgeError(f"the reference fails {outcome['name']}: {outcome['detail']}")
            if not outcomes:
                raise JudgeError("the problem has no tests")
            self._questions[key] = [(outcome["name"], outcome["asked"]) for outcome in outcomes]
            if len(self._questions) > REMEMBERED:
                self._questions.popitem(last=False)
        return list(self._questions[key])

    async def _replay(self, tests: AssertTests, transcripts: list[Any]) -> list[dict[str, Any]] | None:
        """The tests' outcomes; None if the answers made them run out of time, memory or output."""
        try:
            return await self._test(tests, None, transcripts)
        except _TooMuchError:
            return None

    async def _test(
        self, tests: AssertTests, reference: str | None, transcripts: list[Any]
    ) -> list[dict[str, Any]]:
        request = {
            "source": tests.source,
            "module": tests.module,
            "entry_point": tests.entry_point,
            "reference": reference,
            "transcripts": transcripts,
        }
        ran = await self._testers.run(packed("tester", request, tests.seconds), seconds=tests.seconds)
        if not ran.ok:
            kind = _TooMuchError if ran.ended != "exited" or ran.exit_code < 0 else JudgeError
            raise kind(f"the problem's tests don't run: {ending(ran)}")
        outcomes: list[dict[str, Any]] = json.loads(ran.stdout)
        return outcomes

    async def _ask(
        self, code: str, module: str, questions: list[list[Any]], seconds: float, runner: Runner | None = None
    ) -> _Asked:
        request = {"code": code, "module": module, "tests": questions}
        ran = await (runner or self._candidates).run(packed("candidate", request, seconds), seconds=seconds)
        answers: list[list[list[Any]]] = []
        for line in ran.stdout.splitlines():
            answer = _answer(line)
            if answer == ["t"]:
                answers.append([])
            elif answers:
                answers[-1].append(answer)
        missing = len(questions) - len(answers)
        answers = answers[: len(questions)] + [[] for _ in range(missing)]
        return _Asked(answers, f"no answer: {ending(ran)}")


class _TooMuchError(JudgeError):
    """The tests ran out of time, memory or output."""


class _Asked(msgspec.Struct):
    """The answers to each test's questions, as far as they came, and why there are no more."""

    answers: list[list[list[Any]]]
    ending: str


def _answer(line: bytes) -> list[Any]:
    """An answer of the candidate's process; what is none is an error."""
    try:
        answer = json.loads(line)
    except (ValueError, RecursionError):
        answer = None
    if answer == ["t"] or (isinstance(answer, list) and len(answer) > 1 and answer[0] in ("v", "e")):
        return list(answer)
    return ["e", [], "not an answer"]


def _call_problem(case: Any, answer: list[Any], tests: FunctionTests) -> str:
    """What is wrong with the answer to a call; empty if nothing."""
    if answer[0] == "e":
        return str(answer[-1])[:300]
    try:
        got = values.decode(answer[1])
    except (values.UnplainError, RecursionError) as error:
        return f"{error}"
    expected = values.decode(case.expected)
    if values.same(expected, got, tests.tolerance):
        return ""
    return f"{_text(got)} instead of {_text(expected)}"


def _text(value: Any) -> str:
    try:
        return f"{value!r:.200}"
    except (ValueError, RecursionError):  # an integer of thousands of digits has no decimal text
        return f"a {type(value).__name__} that is too large to show"


def _shown(args: Any) -> str:
    return f"({', '.join(_text(value)[:60] for value in values.decode(args))})"


def ending(ran: ExecResult) -> str:
    """How a run ended, for people."""
    if ran.ended != "exited":
        return ran.ended.replace("_", " ")
    said = ran.error_text.strip().splitlines()
    return f"exit code {ran.exit_code}" + (f", {said[-1]:.300}" if said else "")
