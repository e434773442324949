"""Agents that only know OpenAI's API, through its own client, against a scripted policy."""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

import aiohttp
import openai
import pytest
from agents import LIMITS, TOOLS, Policy, attempt, call, client, harness, tasks

from envs.agents import CommandAgentEnv, FunctionAgentEnv
from k2rl.config import Config, GatewayConfig
from k2rl.errors import RunError
from k2rl.inference.engine import EngineDeadError, Generation, GenerationError, Sampling
from k2rl.loop import policy_batch
from k2rl.models.chat import ChatTemplate
from k2rl.models.hub import resolve_model
from k2rl.rollouts.episode import EpisodeLimits
from k2rl.rollouts.gateway.episode import run_agent_episode
from k2rl.rollouts.gateway.server import Gateway
from k2rl.rollouts.gateway.session import Session
from k2rl.rollouts.scheduler import RolloutScheduler
from k2rl.types import Task, Trajectory, Verdict
from rubrics.environment import EnvironmentReward


@pytest.fixture(scope="module")
def chat() -> ChatTemplate:
    return ChatTemplate.from_pretrained(resolve_model("tiny-qwen3"))


Script = Callable[[Any, Session, str], Awaitable[Any]]


def within(work: Awaitable[Any]) -> Any:
    return asyncio.run(asyncio.wait_for(work, 60))  # type: ignore[arg-type]


def play(policy: Any, chat: ChatTemplate, agent: Any, limits: EpisodeLimits = LIMITS) -> Trajectory:
    async def episode() -> Trajectory:
        async with Gateway() as gateway:
            env = FunctionAgentEnv(agent, tasks)
            return await run_agent_episode(attempt(), env, policy, chat, limits, gateway)

    trajectory: Trajectory = within(episode())
    return trajectory


def talk(
    policy: Any, chat: ChatTemplate, script: Callable[[Any, Session, str], Awaitable[Any]], **config: Any
) -> Any:
    """Let a script speak with a session through OpenAI's client; what it returns."""

    async def run() -> Any:
        async with Gateway(GatewayConfig(**config)) as gateway:
            with gateway.session(attempt(), policy, chat, LIMITS) as session:
                async with client(gateway.url, session.key) as model:
                    return await script(model, session, gateway.url)

    return within(run())


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def said(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


async def ask(model: Any, *messages: Any, **options: Any) -> Any:
    return await model.chat.completions.create(model="any", messages=list(messages), **options)


TURNS = (
    f"I look.\n{call('search', query='a')}",
    call("search", query="b") + call("write", query="c"),
    "It is 42.",
)


def test_sampled_tokens_are_the_tokens_of_the_next_prompt(chat: ChatTemplate) -> None:
    policy = Policy(chat, TURNS)
    trajectory = play(policy, chat, harness)
    assert trajectory.env_reward == 1.0
    assert (trajectory.stop_reason, trajectory.branches) == ("env_done", [])
    for before, drawn, after in zip(policy.prompts, policy.drawn, policy.prompts[1:], strict=False):
        assert after[: len(before) + len(drawn)] == [*before, *drawn]
    ids = trajectory.token_ids
    assert ids == [*policy.prompts[-1], *policy.drawn[-1]]
    positions = [index for index, sampled in enumerate(trajectory.sampled_mask) if sampled]
    assert trajectory.behaviour_logprobs == [-float(position) for position in positions]
    assert {trajectory.weight_versions[position] for position in positions} == {3}
    assert [message.role for message in trajectory.messages] == (
        ["system", "user", "assistant", "tool", "assistant", "tool", "tool", "assistant"]
    )
    assert [made.id for message in trajectory.messages for made in message.tool_calls] == [
        "functions.search:0",
        "functions.search:1",
        "functions.write:2",
    ]
    assert {sampling.temperature for sampling in policy.samplings} == {0.7}
    assert len({sampling.seed for sampling in policy.samplings}) == 3


def test_a_stream_says_what_a_plain_answer_says(chat: ChatTemplate) -> None:
    async def script(model: Any, session: Session, url: str) -> Any:
        plain = await ask(model, user("Go"), tools=TOOLS, logprobs=True)
        options = {"stream": True, "stream_options": {"include_usage": True}, "logprobs": True}
        chunks = [chunk async for chunk in await ask(model, user("Go"), tools=TOOLS, **options)]
        return plain, chunks

    plain, chunks = talk(Policy(chat, [TURNS[1], TURNS[1]], 1), chat, script)
    deltas = [chunk.choices[0].delta for chunk in chunks if chunk.choices]
    calls = [made for delta in deltas for made in delta.tool_calls or ()]
    (choice,) = plain.choices
    assert [(made.id, made.function.arguments) for made in calls] == [
        (made.id, made.function.arguments) for made in choice.message.tool_calls
    ]
    assert "".join(delta.content or "" for delta in deltas) == (choice.message.content or "")
    assert choice.finish_reason == "tool_calls"
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] == "tool_calls"
    assert chunks[-1].usage.completion_tokens == len(chunks[0].choices[0].logprobs.content)
    assert plain.usage.completion_tokens == len(choice.logprobs.content)


def test_edits_and_second_answers_become_branches_that_share_their_beginning(chat: ChatTemplate) -> None:
    policy = Policy(chat, ["one", "two", "other two", "three", "new one"])

    async def script(model: Any, session: Session, url: str) -> Trajectory:
        await ask(model, user("1"))
        await ask(model, user("1"), said("one"), user("2"))
        await ask(model, user("1"), said(" one\n"), user("2"))  # another answer, white space or not
        await ask(model, user("1"), said("one"), user("2"), said("two"), user("3"))
        await ask(model, user("1, edited"))
        return session.trajectory()

    main = talk(policy, chat, script)
    lines = [main, *main.branches]
    texts = [[message.content for message in line.messages] for line in lines]
    assert texts == [
        ["1, edited", "new one"],
        ["1", "one", "2", "two", "3", "three"],
        ["1", "one", "2", "other two"],
    ]
    assert [line.id for line in lines] == ["episode-0", "episode-0/branch-1", "episode-0/branch-2"]
    # Each sampled token is learned from once, whatever shares it.
    learned = [
        tuple(token for segment in line.segments if segment.sampled for token in segment.token_ids)
        for line in lines
    ]
    one, two, other, three, new = policy.drawn
    assert learned == [new, (*one, *two, *three), other]
    assert main.num_sampled == sum(map(len, policy.drawn))
    assert lines[2].token_ids[: len(policy.prompts[1])] == policy.prompts[1] == policy.prompts[2]


def _sampled(line: Trajectory) -> tuple[int, ...]:
    return tuple(token for segment in line.segments if segment.sampled for token in segment.token_ids)


def test_an_edited_answer_of_the_policys_is_no_longer_its_own(chat: ChatTemplate) -> None:
    policy = Policy(chat, ["one", "two"])

    async def script(model: Any, session: Session, url: str) -> Trajectory:
        await ask(model, user("1"))
        await ask(model, user("1"), said("uno"), user("2"))
        return session.trajectory()

    main = talk(policy, chat, script)
    assert [segment.sampled for segment in main.segments] == [False, True]
    assert chat.decode(main.segments[0].token_ids).count("uno") == 1
    assert [segment.sampled for segment in main.branches[0].segments] == [False, True]


def test_other_tools_are_another_beginning(chat: ChatTemplate) -> None:
    async def script(model: Any, session: Session, url: str) -> Trajectory:
        await ask(model, user("1"), tools=TOOLS)
        await ask(model, user("1"), said("one"), user("2"), tools=TOOLS[:1])
        return session.trajectory()

    main = talk(Policy(chat, ["one", "two"]), chat, script)
    assert len(main.branches) == 1


class Interrupted(Policy):
    """Breaks off each turn after five tokens, and once more; the weights are newer each time."""

    async def generate(self, prompt_ids: list[int], sampling: Sampling) -> Generation:
        if not self.drawn or self.left == ():
            self.left = (await super().generate(prompt_ids, sampling)).token_ids
            self.version = 0
        else:
            self.prompts.append(list(prompt_ids))
        ids, self.left, self.version = self.left[:5], self.left[5:], self.version + 1
        reason = "interrupted" if self.left else "stop"
        return Generation(ids, (-1.0,) * len(ids), ((0, self.version),), reason)


def test_a_turn_that_is_interrupted_goes_on_with_later_weights(chat: ChatTemplate) -> None:
    async def script(model: Any, session: Session, url: str) -> Any:
        answer = await ask(model, user("1"))
        return answer.choices[0], session.trajectory()

    policy = Interrupted(chat, ["a longer turn"])
    choice, trajectory = talk(policy, chat, script)
    assert (choice.message.content, choice.finish_reason) == ("a longer turn", "stop")
    (drawn,) = policy.drawn
    assert _sampled(trajectory) == drawn
    versions = [version for version in trajectory.weight_versions if version >= 0]
    assert versions == [1 + index // 5 for index in range(len(drawn))]
    assert policy.prompts[1] == [*policy.prompts[0], *drawn[:5]]


def test_branches_are_trained_on_with_their_episodes_advantage(chat: ChatTemplate) -> None:
    async def twice(model: Any, session: Session, url: str) -> Trajectory:
        await ask(model, user("1"))
        await ask(model, user("1"))
        return session.trajectory()

    async def once(model: Any, session: Session, url: str) -> Trajectory:
        await ask(model, user("1"))
        return session.trajectory()

    good, bad = talk(Policy(chat, ["a", "bc"]), chat, twice), talk(Policy(chat, ["d"]), chat, once)
    good.verdict, bad.verdict = Verdict.scored(1.0), Verdict.scored(0.0)
    ((first, second, third),), totals, shaped = policy_batch(Config(), [good, bad], 1, 3)
    assert [first.advantage, second.advantage, third.advantage] == [0.5, 0.5, -0.5]
    assert (totals.sequences, totals.tokens) == (3, good.num_sampled + bad.num_sampled)
    assert shaped == 0.5


@pytest.mark.parametrize(
    ("method", "path", "body", "key", "status"),
    [
        ("POST", "/chat/completions", b'{"messages": [{"role": "user", "content": "x"}]}', None, 401),
        ("POST", "/chat/completions", b'{"messages": [{"role": "user", "content": "x"}]}', "sk-guess", 401),
        ("GET", "/models", None, "sk-guess", 401),
        ("POST", "/chat/completions", b"\xc1 garbage", "own", 400),
        ("POST", "/chat/completions", b"[" * 100_000, "own", 400),
        ("POST", "/chat/completions", b'{"messages": []}', "own", 400),
        ("POST", "/chat/completions", b'{"messages": 3}', "own", 400),
        (
            "POST",
            "/chat/completions",
            b'{"messages": [{"role": "user", "content": "x"}], "n": 4}',
            "own",
            400,
        ),
        ("POST", "/chat/completions", b'{"messages": [{"role": "king", "content": "x"}]}', "own", 400),
        ("POST", "/chat/completions", b'{"messages": [{"role": "assistant", "content": "x"}]}', "own", 400),
        (
            "POST",
            "/chat/completions",
            b'{"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}',
            "own",
            400,
        ),
        (
            "POST",
            "/chat/completions",
            b'{"messages": [{"role": "user", "content": "x"}], "response_format": {"type": "json_object"}}',
            "own",
            400,
        ),
        ("POST", "/chat/completions", b" " * (2**20 + 1), "own", 413),
        ("PUT", "/chat/completions", b"{}", "own", 405),
        ("POST", "/embeddings", b"{}", "own", 404),
    ],
)
def test_what_is_refused_harms_nobody(
    chat: ChatTemplate, method: str, path: str, body: bytes | None, key: str | None, status: int
) -> None:
    async def script(model: Any, session: Session, url: str) -> Any:
        await ask(model, user("1"))
        headers = {} if key is None else {"Authorization": f"Bearer {session.key if key == 'own' else key}"}
        async with (
            aiohttp.ClientSession(headers=headers) as http,
            http.request(method, url + path, data=body) as reply,
        ):
            assert reply.status == status
            assert (await reply.json())["error"]["message"]
        await ask(model, user("1"), said("one"), user("2"))
        return session.trajectory()

    trajectory = talk(Policy(chat, ["one", "two"]), chat, script, body_mib=1)
    assert [message.content for message in trajectory.messages] == ["1", "one", "2", "two"]


def test_sessions_of_one_gateway_do_not_mix(chat: ChatTemplate) -> None:
    async def run() -> list[Trajectory]:
        env = FunctionAgentEnv(harness, tasks)
        async with Gateway() as gateway:
            return await asyncio.gather(
                *(
                    run_agent_episode(
                        attempt(number), env, Policy(chat, TURNS, number), chat, LIMITS, gateway
                    )
                    for number in range(20)
                )
            )

    trajectories = within(run())
    assert [len(trajectory.messages) for trajectory in trajectories] == [8] * 20
    assert all(trajectory.env_reward == 1.0 and not trajectory.branches for trajectory in trajectories)


def test_it_listens_on_loopback_and_a_key_ends_with_its_episode(chat: ChatTemplate) -> None:
    seen = []

    async def agent(task: Task, base_url: str, api_key: str) -> float:
        async with client(base_url, api_key) as model:
            assert [each.id async for each in model.models.list()] == ["policy"]
            await ask(model, user("1"))
        seen.append((base_url, api_key))
        return 1.0

    async def run() -> None:
        async with Gateway() as gateway:
            env = FunctionAgentEnv(agent, tasks)
            await run_agent_episode(attempt(), env, Policy(chat, ["one"]), chat, LIMITS, gateway)
            ((url, key),) = seen
            assert url.startswith("http://127.0.0.1:")
            async with client(url, key) as model:
                with pytest.raises(openai.AuthenticationError):
                    await ask(model, user("1"))

    within(run())


def test_an_address_that_cannot_be_bound_is_named() -> None:
    async def run() -> None:
        async with Gateway(GatewayConfig(host="192.0.2.1")):
            pass

    with pytest.raises(RunError, match="gateway.host=192.0.2.1"):
        within(run())


async def endless(task: Task, base_url: str, api_key: str) -> float:
    messages = [user("Go")]
    async with client(base_url, api_key) as model:
        while True:
            answer = await ask(model, *messages)
            messages += [said(answer.choices[0].message.content), user("And then?")]


@pytest.mark.parametrize(
    ("limits", "reason"),
    [
        (EpisodeLimits(3, 64, 4096, 4096), "max_turns"),
        (EpisodeLimits(64, 64, 20, 4096), "token_budget"),
        (EpisodeLimits(64, 64, 4096, 120), "context"),
    ],
)
def test_an_agent_that_runs_into_a_limit_has_ended_its_episode(
    chat: ChatTemplate, limits: EpisodeLimits, reason: str
) -> None:
    trajectory = play(Policy(chat, ["more"] * 64), chat, endless, limits)
    assert (trajectory.stop_reason, trajectory.env_reward) == (reason, 0.0)
    assert 0 < trajectory.num_sampled <= limits.token_budget
    assert len(trajectory.token_ids) <= limits.max_model_len


def test_an_agent_may_forget_and_go_on_when_the_context_is_full(chat: ChatTemplate) -> None:
    async def agent(task: Task, base_url: str, api_key: str) -> float:
        async with client(base_url, api_key) as model:
            with pytest.raises(openai.BadRequestError) as refused:
                await ask(model, user("long " * 100))
            assert refused.value.code == "context_length_exceeded"
            answer = await ask(model, user("short"))
            return float(answer.choices[0].message.content == "good")

    trajectory = play(Policy(chat, ["good"]), chat, agent, EpisodeLimits(9, 64, 4096, 100))
    assert (trajectory.stop_reason, trajectory.env_reward) == ("env_done", 1.0)


def test_a_turn_ends_where_the_agent_says_stop(chat: ChatTemplate) -> None:
    policy = Policy(chat, ["Action: look\nObservation: I made this up", "Done"])

    async def script(model: Any, session: Session, url: str) -> Any:
        first = await ask(model, user("1"), stop=["Observation:"])
        await ask(model, user("1"), said(first.choices[0].message.content), user("Observation: a cat"))
        return first, session.trajectory()

    first, trajectory = talk(policy, chat, script)
    assert first.choices[0].message.content == "Action: look\n"
    assert first.choices[0].finish_reason == "stop"
    assert trajectory.branches == []
    kept = trajectory.segments[1].token_ids
    assert kept == policy.drawn[0][: len(kept)]
    assert len(kept) < len(policy.drawn[0])
    assert chat.decode(kept).startswith("Action: look\nObservation:")
    assert trajectory.segments[2].token_ids[0] == chat.stop_token_ids[0]


class Raising:
    def __init__(self, error: Exception) -> None:
        self.error = error

    async def generate(self, prompt_ids: list[int], sampling: Sampling) -> Generation:
        raise self.error


def schedule(
    policy: Any, chat: ChatTemplate, env: Any, count: int = 1, **rollout: Any
) -> Sequence[Trajectory]:
    config = Config()
    for name, value in rollout.items():
        setattr(config.rollout, name, value)
    scheduler = RolloutScheduler(config, policy, chat, lambda: env, EnvironmentReward())
    trajectories: Sequence[Trajectory] = within(scheduler.run([attempt(number) for number in range(count)]))
    return trajectories


@pytest.mark.parametrize("stream", [False, True])
def test_a_dead_engine_ends_the_run_and_not_only_the_agent(chat: ChatTemplate, stream: bool) -> None:
    async def stubborn(task: Task, base_url: str, api_key: str) -> float:
        async with client(base_url, api_key) as model:
            while True:
                try:
                    answer = await ask(model, user("1"), stream=stream)
                    if stream:
                        _ = [chunk async for chunk in answer]
                except openai.APIError:
                    await asyncio.sleep(0)

    with pytest.raises(EngineDeadError, match="gone"):
        schedule(Raising(EngineDeadError("gone")), chat, FunctionAgentEnv(stubborn, tasks))


async def raises(task: Task, base_url: str, api_key: str) -> float:
    raise OSError("the browser is gone")


async def idle(task: Task, base_url: str, api_key: str) -> float:
    return 1.0


async def hangs(task: Task, base_url: str, api_key: str) -> float:
    await asyncio.Event().wait()
    return 1.0


async def nonsense(task: Task, base_url: str, api_key: str) -> Any:
    async with client(base_url, api_key) as model:
        await ask(model, user("1"))
    return "great"


@pytest.mark.parametrize(
    ("agent", "policy", "why"),
    [
        (raises, None, "OSError: the browser is gone"),
        (idle, None, "without asking the policy anything"),
        (hangs, None, "episode_deadline_s"),
        (nonsense, None, "returned 'great'"),
        (harness, Raising(GenerationError("cut")), "GenerationError: cut"),
    ],
)
def test_what_goes_wrong_is_a_failure_and_not_a_zero(
    chat: ChatTemplate, agent: Any, policy: Any, why: str
) -> None:
    policy = policy or Policy(chat, ["one"])
    (trajectory,) = schedule(policy, chat, FunctionAgentEnv(agent, tasks), episode_deadline_s=2.0)
    assert trajectory.failed
    assert trajectory.verdict is not None
    assert why in (trajectory.verdict.failure or "")


def test_an_agent_that_is_not_async_has_a_thread_of_its_own(chat: ChatTemplate) -> None:
    def agent(task: Task, base_url: str, api_key: str) -> tuple[float, dict[str, float]]:
        with openai.OpenAI(base_url=base_url, api_key=api_key, max_retries=0) as model:
            answer = model.chat.completions.create(model="any", messages=[user("1")])  # type: ignore[list-item]
        return 0.5, {"long": float(len(answer.choices[0].message.content or "") > 2)}

    (trajectory,) = schedule(Policy(chat, ["one"]), chat, FunctionAgentEnv(agent, tasks))
    assert trajectory.reward == 0.5
    assert trajectory.reward_components == {"long": 1.0}


COMMAND = """
import json, os, subprocess, sys, urllib.request
task = json.loads(sys.stdin.readline())
child = subprocess.Popen(["sleep", "1000"])
print("child", child.pid, file=open(sys.argv[1], "w"))
if task["data"]["question"] == "hang":
    child.wait()
body = json.dumps({"messages": [{"role": "user", "content": task["data"]["question"]}]}).encode()
request = urllib.request.Request(os.environ["OPENAI_BASE_URL"] + "/chat/completions", body)
request.add_header("Authorization", "Bearer " + os.environ["OPENAI_API_KEY"])
said = json.load(urllib.request.urlopen(request))["choices"][0]["message"]["content"]
print("thinking aloud")
print(json.dumps({"reward": 0.25, "components": {"length": len(said)}}))
"""


def test_a_command_is_an_agent_and_leaves_nothing_behind(chat: ChatTemplate, tmp_path: Path) -> None:
    (tmp_path / "agent.py").write_text(COMMAND)
    env = CommandAgentEnv([sys.executable, "agent.py", "pid"], tasks, cwd=str(tmp_path))
    (trajectory,) = schedule(Policy(chat, ["one"]), chat, env)
    assert (trajectory.reward, trajectory.reward_components) == (0.25, {"length": 3.0})
    pid = int((tmp_path / "pid").read_text().split()[1])
    end = time.monotonic() + 30
    while _runs(pid):  # it was killed, but the kernel takes its time
        assert time.monotonic() < end


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_command_that_fails_says_why(chat: ChatTemplate) -> None:
    env = CommandAgentEnv([sys.executable, "-c", "raise SystemExit('no browser')"], tasks)
    (trajectory,) = schedule(Policy(chat, []), chat, env)
    assert trajectory.verdict is not None
    assert "ended with code 1: no browser" in (trajectory.verdict.failure or "")
