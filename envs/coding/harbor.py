"""Harbor's task folders as episodes: a shell in the task's environment, and its own verifier in the end."""

from __future__ import annotations

import asyncio
import hashlib
import json
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec

from envs.base import ResetResult, StepResult
from envs.coding.harbor_tasks import HarborTask, load_harbor
from envs.coding.judging import shared_judge
from envs.coding.problems import EVAL_ONE_IN, shuffled
from envs.coding.tools import USAGE, Workspace, WorkspaceEnv
from envs.tools import calling
from k2rl.errors import ConfigError
from k2rl.types import Message, Split, Task
from rubrics.code.judge import JudgeError, ending
from sandboxes.base import Backend, Limits
from sandboxes.errors import SandboxFileError

SYSTEM = f"You are an expert who gets things done in a terminal.\n{USAGE}"
#: Where Harbor's scripts expect things, and where that is in a sandbox.
LINKS = {"/logs": "/tmp/logs", "/tests": "/tmp/tests", "/solution": "/tmp/solution"}
WORKING_FOLDER = {"/app": "/work"}
KEPT = "/opt/k2rl-working-folder"
"""Where an image keeps the files of its working folder, which a sandbox copies to where it may write."""


class HarborEnv(WorkspaceEnv):
    """Tasks in Harbor's format: a shell and file tools; the task's own verifier gives the reward, 0 to 1.

    A task whose environment has no Dockerfile begins with the files of `environment/` in its working folder
    (`/app` leads there), and runs in any sandbox. With one, or with a `docker_image`, it needs
    `sandbox=docker`, and a Python in the image. There is no network. The policy's time is the task's
    `agent.timeout_sec`: after it, what there is gets judged.

    Components: what the verifier names in `reward.json`, `calls` and `bad_calls`.
    """

    kinds = ("harbor",)

    def __init__(self, folder: str | None = None, sandbox: str = "bubblewrap") -> None:
        """`folder`: of one task, or of many; None: our own small set.

        Raises:
            ConfigError: one line: no such folder, or a task that is wrong or cannot be had here.
        """
        super().__init__()
        self.sandbox = sandbox
        self.harbor_tasks = load_harbor(folder)
        for task in self.harbor_tasks:
            if task.needs_image and sandbox != "docker":
                raise ConfigError(f"task {task.folder} has an image of its own: it needs sandbox=docker")
        self._task: HarborTask | None = None
        self._ends = 0.0

    def tasks(self, split: Split, seed: int) -> Iterator[Task]:
        """The tasks of a split in an order that the seed shuffles, again and again.

        Raises:
            ConfigError: the split has none.
        """
        chosen = [task for task in self.harbor_tasks if _split_of(task) == split]
        if not chosen:
            raise ConfigError(f"harbor: none of its {len(self.harbor_tasks)} tasks is in the {split} split")
        for place, task in shuffled(chosen, split, seed):
            yield _as_task(task, split, f"harbor/{split}/{seed}/{place}", seed)

    def all_tasks(self) -> list[Task]:
        """Every task once, as an evaluation wants them."""
        return [_as_task(task, "eval", task.id, 0) for task in self.harbor_tasks]

    def demonstration(self, task: Task) -> list[str | Message] | None:
        """Its `solution/solve.sh`."""
        solution = _of_data(task).files("solution")
        if "solve.sh" not in solution:
            return None
        folder = LINKS["/solution"]
        written = [
            calling("write_file", n, path=f"{folder}/{path}", content=content.decode("utf-8", "replace"))
            for n, (path, content) in enumerate(solution.items())
        ]
        n = len(written)
        return [*written, calling("shell", n, command="bash /solution/solve.sh"), calling("submit", n + 1)]

    async def reset(  # type: ignore[override]
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> ResetResult:
        """Begin an episode in a sandbox of its own.

        Raises:
            SandboxError: it could not be opened, or its image not be made.
        """
        task = self.start_episode(seed, options)
        await self.close()
        self._task = harbor = _of_data(task)
        backend = shared_judge(self.sandbox).backend
        self._workspace = await _opened(backend, harbor)
        self._ends = time.monotonic() + harbor.agent_s
        return (Message("system", SYSTEM), Message("user", harbor.instruction)), {"task": task}

    async def step(self, action: str) -> StepResult:  # type: ignore[override]
        """Do a tool call, or judge what there is."""
        if self._workspace is not None and time.monotonic() > self._ends:
            return await self.judge_workspace(self._workspace)
        return await super().step(action)

    async def judged(self, workspace: Workspace) -> StepResult:
        """What the verifier says.

        Raises:
            JudgeError: the verifier gave no reward, or none between 0 and 1: there is no score.
            SandboxError: the sandbox failed.
        """
        assert self._task is not None
        reward, components, detail = await _verified(workspace, self._task)
        return (), reward, True, False, {"reward_components": components, "detail": detail}


async def _opened(backend: Backend, task: HarborTask) -> Workspace:
    limits = Limits(
        wall_seconds=task.verifier_s,
        cpu_seconds=task.verifier_s,
        memory_bytes=task.memory_bytes,
        disk_bytes=min(task.disk_bytes, task.memory_bytes),
        pids=256,
    )
    if not task.needs_image:
        files = task.files("environment")
        return await Workspace.open(backend, files, limits=limits, links={**LINKS, **WORKING_FOLDER})
    image = await _image(task)
    workspace = await Workspace.open(backend, {}, image, limits=limits)
    copied = await workspace.sandbox.exec(["cp", "-r", f"{KEPT}/.", "."])
    if not copied.ok:
        await workspace.close()
        raise JudgeError(f"task {task.id}: its working folder cannot be copied: {ending(copied)}")
    return workspace


_IMAGES: dict[str, asyncio.Task[str]] = {}


async def _image(task: HarborTask) -> str:
    """The image that a task's sandboxes are made of; made once for equal environments.

    Raises:
        SandboxError: a step of its Dockerfile failed, or no daemon answers.
    """
    parts = sorted(task.files("environment").items())
    digest = hashlib.sha256(repr((task.image, LINKS, KEPT, parts)).encode()).hexdigest()[:16]
    if digest not in _IMAGES or _IMAGES[digest].get_loop() is not asyncio.get_running_loop():
        _IMAGES[digest] = asyncio.ensure_future(asyncio.to_thread(_built, task, f"k2rl-harbor:{digest}"))
    try:
        return await asyncio.shield(_IMAGES[digest])
    except Exception:
        _IMAGES.pop(digest, None)  # the next one may try again
        raise


def _built(task: HarborTask, name: str) -> str:
    from sandboxes.docker import images
    from sandboxes.docker.daemon import connect

    client = connect(images.BUILD_SECONDS)
    try:
        if client.images.list(name):
            return name
        base = task.image
        if not base:
            base = images.from_dockerfile(client, Path(task.folder) / "environment", f"{name}-base")
        return images.relocated(client, base, LINKS, KEPT, name)
    finally:
        client.close()


async def _verified(workspace: Workspace, task: HarborTask) -> tuple[float, dict[str, float], str]:
    """Run `tests/test.sh` where the policy worked, and read what it wrote under `/logs/verifier`."""
    sandbox, tests, logs = workspace.sandbox, LINKS["/tests"], f"{LINKS['/logs']}/verifier"
    await sandbox.exec(["rm", "-rf", tests, LINKS["/logs"]])
    await sandbox.exec(["mkdir", "-p", logs])
    try:
        await sandbox.upload({f"{tests}/{path}": content for path, content in task.files("tests").items()})
    except SandboxFileError as error:
        return 0.0, {}, f"the policy left no room for the tests: {error}"
    ran = await sandbox.exec(
        ["bash", "/tests/test.sh"], env=task.verifier_env or None, timeout=task.verifier_s
    )
    for name in ("reward.json", "reward.txt"):
        try:
            text = (await sandbox.read_file(f"{logs}/{name}")).decode("utf-8", "replace")
        except SandboxFileError:
            continue
        return *_reward(task, name, text), ran.text[-2000:]
    raise JudgeError(
        f"task {task.id}: its verifier wrote no reward: {ending(ran)}\n{(ran.text + ran.error_text)[-1000:]}"
    )


def _reward(task: HarborTask, name: str, text: str) -> tuple[float, dict[str, float]]:
    try:
        if name == "reward.txt":
            components: dict[str, float] = {}
            reward = float(text)
        else:
            components = {str(key): float(value) for key, value in json.loads(text).items()}
            reward = (
                components["reward"] if "reward" in components else sum(components.values()) / len(components)
            )
        if not all(map(math.isfinite, (reward, *components.values()))) or not 0 <= reward <= 1:
            raise ValueError("not between 0 and 1")
    except (ValueError, TypeError, AttributeError, ZeroDivisionError, RecursionError) as error:
        raise JudgeError(f"task {task.id}: its verifier wrote {text[:100]!r} to {name}: {error}") from error
    return reward, components


def _as_task(task: HarborTask, split: Split, id: str, seed: int) -> Task:
    data = msgspec.json.decode(msgspec.json.encode(task))
    return Task(id=id, env="harbor", kind="harbor", split=split, seed=seed, data=data)


def _of_data(task: Task) -> HarborTask:
    return msgspec.convert(task.data, HarborTask)


def _split_of(task: HarborTask) -> Split:
    digest = hashlib.sha256(task.id.encode()).digest()
    return "eval" if int.from_bytes(digest[:4], "big") % EVAL_ONE_IN == 0 else "train"
