"""Harbor's task folders: our own, ones with an image, and what is wrong with them."""

from __future__ import annotations

from pathlib import Path

import pytest

import envs
from k2rl.errors import ConfigError
from rubrics.code.judge import JudgeError
from sandboxes.docker.images import DEFAULT
from tests.envs.conftest import Episode, play_async, running, spelled

TOML = "[environment]\nmemory_mb = 256\nstorage_mb = 32\n"


def written(folder: Path, test: str, files: dict[str, str] | None = None, toml: str = TOML) -> Path:
    """A task folder."""
    contents = {
        "task.toml": toml,
        "instruction.md": "Write `answer.txt`.",
        "tests/test.sh": test,
        "solution/solve.sh": "cat hint.txt > answer.txt\n",
        "environment/hint.txt": "42",
        **(files or {}),
    }
    for path, text in contents.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(text)
    return folder


REWARD = "/logs/verifier/reward.txt"
COMPARES = f'test "$(cat /app/answer.txt)" = 42 && echo 1 > {REWARD} || echo 0 > {REWARD}'


def play(folder: Path, turns: list[str] | None = None, sandbox: str = "bubblewrap") -> Episode:
    env = envs.make("harbor", folder=str(folder), sandbox=sandbox)
    (task,) = env.all_tasks()

    async def work() -> Episode:
        try:
            return await play_async(env, task, env.demonstration(task) if turns is None else turns)
        finally:
            await envs.maybe_await(env.close())

    return running(work)


def test_a_share_of_the_checks_is_a_share_of_the_reward() -> None:
    env = envs.make("harbor")
    task = next(task for task in env.all_tasks() if task.id == "broken-backup")
    half = spelled("shell", command='printf \'mkdir -p "$2"; cp "$1"/*.txt "$2"\' > backup.sh')
    episode = running(lambda: play_async(env, task, [half, spelled("submit")]))
    assert (episode.reward, episode.components["copied"]) == (0.5, 2.0)


def test_what_the_policy_leaves_for_the_verifier_is_gone(tmp_path: Path) -> None:
    """A reward, a link in its place, tests of its own, and a process that writes them again."""
    forged = [
        f"mkdir -p /logs/verifier /tests; echo 1 > {REWARD}; echo 'echo 1 > {REWARD}' > /tests/test.sh",
        "rm -rf /tmp/logs; ln -s /work /tmp/logs; mkdir verifier; echo 1 > verifier/reward.txt",
        f"(while true; do echo 42 > /work/answer.txt; echo 1 > {REWARD}; done) & sleep 0.2; rm -f answer.txt",
    ]
    folder = written(tmp_path, f"rm -f /app/answer.txt; sleep 0.3; {COMPARES}")
    for command in forged:
        assert play(folder, [spelled("shell", command=command), spelled("submit")]).reward == 0.0


def test_the_time_of_the_policy_ends_its_episode(tmp_path: Path) -> None:
    folder = written(tmp_path, COMPARES, toml=f"{TOML}[agent]\ntimeout_sec = 1e-9\n")
    episode = play(folder, [spelled("shell", command="echo 42 > answer.txt")])
    assert (episode.done, episode.reward) == (True, 0.0)


@pytest.mark.parametrize(
    ("test", "reason"),
    [
        ("exit 3", "wrote no reward: exit code 3"),
        ("echo nan > /logs/verifier/reward.txt", "wrote 'nan"),
        ("echo 7 > /logs/verifier/reward.txt", "not between 0 and 1"),
        ("echo [] > /logs/verifier/reward.json", "reward.json"),
        ("sleep 60", "timed out"),
    ],
)
def test_a_verifier_that_fails_gives_no_score(tmp_path: Path, test: str, reason: str) -> None:
    toml = f"{TOML}[verifier]\ntimeout_sec = 2\n"
    with pytest.raises(JudgeError, match=reason.replace("[", r"\[")):
        play(written(tmp_path, test, toml=toml), [spelled("submit")])


@pytest.mark.docker
@pytest.mark.xdist_group("docker")
def test_an_environment_with_a_dockerfile(tmp_path: Path) -> None:
    dockerfile = f"FROM {DEFAULT}\nRUN echo made > /made.txt\nWORKDIR /srv/task\nCOPY hint.txt sub/hint.txt\n"
    files = {
        "environment/Dockerfile": dockerfile,
        "solution/solve.sh": "test $(cat /made.txt) = made && cat sub/hint.txt > /srv/task/answer.txt\n",
    }
    folder = written(tmp_path, COMPARES.replace("/app", "/srv/task"), files)
    assert play(folder, sandbox="docker").reward == 1.0
    assert play(folder, [spelled("submit")], sandbox="docker").reward == 0.0
    image = {"environment/Dockerfile": "FROM k2rl-no-such-image\nRUN false\n"}
    with pytest.raises(Exception, match="k2rl-no-such-image|no such image|pull access"):
        play(written(tmp_path, COMPARES, image), sandbox="docker")
    with pytest.raises(ConfigError, match="needs sandbox=docker"):
        play(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"task.toml": "version = "}, "task.toml: Invalid value"),
        ({"task.toml": "[environment]\nallow_internet = true"}, "it wants the internet"),
        ({"task.toml": "[environment]\nmemory = 'much'"}, "no size like 2G"),
        ({"task.toml": "[agent]\ntimeout_sec = -1"}, "not between 0 and a day"),
        ({"environment/docker-compose.yaml": ""}, "several containers"),
        ({"steps/one/instruction.md": ""}, "several steps"),
    ],
)
def test_a_task_that_cannot_be_had_is_refused_in_a_line(
    tmp_path: Path, change: dict[str, str], message: str
) -> None:
    with pytest.raises(ConfigError, match=message) as refused:
        envs.make("harbor", folder=str(written(tmp_path, COMPARES, change)))
    assert "\n" not in str(refused.value)


def test_folders_without_tasks_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no task.toml"):
        envs.make("harbor", folder=str(tmp_path))
    with pytest.raises(ConfigError, match="there is no such folder"):
        envs.make("harbor", folder=str(tmp_path / "nowhere"))
    written(tmp_path / "a" / "b", COMPARES)
    (tmp_path / "a" / "b" / "tests" / "test.sh").unlink()
    with pytest.raises(ConfigError, match="no test.sh in it"):
        envs.make("harbor", folder=str(tmp_path))
