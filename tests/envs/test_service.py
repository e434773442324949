"""Environments over HTTP: the client is an environment, and nothing that goes wrong is a score."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Awaitable, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import aiohttp
import msgspec
import pytest
from served_envs import Moody

import envs.registry
from envs.service import remote, wire
from envs.service.remote import EnvironmentServiceError, RemoteEnv
from k2rl.authoring.check import Settings, check
from k2rl.config import Config
from k2rl.errors import ConfigError
from k2rl.inference.engine import Generation, Sampling
from k2rl.models.chat import ChatTemplate
from k2rl.models.hub import resolve_model
from k2rl.rollouts.episode import Attempt
from k2rl.rollouts.scheduler import RolloutScheduler
from k2rl.types import Message, Task, Trajectory
from sandboxes.wire import CONTENT_TYPE
from tests.conftest import ROOT

TOKEN = "for-these-tests-alone"
HERE = Path(__file__).parent

pytestmark = pytest.mark.xdist_group("environment_service")


class Served:
    def __init__(self, *words: str) -> None:
        variables = {**os.environ, wire.TOKEN_VARIABLE: TOKEN, "PYTHONPATH": f"{HERE}:{ROOT}"}
        command = [sys.executable, "-m", "k2rl.cli", "envs", "serve", *words]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=variables)

    def line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def url(self) -> str:
        line = self.line()
        assert " at http://" in line, line
        return line.rpartition(" ")[2]


@contextmanager
def served(*words: str) -> Iterator[Served]:
    service = Served(*words)
    try:
        yield service
    finally:
        service.process.terminate()
        service.process.wait(60)


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    """A service with short leases, and room for three."""
    words = ("--port", "0", "--episodes", "3", "--lease", "1", "--call-seconds", "2", "--body-mib", "1")
    with served("served_envs:Moody", "greeting=Hm?", *words) as service:
        yield service.url()


@pytest.fixture(scope="module")
def chat() -> ChatTemplate:
    return ChatTemplate.from_pretrained(resolve_model("tiny-qwen3"))


def run(work: Awaitable[Any]) -> Any:
    return asyncio.run(asyncio.wait_for(work, 90))  # type: ignore[arg-type]


def made(*urls: str, **options: Any) -> RemoteEnv:
    return RemoteEnv(list(urls), TOKEN, **options)


def task(number: int = 0, **data: Any) -> Task:
    return Task(f"t{number}", "moody", "calm", "train", number, data)


async def closed(env: RemoteEnv) -> None:
    closing = env.close()
    if closing is not None:
        await closing


class Says:
    """A policy that says the next of its turns in each episode."""

    def __init__(self, chat: ChatTemplate, *turns: str) -> None:
        self._chat, self._turns = chat, turns
        self.asked = 0

    async def generate(self, prompt_ids: list[int], sampling: Sampling) -> Generation:
        number = self._chat.decode(prompt_ids).count("You said")
        ids = tuple(self._chat.turn_ids(self._turns[number]))
        self.asked += 1
        return Generation(ids, (0.0,) * len(ids), ((0, 0),), "stop")


def schedule(
    policy: Any, chat: ChatTemplate, env: RemoteEnv, count: int = 1, **rollout: Any
) -> list[Trajectory]:
    config = Config()
    for name, value in rollout.items():
        setattr(config.rollout, name, value)

    def make_env() -> RemoteEnv:
        return RemoteEnv(env._urls, env._token)

    scheduler = RolloutScheduler(config, policy, chat, make_env, env.rubric)
    attempts = [Attempt(f"a{n}", "g", task(n), 1.0, n) for n in range(count)]
    trajectories: list[Trajectory] = run(scheduler.run(attempts))
    return trajectories


def test_a_service_is_the_environment_that_it_serves(url: str, chat: ChatTemplate) -> None:
    env, local = made(url), Moody("Hm?")
    assert env.kinds == local.kinds
    assert [*islice(env.tasks("eval", 5), 300)] == [*islice(local.tasks("eval", 5), 300)]
    assert env.demonstration(task()) == local.demonstration(task())
    (trajectory,) = schedule(Says(chat, "hello", "end"), chat, env)
    assert [message.content for message in trajectory.messages] == (
        ["Hm? t0", "hello", "You said hello.", "end", "You said end."]
    )
    assert (trajectory.reward, trajectory.reward_components) == (0.5, {"said": 2.0})
    assert trajectory.stop_reason == "env_done"


def test_it_is_made_by_configuration_alone(url: str) -> None:
    env = envs.registry.make("remote", urls=[url], token=TOKEN)
    assert isinstance(env, RemoteEnv)
    with pytest.raises(ConfigError, match="no environment service"):
        envs.registry.make("remote")
    with pytest.raises(ConfigError, match="is no address of an environment service"):
        envs.registry.make("remote", urls=["localhost:1"])
    with pytest.raises(ConfigError, match=r"environment service http://127\.0\.0\.1:1 is gone"):
        envs.registry.make("remote", urls="http://127.0.0.1:1")


def test_a_served_environment_is_as_sound_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    with served("calculator", "max_calls=3", "--port", "0") as service:
        monkeypatch.setenv(wire.SERVICES_VARIABLE, service.url())
        monkeypatch.setenv(wire.TOKEN_VARIABLE, TOKEN)
        findings = run(check("remote", {}, Settings(tasks=1, deadline_s=60)))
        assert [finding for finding in findings if finding.status == "FAULT"] == []
        assert len(findings) > 5


def test_more_episodes_than_there_is_room_for_wait_for_it(url: str, chat: ChatTemplate) -> None:
    trajectories = schedule(Says(chat, "hello", "end"), chat, made(url), count=9)
    assert [trajectory.failed for trajectory in trajectories] == [False] * 9


@pytest.mark.parametrize(
    ("said", "why"),
    [
        ("raise", "step of served_envs:Moody raised OSError: the database is gone"),
        ("hang", "step of served_envs:Moody is not done after 2 s"),
        ("nonsense", "step gave 'great', not a tuple of 5"),
    ],
)
def test_what_the_environment_does_wrong_fails_its_episode_and_no_other(
    url: str, chat: ChatTemplate, said: str, why: str
) -> None:
    class Mixed(Says):
        async def generate(self, prompt_ids: list[int], sampling: Sampling) -> Generation:
            self._turns = (said,) if "t1" in self._chat.decode(prompt_ids) else ("hello", "end")
            return await super().generate(prompt_ids, sampling)

    good, bad, other = schedule(Mixed(chat), chat, made(url), count=3)
    assert (good.failed, other.failed) == (False, False)
    assert bad.verdict is not None
    assert bad.verdict.value is None
    assert why in (bad.verdict.failure or "")
    # Its place is free again.
    assert not any(each.failed for each in schedule(Says(chat, "hello", "end"), chat, made(url), count=3))


def test_an_episode_past_its_deadline_leaves_its_place(url: str, chat: ChatTemplate) -> None:
    env = made(url)
    trajectories = schedule(Says(chat, "hang"), chat, env, count=3, episode_deadline_s=1.0)
    assert all(trajectory.failed for trajectory in trajectories)
    assert not any(each.failed for each in schedule(Says(chat, "hello", "end"), chat, env, count=3))


def test_what_is_no_message_and_no_task_is_said_to_be_so() -> None:
    with served("served_envs:Forgetful", "--port", "0") as service:
        env = made(service.url())
        with pytest.raises(EnvironmentServiceError, match="tasks gave nonsense"):
            next(env.tasks("train", 0))
        with pytest.raises(EnvironmentServiceError, match="reset gave 'hello' for a message"):
            run(env.reset(options={"task": task()}))


def test_a_rubric_of_its_own_judges_where_the_environment_is(chat: ChatTemplate) -> None:
    with served("served_envs:Judged", "--port", "0") as service:
        env = made(service.url())
        assert env.rubric.reward_range == (-1.0, 2.0)
        # `end` ends it, and is not shouted.
        (trajectory,) = schedule(Says(chat, "end"), chat, env)
        assert (trajectory.reward, trajectory.verdict.components) == (-1.0, {"length": 3.0})  # type: ignore[union-attr]


STEP = msgspec.msgpack.encode(wire.Step(action="hello"))


@pytest.mark.parametrize(
    ("method", "path", "body", "headers", "status"),
    [
        ("GET", "/v1/about", None, {"Authorization": ""}, 401),
        ("POST", "/v1/episodes", STEP, {"Authorization": "Bearer guess"}, 401),
        ("POST", "/v1/episodes", b"\xc1 garbage", {}, 400),
        ("POST", "/v1/tasks", msgspec.msgpack.encode({"split": "train"}), {}, 400),
        (
            "POST",
            "/v1/tasks",
            msgspec.msgpack.encode({"split": "train", "seed": 0, "start": 0, "count": 10**9}),
            {},
            400,
        ),
        ("POST", "/v1/judge", b"\x93", {}, 400),
        ("POST", "/v1/episodes", bytes(2**21), {}, 413),
        ("POST", "/v1/episodes", STEP, {"Content-Type": "text/plain"}, 415),
        ("POST", "/v1/episodes/guess", STEP, {}, 410),
        ("POST", "/v1/renew", STEP, {}, 400),
        ("PUT", "/v1/episodes", STEP, {}, 405),
        ("GET", "/", None, {}, 404),
        ("GET", "/health", None, {"Authorization": ""}, 200),
    ],
)
def test_a_request_that_is_refused_harms_nobody(
    url: str, method: str, path: str, body: bytes | None, headers: dict[str, str], status: int
) -> None:
    async def scenario() -> None:
        env = made(url)
        await env.reset(options={"task": task()})
        known = {"Authorization": f"Bearer {TOKEN}", "Content-Type": CONTENT_TYPE, **headers}
        async with (
            aiohttp.ClientSession(headers=known) as session,
            session.request(method, url + path, data=body) as reply,
        ):
            assert reply.status == status
        assert (await env.step("hello"))[0] == (Message("user", "You said hello."),)
        await closed(env)

    run(scenario())


def test_a_wrong_token_is_said_to_be_one(url: str) -> None:
    with pytest.raises(EnvironmentServiceError, match="wrong or missing token"):
        RemoteEnv([f"{url}/"], "another-token-than-theirs")._ask_now("/v1/about", None, wire.About, 10)


@pytest.fixture(autouse=True)
def _forget(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "_known", {})


def test_a_lease_is_kept_by_the_client_and_ends_without_one(url: str) -> None:
    async def scenario() -> None:
        env = made(url)
        await env.reset(options={"task": task()})
        await asyncio.sleep(2.5)  # two leases
        await env.step("hello")
        assert env._episode is not None
        service = env._episode._service
        assert service._heart is not None
        service._heart.cancel()
        async with asyncio.timeout(30), aiohttp.ClientSession() as session:
            while (await (await session.get(f"{url}/health")).json())["open"]:
                await asyncio.sleep(0.1)
        with pytest.raises(EnvironmentServiceError, match="its lease ended"):
            await env.step("hello")
        await closed(env)

    run(scenario())


def test_a_service_that_is_killed_fails_what_it_plays_and_the_others_go_on(chat: ChatTemplate) -> None:
    with (
        served("served_envs:Moody", "--port", "0") as doomed,
        served("served_envs:Moody", "--port", "0") as other,
    ):
        env = made(doomed.url(), other.url())
        playing = 0

        class Killing(Says):
            async def generate(self, prompt_ids: list[int], sampling: Sampling) -> Generation:
                nonlocal playing
                playing += 1
                if playing == 20:
                    doomed.process.kill()
                while playing < 20:
                    await asyncio.sleep(0.01)
                return await super().generate(prompt_ids, sampling)

        trajectories = schedule(
            Killing(chat, "hello", "hello", "end"), chat, env, count=40, max_concurrent=20
        )
        failed = [trajectory for trajectory in trajectories if trajectory.failed]
        assert 5 <= len(failed) <= 20  # those that it played
        for trajectory in failed:
            assert trajectory.verdict is not None
            assert "environment service" in (trajectory.verdict.failure or "")
            assert trajectory.verdict.value is None
        assert {trajectory.reward for trajectory in trajectories if not trajectory.failed} == {0.75}


def test_one_of_several_processes_that_dies_is_started_again(chat: ChatTemplate, tmp_path: Path) -> None:
    with served("served_envs:Moody", "--port", str(_free_ports()), "--processes", "2") as services:
        urls = sorted([services.url(), services.url()])
        pids = _children(services.process.pid)
        assert len(pids) == 2
        os.kill(pids[0], signal.SIGKILL)
        assert services.line() == "a service has died (exit code -9) and is started again"
        assert services.url() in urls
        trajectories = schedule(Says(chat, "end"), chat, made(*urls), count=4)
        assert not any(trajectory.failed for trajectory in trajectories)
        pids = _children(services.process.pid)
        services.process.kill()
        services.process.wait()
        for pid in pids:  # they see that nobody is there
            _gone(pid)


def _gone(pid: int) -> None:
    end, command = time.monotonic() + 60, Path(f"/proc/{pid}/cmdline")
    while command.exists() and command.read_bytes():  # empty: nobody has asked yet how it ended
        assert time.monotonic() < end
        time.sleep(0.05)


def _children(pid: int) -> list[int]:
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def _free_ports() -> int:
    """The first of two that are free."""
    for port in range(20000 + os.getpid() % 10000, 60000, 2):
        try:
            for each in (port, port + 1):
                with socket.create_server(("127.0.0.1", each)):
                    pass
        except OSError:
            continue
        return port
    raise AssertionError("no ports")


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (("calculator", "--host", "0.0.0.0"), "give it a token"),
        (("calculator", "--processes", "2", "--port", "0"), "--port to count from"),
        (("calculator", "max_calls"), "'max_calls' is not KEY=VALUE"),
        (("calculater",), "unknown environment 'calculater'"),
        (("calculator", "--call-seconds", "0"), "--call-seconds"),
    ],
)
def test_what_cannot_be_served_is_one_line(
    words: tuple[str, ...], why: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from k2rl.cli import main

    monkeypatch.delenv(wire.TOKEN_VARIABLE, raising=False)
    assert main(["envs", "serve", *words]) == 2
    assert why in capsys.readouterr().err
