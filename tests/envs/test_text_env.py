import asyncio
from itertools import count

import pytest

from envs import TextEnv, maybe_await
from envs.base import TextEnv as Base
from k2rl.types import Message, Task
from rubrics import EnvironmentReward


class EchoEnv(TextEnv):
    """Says back what it hears."""

    def tasks(self, split, seed):
        for index in count():
            yield Task(id=f"{split}/{seed}/{index}", env="echo", kind="default", split=split, seed=index)

    def reset(self, *, seed=None, options=None):
        task = self.start_episode(seed, options)
        return (Message(role="user", content=task.id),), {}

    def step(self, action):
        return (Message(role="user", content=action),), 0.0, False, False, {}


class AsyncEchoEnv(EchoEnv):
    async def reset(self, *, seed=None, options=None):
        await asyncio.sleep(0)
        return super().reset(seed=seed, options=options)

    async def step(self, action):
        await asyncio.sleep(0)
        return super().step(action)


def test_gymnasium_accepts_an_environment_of_a_few_lines(check_gymnasium):
    check_gymnasium(EchoEnv())


def test_defaults():
    env = EchoEnv()
    assert isinstance(env.rubric, EnvironmentReward)
    assert env.kinds == ("default",)
    assert env.demonstration(next(env.tasks("train", 0))) is None


def test_spaces_are_not_shared_between_instances():
    first, second = EchoEnv(), EchoEnv()
    assert first.action_space == second.action_space
    assert first.action_space is not second.action_space


def test_a_seed_draws_a_training_task():
    env = EchoEnv()
    first, again = env.reset(seed=5)[0], env.reset(seed=5)[0]
    assert first == again
    assert first[0].content.startswith("train/")
    env.reset(seed=5)
    following = [env.reset()[0] for _ in range(3)]
    env.reset(seed=5)
    assert following == [env.reset()[0] for _ in range(3)]
    assert len({first, *following}) == 4


def test_the_given_task_is_played():
    env = EchoEnv()
    task = next(env.tasks("eval", 9))
    assert env.reset(seed=1, options={"task": task})[0][0].content == task.id


def test_super_reset_seeds_as_gymnasium_says():
    env = EchoEnv()
    Base.reset(env, seed=11)
    assert env.np_random_seed == 11


def test_a_task_of_another_environment_is_refused():
    env = EchoEnv()
    stranger = Task(id="chess/1", env="chess", kind="mate", split="train", seed=0)
    with pytest.raises(ValueError, match=r"chess/1 is of kind 'mate', but EchoEnv\.kinds is \('default',\)"):
        env.reset(options={"task": stranger})
    with pytest.raises(TypeError, match="is dict, not a Task"):
        env.reset(options={"task": {"id": "chess/1"}})


def test_environments_may_be_asynchronous(play):
    task = next(EchoEnv().tasks("train", 0))
    assert play(AsyncEchoEnv(), task, ["a", "b"]) == play(EchoEnv(), task, ["a", "b"])


def test_snapshots_are_optional():
    env = EchoEnv()
    task = next(env.tasks("train", 0))
    env.reset(options={"task": task})
    assert env.snapshot() is None
    with pytest.raises(NotImplementedError, match="EchoEnv takes no snapshots"):
        EchoEnv().restore(task, b"")


def test_maybe_await():
    async def later():
        return 2

    async def scenario():
        return await maybe_await(1), await maybe_await(later())

    assert asyncio.run(scenario()) == (1, 2)


def test_an_incomplete_environment_cannot_be_made():
    class Incomplete(TextEnv):
        def step(self, action):
            raise NotImplementedError

    with pytest.raises(TypeError, match="reset"):
        Incomplete()
