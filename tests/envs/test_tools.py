"""Tools of plain functions: their schemas, and calls good and bad."""

import asyncio
import threading
from enum import Enum
from typing import Annotated, Literal

import pytest
from gymnasium.error import ResetNeeded
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, Field

from envs.tools import ToolEnv, ToolError, calling, tool
from envs.tools.formats import FORMATS, Call, parse
from envs.tools.toolbox import MAX_CALLS, Toolbox, shortened
from k2rl.errors import ConfigError
from k2rl.types import Message, Task, ToolCall


class Colour(Enum):
    RED = "red"


class Point(BaseModel):
    x: int
    y: int = 0


@tool
def paint(
    colour: Colour, at: Point, layers: Annotated[int, Field(ge=1, le=3)] = 1, title: str | None = None
) -> dict:
    """Paint a point,
    with care.

    Args:
        colour: which one,
            no other
        at (Point): where

    Returns:
        what was painted
    """
    return {"colour": colour, "at": at, "layers": layers, "title": title}


@tool(name="wait", timeout_s=0.05)
def slow() -> str:
    threading.Event().wait()


@tool(name="await", timeout_s=0.05)
async def slow_async() -> str:
    await asyncio.Event().wait()


@tool
async def twice(number: int) -> int:
    """Double a number."""
    return 2 * number


@tool
def refuse() -> str:
    raise ToolError("not today")


@tool
def broken() -> str:
    raise TimeoutError("the service is gone")


def answers(*calls: Call, tools=(paint, slow, refuse, broken), **options) -> list[str]:
    """What the blocking and the awaited way both say."""
    blocking = Toolbox(tools, **options).run_blocking(calls)
    awaited = asyncio.run(Toolbox(tools, **options).run(calls))
    assert blocking == awaited
    return [message.content for message in blocking.messages]


def test_the_schema_is_what_hints_and_docstring_say():
    spec = paint.spec
    assert spec.name == "paint"
    assert spec.description == "Paint a point, with care."
    schema = spec.parameters
    assert schema["required"] == ["colour", "at"]
    assert schema["properties"]["colour"]["description"] == "which one, no other"
    assert schema["properties"]["at"]["description"] == "where"
    assert schema["properties"]["layers"] == {"type": "integer", "minimum": 1, "maximum": 3, "default": 1}
    assert schema["properties"]["title"]["anyOf"] == [{"type": "string"}, {"type": "null"}]
    assert schema["$defs"]["Colour"] == {"enum": ["red"], "type": "string"}
    assert paint(Colour.RED, Point(x=1))["layers"] == 1


def test_a_good_call_gets_python_values():
    assert answers(Call("paint", {"colour": "red", "at": {"x": 1}, "title": "t"})) == [
        '{"colour":"red","at":{"x":1,"y":0},"layers":1,"title":"t"}'
    ]


@pytest.mark.parametrize(
    ("call", "reply"),
    [
        (Call("pain", {}), "error: there is no tool 'pain'; did you mean paint? There are: paint, wait"),
        (Call("paint", {"colour": "blue", "at": {"x": 1}}), "error: colour: Input should be 'red'"),
        (Call("paint", {"colour": "red", "at": {"x": "1"}}), "error: at.x: Input should be a valid integer"),
        (Call("paint", {"colour": "red"}), "error: at: Field required"),
        (
            Call("paint", {"colour": "red", "at": {"x": 1}, "layers": 4}),
            "error: layers: Input should",
        ),
        (Call("paint", {"colour": "red", "at": {"x": 1}, "size": 4}), "error: size: Extra inputs are not"),
        (Call("", problem="the call is no JSON"), "error: the call is no JSON"),
        (Call("refuse"), "error: not today"),
        (Call("wait"), "error: wait gave no answer within 0.05 s"),
    ],
)
def test_a_bad_call_is_answered_with_what_is_wrong(call, reply):
    (said,) = answers(call)
    assert said.startswith(reply)


def test_a_fault_of_ours_is_raised():
    for run in (Toolbox([broken]).run_blocking, lambda calls: asyncio.run(Toolbox([broken]).run(calls))):
        with pytest.raises(TimeoutError, match="the service is gone"):
            run([Call("broken")])


def test_awaited_tools():
    box = Toolbox([twice, slow_async])
    assert box.is_async
    answered = asyncio.run(box.run([Call("twice", {"number": 4}), Call("await")]))
    assert [m.content for m in answered.messages] == ["8", "error: await gave no answer within 0.05 s"]
    assert answered.bad == 1


def test_the_calls_of_a_turn_run_at_the_same_time():
    meeting = threading.Barrier(3, timeout=60)

    @tool
    def meet() -> str:
        meeting.wait()
        return "met"

    assert answers(*[Call("meet")] * 3, tools=[meet]) == ["met"] * 3


def test_or_one_after_the_other():
    order = []

    @tool
    def note(number: int) -> str:
        order.append(number)
        return str(len(order))

    calls = [Call("note", {"number": number}) for number in range(5)]
    box = Toolbox([note], parallel=False)
    assert [m.content for m in box.run_blocking(calls).messages] == ["1", "2", "3", "4", "5"]
    assert [m.content for m in asyncio.run(box.run(calls)).messages] == ["6", "7", "8", "9", "10"]
    assert order == [*range(5), *range(5)]


def test_ids_are_the_policys_or_those_of_k2():
    box = Toolbox([refuse])
    first = box.run_blocking([Call("refuse"), Call("no"), Call("refuse", id="functions.refuse:9")])
    assert [m.tool_call_id for m in first.messages] == [
        "functions.refuse:0",
        "functions.no:1",
        "functions.refuse:9",
    ]
    assert box.run_blocking([Call("", id="x" * 999)]).messages[0].tool_call_id == "functions.unknown:3"


def test_long_answers_lose_their_middle_and_say_so():
    @tool
    def long() -> str:
        return "a" * 900 + "b" * 900

    (said,) = answers(Call("long"), tools=[long], max_result=100)
    assert said == "a" * 50 + "\n… 1700 characters left out …\n" + "b" * 50
    assert shortened("short") == "short"


def test_a_turn_of_too_many_calls():
    said = answers(*[Call("refuse")] * (MAX_CALLS + 1))
    assert said[-1] == f"error: a turn may hold {MAX_CALLS} calls; this is one too many"


def test_functions_that_are_no_tools():
    with pytest.raises(TypeError, match="parameter a has no type hint"):
        tool(lambda a: a)
    with pytest.raises(TypeError, match="cannot be given by name"):

        @tool
        def rest(*args: int) -> int: ...

    with pytest.raises(ValueError, match="two tools are called paint"):
        Toolbox([paint, tool(name="paint")(lambda: "")])
    with pytest.raises(ValueError, match="timeout_s=0 must be above 0"):
        tool(timeout_s=0)(lambda: "")


class CounterEnv(ToolEnv):
    """Count to the wanted number, then say so."""

    parallel = False

    def tasks(self, split, seed):
        for n in range(1, 100):
            yield Task(f"counter/{split}/{seed}/{n}", "counter", "default", split, n, {"wanted": n % 5 + 1})

    def begin(self, task):
        self.wanted, self.number = task.data["wanted"], 0
        return (Message("user", f"Count to {self.wanted}."),)

    @tool
    def add(self, step: Literal[1, 2]) -> int:
        """Add a step."""
        self.number += step
        return self.number

    @tool
    def give_up(self) -> str:
        self.end(0.0, {"gave_up": 1.0}, truncated=True)
        return "a pity"

    def answer(self, text):
        return self.end(float(self.number == self.wanted), detail=text)

    def demonstration(self, task):
        return [*(calling("add", n, step=1) for n in range(task.data["wanted"])), "done"]


class AwaitedEnv(CounterEnv):
    async def begin(self, task):
        await asyncio.sleep(0)
        return super().begin(task)

    async def answer(self, text):
        await asyncio.sleep(0)
        return super().answer(text)


@pytest.mark.parametrize("kind", [CounterEnv, AwaitedEnv])
@pytest.mark.parametrize("format", sorted(FORMATS))
def test_an_environment_of_a_few_lines(kind, format, play):
    env = kind(format)
    task = next(env.tasks("train", 0))
    assert [spec.name for spec in env.tools] == ["add", "give_up"]
    turns = [
        turn if isinstance(turn, str) else FORMATS[format].render("", turn.tool_calls)
        for turn in env.demonstration(task)
    ]
    episode = play(env, task, turns)
    assert episode.done
    assert episode.reward == 1.0
    assert episode.components == {"calls": task.data["wanted"], "bad_calls": 0.0}
    assert [m.content for m in episode.messages[1:]] == [str(n + 1) for n in range(task.data["wanted"])]
    with pytest.raises(ResetNeeded):
        env.step("done")


def test_a_tool_may_end_the_episode():
    env = CounterEnv()
    env.reset(seed=0)
    calls = (ToolCall("", "add", {"step": 1}), ToolCall("", "give_up", {}))
    messages, reward, terminated, truncated, info = env.step(FORMATS["hermes"].render("", calls))
    assert [m.content for m in messages] == ["1", "a pity"]
    assert (reward, terminated, truncated) == (0.0, False, True)
    assert info["reward_components"] == {"calls": 2.0, "bad_calls": 0.0, "gave_up": 1.0}


def test_gymnasium_accepts_it(check_gymnasium):
    check_gymnasium(CounterEnv())


def test_an_unknown_format():
    with pytest.raises(ConfigError, match="format='xml' is none of: auto, hermes, llama, kimi"):
        CounterEnv("xml")


@given(
    st.text(max_size=40)
    | st.dictionaries(st.text(max_size=5), st.integers(), max_size=3).map(
        lambda given: FORMATS["hermes"].render("", (ToolCall("", "add", given),))
    )
)
def test_whatever_a_policy_writes_is_answered(action):
    env = CounterEnv()
    env.reset(seed=1)
    messages, _, terminated, _, info = env.step(action)
    assert terminated is not bool(parse(action).calls)
    assert all(isinstance(message.content, str) for message in messages)
    assert set(info["reward_components"]) == {"calls", "bad_calls"}
