import os
import subprocess
import sys
from itertools import islice
from pathlib import Path

import msgspec

from envs.calculator import CalculatorEnv

SCRIPT = """
import sys

BLOCKED = {"torch", "ray", "vllm", "transformers", "hydra", "omegaconf"}

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in BLOCKED:
            raise ImportError(f"{name} is blocked")

sys.meta_path.insert(0, Blocker())

import asyncio
from itertools import islice

import envs, rubrics, sandboxes
import envs.calculator, rubrics.registry, sandboxes.arithmetic
import envs.agents, envs.service.remote, k2rl.serving.server, k2rl.serving_command
import envs.coding.single_turn, envs.coding.debugging, envs.coding.swe, envs.reasoning_gym
import msgspec
from k2rl.types import Trajectory

env = envs.make("calculator")
tasks = list(islice(env.tasks("eval", 0), 3))
task = tasks[0]
env.reset(seed=0, options={"task": task})
total = 0.0
for turn in env.demonstration(task):
    messages, reward, terminated, truncated, info = env.step(turn)
    total += reward
assert terminated
trajectory = Trajectory(id="t", group_id="g", task=task, temperature=1.0, env_reward=total)
verdict = asyncio.run(rubrics.judge_safely(envs.rubric_of(env), trajectory, 5.0))
assert verdict.value == 1.0, verdict
assert not BLOCKED & set(sys.modules)
print(msgspec.json.encode(tasks).decode())
"""


def test_an_episode_runs_without_torch_ray_or_vllm():
    root = Path(__file__).parents[2]
    ran = subprocess.run(
        [sys.executable, "-W", "error", "-c", SCRIPT],
        cwd=root,
        env={**os.environ, "PYTHONPATH": str(root), "PYTHONHASHSEED": "7"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    # Another process with another hash seed draws the same tasks.
    here = list(islice(CalculatorEnv().tasks("eval", 0), 3))
    assert ran.stdout.strip() == msgspec.json.encode(here).decode()
