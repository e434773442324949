"""Death, interruption and failure of real runs: named, quick, nothing left behind, nothing lost."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file

from k2rl.evaluation.results import load_result
from k2rl.models.hub import resolve_model
from k2rl.rollouts.recording import read_recording
from k2rl.tracking.metrics import read_metrics
from k2rl.tracking.timeline import read_timeline
from k2rl.training.checkpoint import checkpoint_folder, checkpoints
from k2rl.training.saving import read_state
from k2rl.types import NO_WEIGHT_VERSION
from k2rl.workers.process import shared_memory_of
from tests.integration.conftest import Command, wait_for

pytestmark = pytest.mark.integration

SECONDS_TO_NOTICE = 30.0

Start = Callable[..., Command]


def _steps(run_dir: Path) -> list[int]:
    path = run_dir / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [json.loads(line)["step"] for line in lines]


def _start_long_run(start: Start, tmp_path: Path, *overrides: str) -> tuple[Command, Path]:
    run_dir = tmp_path / "run"
    command = start(
        "train", "experiment=tiny", "train.steps=1000", f"hydra.run.dir={run_dir}", *overrides, cwd=tmp_path
    )
    wait_for(lambda: bool(_steps(run_dir)) or command.process.poll() is not None, "the first step")
    assert command.process.poll() is None, command.finish()
    return command, run_dir


@pytest.mark.parametrize(
    "victim", ["VLLM::EngineCore", pytest.param("ray::ColocatedWorker", marks=pytest.mark.slow)]
)
def test_a_killed_part_is_named_and_nothing_hangs(victim: str, start: Start, tmp_path: Path) -> None:
    """Where nothing is to be started again; `test_recovery.py` has what happens else."""
    command, _ = _start_long_run(start, tmp_path, "recovery.max_restarts=0")
    segments = _shared_memory(command)
    assert segments
    command.named(victim).kill()
    code, _, err = command.finish(SECONDS_TO_NOTICE)
    assert code == 1
    assert "worker 0 died" in err
    assert ("vLLM engine" in err) == victim.startswith("VLLM")
    assert "worker-0.log" in err
    wait_for(lambda: not command.descendants(), "all processes end", 90)
    assert not [segment for segment in segments if segment.exists()]


def _masters(folder: Path) -> dict[str, torch.Tensor]:
    state = read_state(folder)
    return {name[8:]: weights for name, weights in state.items() if name.startswith("masters/")}


def _shared_memory(command: Command) -> set[Path]:
    """Of all processes of a run."""
    command.look()
    return shared_memory_of(*(process.pid for process in command.descendants()))


@pytest.mark.slow  # four starts; .ci/run has it
def test_a_run_killed_resumed_interrupted_and_resumed(start: Start, tmp_path: Path) -> None:
    # The record says which temperature is next: any reward of the first step lowers it.
    triggered = ("temperature=reward", "temperature.reward_at=-1", "temperature.reward_steps=1")
    command, run_dir = _start_long_run(
        start, tmp_path, "train.checkpoint_every=1", "train.offload=file", *triggered
    )
    wait_for(lambda: _newest(run_dir) >= 1, "a checkpoint")
    command.look()
    command.process.kill()
    command.finish(90)
    wait_for(lambda: _only_agents_left(command), "all that computes for the killed run ends", 30)
    killed_at = _newest(run_dir)
    torn = checkpoint_folder(run_dir, 999)
    torn.mkdir()
    (torn / "__0_0.distcp").write_bytes(b"half of it")

    resumed = start("train", f"resume={run_dir}", cwd=tmp_path)
    wait_for(lambda: _newest(run_dir) > killed_at or resumed.process.poll() is not None, "a new checkpoint")
    assert not torn.exists()
    code, _, err = start("train", f"resume={run_dir}", cwd=tmp_path).finish(60)
    assert (code, len(err.strip().splitlines())) == (2, 1), err
    assert "belongs to a k2rl that is still running" in err
    resumed.process.send_signal(signal.SIGINT)
    code, _, err = resumed.finish(60)
    assert code == 130, err
    assert f"resume={run_dir}" in err
    wait_for(lambda: not resumed.descendants(), "all processes end", 90)

    done = _steps(run_dir)[-1]
    assert checkpoints(run_dir)[-1] == (done, checkpoint_folder(run_dir, done))
    saved = _masters(checkpoint_folder(run_dir, done))
    # A step that moves no weight: what comes out is what was loaded.
    code, _, err = start(
        "train", f"resume={run_dir}", f"train.steps={done + 1}", "optimizer.lr=1e-12", cwd=tmp_path
    ).finish()
    assert code == 0, err
    _assert_one_run_of(done + 1, run_dir)
    episodes = [read_recording(run_dir, step).trajectories[0] for step in range(1, done + 2)]
    assert [episode.temperature for episode in episodes] == [1.0] + [0.8] * done
    final, initial = (
        load_file(folder / "model.safetensors") for folder in (run_dir / "model", resolve_model("tiny-qwen3"))
    )
    assert final.keys() == saved.keys()
    for name, tensor in final.items():
        torch.testing.assert_close(tensor, saved[name], rtol=0, atol=1e-9)
        assert not torch.equal(tensor, initial[name]), "nothing was trained"
    wait_for(lambda: not command.descendants(), "all processes of the killed run end", 90)


def _only_agents_left(command: Command) -> bool:
    """Ray's two small agents look for their dead server for about a minute before they end."""
    try:
        return all(process.name().endswith("Agent") for process in command.descendants())
    except psutil.NoSuchProcess:
        return False


def _newest(run_dir: Path) -> int:
    return max((step for step, _ in checkpoints(run_dir)), default=-1)


def _assert_one_run_of(steps: int, run_dir: Path) -> None:
    """The record of a run that was resumed is that of one run."""
    assert _steps(run_dir) == list(range(1, steps + 1))
    assert json.loads((run_dir / "summary.json").read_text())["steps"] == steps
    assert read_metrics(run_dir)[-1]["train/lr"] == 1e-12
    after = load_result(run_dir / "evaluations" / "after.json")
    versions = {version for trajectory in after.examples for version in trajectory.weight_versions}
    assert versions == {NO_WEIGHT_VERSION, steps}


@pytest.mark.slow
def test_a_second_ctrl_c_does_not_wait_for_the_checkpoint(start: Start, tmp_path: Path) -> None:
    command, run_dir = _start_long_run(start, tmp_path, "train.checkpoint_every=0")
    segments = _shared_memory(command)
    assert segments
    # Saving lasts for ever: the worker, which would do it, stands still.
    command.named("ray::ColocatedWorker").suspend()
    command.process.send_signal(signal.SIGINT)
    assert command.process.stdout is not None
    assert any("Ctrl-C again stops at once" in line for line in command.process.stdout)
    command.process.send_signal(signal.SIGINT)
    code, _, err = command.finish(10)
    assert code == 130
    assert err == ""
    wait_for(lambda: not command.descendants(), "all processes end", 10)
    assert not [segment for segment in segments if segment.exists()]
    assert [path.name for path in (run_dir / "checkpoints").iterdir()] == ["step_000000"]


def test_vllm_that_cannot_start_is_reported_with_its_log(start: Start, tmp_path: Path) -> None:
    command = start(
        "train",
        "experiment=tiny",
        "inference.kv_cache_gib=100000",
        f"hydra.run.dir={tmp_path / 'run'}",
        cwd=tmp_path,
    )
    code, _, err = command.finish()
    assert code == 1
    assert "vLLM engine of worker 0 died while starting" in err
    assert "if it is short of memory, lower inference.kv_cache_gib=100000" in err
    wait_for(lambda: not command.descendants(), "all processes end", 90)


@pytest.mark.slow
def test_a_failing_job_of_a_multirun_ends_it_with_its_exit_code(start: Start, tmp_path: Path) -> None:
    command = start(
        "train",
        "--multirun",
        "experiment=tiny",
        "cluster.gpus_per_worker=1000,0",
        f"hydra.sweep.dir={tmp_path / 'runs'}",
        cwd=tmp_path,
    )
    code, _, err = command.finish()
    assert code == 2
    assert "cluster.gpus_per_worker=1000" in err
    assert len(err.splitlines()) == 1
    assert [path.name for path in (tmp_path / "runs").iterdir() if path.is_dir()] == ["0"]
    wait_for(lambda: not command.descendants(), "all processes end", 90)


@pytest.mark.slow
def test_all_failed_rollouts_stop_the_run_with_the_reason(start: Start, tmp_path: Path) -> None:
    (tmp_path / "broken_env.py").write_text(
        "from envs.calculator import CalculatorEnv\n"
        "class BrokenEnv(CalculatorEnv):\n"
        "    played = []\n"
        "    def step(self, action):\n"
        "        if self.task.split == 'train' and len(self.played) > 8:\n"
        "            raise OSError('the database is gone')\n"
        "        return super().step(action)\n"
        "    def reset(self, *, seed=None, options=None):\n"
        "        self.task = options['task']\n"
        "        if self.task.split == 'train':\n"
        "            self.played.append(self.task)\n"
        "        return super().reset(seed=seed, options=options)\n"
    )
    run_dir = tmp_path / "run"
    command = start(
        "train",
        "experiment=tiny",
        "env.id=broken_env:BrokenEnv",
        "train.checkpoint_every=0",
        f"hydra.run.dir={run_dir}",
        cwd=tmp_path,
    )
    code, _, err = command.finish()
    assert code == 1
    assert "step 2: 8 of 8 episodes failed" in err
    assert "OSError: the database is gone" in err
    # The finished step is kept, and told of.
    assert [step for step, _ in checkpoints(run_dir)] == [0, 1]
    assert json.loads((run_dir / "summary.json").read_text())["steps"] == 1
    assert (run_dir / "report.html").stat().st_size > 0


@pytest.mark.slow
def test_a_loss_that_is_not_finite_leaves_the_last_good_step(start: Start, tmp_path: Path) -> None:
    (tmp_path / "exploding_judge.py").write_text(
        "from k2rl.types import Verdict\n"
        "from rubrics import Rubric\n"
        "class Exploding(Rubric):\n"
        "    reward_range = (0.0, 1e30)\n"
        "    async def judge(self, trajectory):\n"
        "        best = trajectory.id.endswith('-0')\n"
        "        return Verdict.scored(best * (1e30 if trajectory.id.startswith('step2-') else 1.0))\n"
    )
    run_dir = tmp_path / "run"
    command = start(
        "train",
        "experiment=tiny",
        "train.steps=3",
        "train.checkpoint_every=1",
        "rubric.id=exploding_judge:Exploding",
        f"hydra.run.dir={run_dir}",
        cwd=tmp_path,
    )
    code, _, err = command.finish()
    assert code == 1
    assert err.startswith("k2rl: policy loss is inf at update 2; sequences step2-")
    assert len(err.splitlines()) == 1
    assert _steps(run_dir) == [1]
    assert [phase.phase for phase in read_timeline(run_dir) if phase.step == 2] == ["rollout", "train"]
    steps, folders = zip(*checkpoints(run_dir), strict=True)
    assert steps == (0, 1)
    assert read_state(folders[-1])["step_count"] == 1
    assert all(weights.isfinite().all() for weights in _masters(folders[-1]).values())
    wait_for(lambda: not command.descendants(), "all processes end", 90)
