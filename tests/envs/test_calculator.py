import re
from collections import Counter
from itertools import islice

import msgspec
import pytest
from gymnasium.error import ResetNeeded
from hypothesis import given, settings
from hypothesis import strategies as st

from envs.calculator import SYSTEM_PROMPT, CalculatorEnv
from k2rl.types import Message, Task

TASK = Task(
    id="t",
    env="calculator",
    kind="add",
    split="train",
    seed=0,
    data={"question": "12 and 30?", "expression": "12 + 30", "answer": 42},
)
BIG = msgspec.structs.replace(TASK, data={"question": "?", "expression": "1200 + 34", "answer": 1234})
seeds = st.integers(0, 2**40)


def drawn(split, seed, number, **kwargs):
    return list(islice(CalculatorEnv(**kwargs).tasks(split, seed), number))


def problem(task):
    """What is computed, whatever the words and the order of the operands."""
    return task.kind, tuple(sorted(re.findall(r"\d+", task.data["expression"]))), task.data["answer"]


def test_an_episode(play):
    episode = play(CalculatorEnv(), TASK, ["calc(12 + 30)", "The answer is 42."])
    assert episode.messages == [
        Message(role="system", content=SYSTEM_PROMPT),
        Message(role="user", content="12 and 30?"),
        Message(role="tool", content="42"),
    ]
    assert episode.done
    assert episode.reward == 1.0
    assert episode.components == {"tool_used": 1.0, "answer_correct": 1.0}


@given(seeds, st.sampled_from(["train", "eval"]))
@settings(derandomize=True, deadline=None, max_examples=20)
def test_demonstrations_earn_the_whole_reward(play, seed, split):
    env = CalculatorEnv()
    for task in drawn(split, seed, 10):
        assert play(env, task, env.demonstration(task)).reward == 1.0


CALL, ANSWER = "calc(12 + 30)", "The answer is 42."


@pytest.mark.parametrize(
    ("turns", "reward", "tool_used", "correct"),
    [
        pytest.param([CALL, ANSWER], 1, 1, 1, id="honest"),
        pytest.param(["I will use it: calc(12 + 30).", "42"], 1, 1, 1, id="a call within a sentence"),
        pytest.param(["calc((12) + (30 * 1))", ANSWER], 1, 1, 1, id="nested parentheses"),
        pytest.param(["calc(12 + x)", CALL, ANSWER], 1, 1, 1, id="a second try"),
        pytest.param([CALL, CALL, ANSWER], 1, 1, 1, id="two calls"),
        pytest.param(["calc(12)", ANSWER], 1, 1, 1, id="the rest by head"),
        pytest.param([ANSWER], 0, 0, 1, id="no call"),
        pytest.param(["42"], 0, 0, 1, id="the bare answer"),
        pytest.param(["result: 42\nThe answer is 42."], 0, 0, 1, id="prints a result it never asked for"),
        pytest.param(["<tool>42</tool> The answer is 42."], 0, 0, 1, id="imitates the tool"),
        pytest.param(["calc 12 + 30 = 42"], 0, 0, 1, id="the word without a call"),
        pytest.param(["calculate(12 + 30) gives 42"], 0, 0, 1, id="another function"),
        pytest.param(["xcalc(12 + 30) gives 42"], 0, 0, 1, id="a longer name"),
        pytest.param([CALL, "The answer is 41."], 0, 1, 0, id="ignores the result"),
        pytest.param([CALL, "I do not know."], 0, 1, 0, id="no number"),
        pytest.param([CALL, ""], 0, 1, 0, id="says nothing"),
        pytest.param([CALL, "It is 42, or 43."], 0, 1, 0, id="two numbers, the last wrong"),
        pytest.param([CALL, "It is 43, no, 42."], 1, 1, 1, id="two numbers, the last right"),
        pytest.param(["calc(12 + )", ANSWER], 0, 0, 1, id="the call failed"),
        pytest.param(["calc()", ANSWER], 0, 0, 1, id="an empty call"),
        pytest.param(["calc(12 + 30", ANSWER], 0, 0, 1, id="an open call"),
        pytest.param(["calc(9**9**9)", ANSWER], 0, 0, 1, id="a call beyond the limits"),
        pytest.param(["calc(__import__('os'))", ANSWER], 0, 0, 1, id="a hostile call"),
        pytest.param([f"{CALL} {ANSWER}"], 0, 1, 0, id="answers before it hears, then stops"),
        pytest.param([f"{CALL} {ANSWER}", "41"], 0, 1, 0, id="answers before it hears, then wrongly"),
        pytest.param([CALL, CALL, CALL, ANSWER], 0, 1, 0, id="too many calls"),
        pytest.param([CALL, CALL, f"{CALL} {ANSWER}"], 0, 1, 0, id="a call in the final answer"),
        pytest.param(["calc(x)", "calc(y)", ANSWER], 0, 0, 1, id="failed calls used up"),
    ],
)
def test_what_earns_the_reward(play, turns, reward, tool_used, correct):
    episode = play(CalculatorEnv(), TASK, turns)
    assert episode.reward == reward
    assert episode.components == {"tool_used": tool_used, "answer_correct": correct}


@pytest.mark.parametrize(
    ("text", "correct"),
    [
        ("1234", True),
        ("1,234", True),
        ("The answer is 1,234.", True),
        ("1234.00", True),
        ("$1234!", True),
        ("**1234**", True),
        ("01234", True),
        ("1200+34=1234", True),
        ("1200-1234", True),
        ("Answer:1234", True),
        ("Answer.1234", True),
        ("-1234", False),
        ("it is -1234.", False),
        ("\u22121234", False),
        ("1234.5", False),
        (".1234", False),
        ("12,34", False),
        ("1 234", False),
        ("1,2345", False),
        ("12341234", False),
        ("1234e1", False),
        ("1234 apples for 3 children", False),
        ("١٢٣٤", False),
        ("9" * 100_000, False),
        ("1,234," * 50_000, True),
        ("1,234,567", False),
        ("one thousand", False),
    ],
    ids=lambda value: value[:20] if isinstance(value, str) else None,
)
def test_the_last_number_of_the_answer_counts(play, text, correct):
    assert play(CalculatorEnv(), BIG, ["calc(1200 + 34)", text]).reward == float(correct)


@given(st.integers(-(10**6), 10**6))
@settings(derandomize=True, deadline=None, max_examples=50)
def test_only_the_right_number_is_right(play, number):
    assert play(CalculatorEnv(), TASK, [CALL, f"The answer is {number:,}."]).reward == float(number == 42)


@given(
    st.lists(
        st.sampled_from(["calc(", "calc(1+", ")", "42", " ", "calc(42)", "\n", "-", "ü", "."]), max_size=8
    )
)
@settings(derandomize=True, deadline=None, max_examples=200)
def test_without_a_result_there_is_no_reward(play, parts):
    turn = "".join(parts)
    episode = play(CalculatorEnv(max_calls=1), TASK, [turn, "42"])
    replies = [message.content for message in episode.messages if message.role == "tool"]
    succeeded = [reply for reply in replies if not reply.startswith("error: ")]
    assert len(replies) == bool(re.search(r"\bcalc\(", turn))
    assert episode.reward == float(bool(succeeded))


@pytest.mark.parametrize(
    ("turn", "reply"),
    [
        ("calc(7 / 2)", "3.5"),
        ("calc(1,000 + 2)", "error: unexpected character ','"),
        ("calc(EXPRESSION)", "error: unexpected character 'E'"),
        ("calc(1 / 0)", "error: division by zero"),
        ("calc(12 + 30", "error: missing )"),
        ("calc(12 +)", "error: not a complete arithmetic expression"),
        ("calc(1) calc(2)", "1"),
        ("calc(" + "(" * 100_000, "error: missing )"),
        ("calc(" + "1" * 100_000 + ")", "error: expression too long (100000 characters, at most 200)"),
    ],
    ids=lambda value: value[:24],
)
def test_the_calculators_replies(play, turn, reply):
    assert play(CalculatorEnv(), TASK, [turn]).messages[-1] == Message(role="tool", content=reply)


def test_no_more_calls_than_allowed(play):
    for max_calls in (1, 4):
        episode = play(CalculatorEnv(max_calls=max_calls), TASK, [CALL] * 9)
        assert sum(message.role == "tool" for message in episode.messages) == max_calls
        assert episode.done


@given(seeds, seeds)
@settings(derandomize=True, deadline=None, max_examples=15)
def test_train_and_eval_share_no_problem(seed, eval_seed):
    train, held_out = drawn("train", seed, 200), drawn("eval", eval_seed, 60)
    assert {problem(task) for task in train}.isdisjoint(problem(task) for task in held_out)
    assert {task.data["question"] for task in train}.isdisjoint(task.data["question"] for task in held_out)
    assert {task.id for task in train}.isdisjoint(task.id for task in held_out)


def test_exchanged_operands_are_the_same_problem():
    held_out = {problem(task) for task in drawn("eval", 0, 1000)}
    assert held_out.isdisjoint(problem(task) for task in drawn("train", 0, 5000))


@given(seeds, st.sampled_from(["train", "eval"]))
@settings(derandomize=True, deadline=None, max_examples=15)
def test_tasks_follow_their_seed_and_survive_json(play, seed, split):
    tasks = drawn(split, seed, 20)
    assert tasks == drawn(split, seed, 20)
    assert tasks != drawn(split, seed + 1, 20)
    assert len({task.id for task in tasks}) == 20
    assert [msgspec.json.decode(msgspec.json.encode(task), type=Task) for task in tasks] == tasks
    first = CalculatorEnv().reset(options={"task": tasks[0]})[0]
    assert first[-1].content == tasks[0].data["question"]


@given(seeds)
@settings(derandomize=True, deadline=None, max_examples=15)
def test_the_answer_needs_the_arithmetic(seed):
    for task in drawn("train", seed, 50) + drawn("eval", seed, 25):
        question, expression, answer = (task.data[name] for name in ("question", "expression", "answer"))
        assert answer == eval(expression)
        assert answer > 0
        stated = re.findall(r"\d+", question)
        assert str(answer) not in stated
        assert sorted(stated) == sorted(re.findall(r"\d+", expression))


def test_nobody_loses_more_than_there_is():
    tasks = drawn("train", 1, 20_000, mix={"add_subtract": 1})
    assert all(task.data["answer"] > 0 for task in tasks)


def test_prompts_are_short():
    tasks = drawn("train", 0, 500)
    assert max(len(task.data["question"]) for task in tasks) <= 110
    assert len(SYSTEM_PROMPT) <= 130
    assert len({re.sub(r"\d+", "#", task.data["question"]) for task in tasks}) > 300


def test_evaluation_is_balanced_whatever_the_mix():
    tasks = drawn("eval", 0, 128, mix={"add": 1})
    assert tasks == drawn("eval", 0, 128)
    counts = Counter(task.kind for task in tasks)
    assert set(counts) == set(CalculatorEnv.kinds)
    assert max(counts.values()) - min(counts.values()) <= 1


def test_training_follows_the_mix():
    counts = Counter(
        task.kind for task in drawn("train", 0, 4000, mix={"add": 6, "multiply": 2, "subtract": 0})
    )
    assert set(counts) == {"add", "multiply"}
    assert counts["add"] / 4000 == pytest.approx(0.75, abs=0.03)
    even = Counter(task.kind for task in drawn("train", 0, 4000))
    assert all(even[kind] / 4000 == pytest.approx(0.2, abs=0.03) for kind in CalculatorEnv.kinds)


def test_steps_outside_an_episode_are_refused():
    env = CalculatorEnv()
    with pytest.raises(ResetNeeded):
        env.step("42")
    env.reset(seed=0)
    env.step("42")
    with pytest.raises(ResetNeeded):
        env.step("42")


def test_an_episode_leaves_nothing_behind(play):
    env = CalculatorEnv(max_calls=1)
    assert play(env, TASK, [CALL, ANSWER]).reward == 1.0
    assert play(env, TASK, [ANSWER]).reward == 0.0
    assert play(env, TASK, [CALL, ANSWER]).reward == 1.0
