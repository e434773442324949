"""Wrong input: one clear line, before anything heavy starts."""

from __future__ import annotations

import json
import logging
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import envs
from k2rl import composition
from k2rl.choices import config_groups
from k2rl.cli import main
from k2rl.models.hub import resolve_model

CASES = {
    "unknown key": (["rollout.grup_size=4"], "did you mean rollout.group_size?"),
    "unknown key of its own": (["+foo.bar=4"], "foo"),
    "wrong type": (["rollout.group_size=many"], "rollout.group_size"),
    "unknown choice": (["optimizer=sgd"], "optimizer/sgd"),
    "unknown environment": (["env.id=calculater"], "calculator"),
    "not a class": (["env.id=math:sqrt"], "math"),
    "no model there": (["model.path=/nowhere"], "/nowhere"),
    "not a model": (["model.path=/usr"], "/usr"),
    "group of one": (["rollout.group_size=1"], "rollout.group_size=1"),
    "budget above the context": (["budget.default=4000"], "inference.max_model_len"),
    "budget and prompt above the context": (["budget.default=500"], "inference.max_model_len"),
    "budget of an unknown kind": (["+budget.per_kind.juggling=10"], "juggling"),
    "schedule": (["temperature.schedule=stairs"], "temperature.schedule"),
    "resume from nowhere": (["resume=/nowhere"], "resume=/nowhere"),
    "warm start kind": (["warm_start.steps=1", "warm_start.kinds=[juggling]"], "juggling"),
    "kinds that are never drawn": (
        [
            "warm_start=easy",
            "warm_start.steps=1",
            "warm_start.demos_per_step=1",
            "+env.kwargs.mix.subtract=1",
        ],
        "have 0 of warm_start.kinds=['add']",
    ),
    "demonstrations cut off": (["warm_start=easy", "env.max_turns=1"], "cut off by env.max_turns=1"),
    "not set yet": (["env.kwargs.mix.subtract=1"], "add it with a plus sign: +env.kwargs.mix.subtract=1"),
    "engine argument": (["+inference.engine_args.blok_size=16"], "did you mean block_size?"),
    "engine argument of ours": (["+inference.engine_args.load_format=auto"], "load_format cannot be set"),
    "experts of a model without them": (["inference.return_routed_experts=true"], "deepseek_v3, kimi_k2"),
    "engine argument that has a key": (
        ["+inference.engine_args.enable_return_routed_experts=true"],
        "inference.return_routed_experts",
    ),
    "adapters of layers that are not there": (
        ["lora.rank=2", "lora.target_modules=[q_proj,query]"],
        "lora.target_modules names 'query', but the linear layers of model",
    ),
    "adapters larger than layers": (["lora.rank=4096"], "lora.rank=4096 makes the adapter of"),
    "adapters of a negative rank": (["lora.rank=-1"], "lora.rank=-1 must be a finite number, at least 0"),
    "adapters that do nothing": (["lora.rank=2", "lora.alpha=0"], "lora.alpha=0.0 must be a finite number"),
    "targets without adapters": (["lora.target_modules=[q_proj]"], "does nothing with lora.rank=0"),
    "adapters and QK-Clip": (["lora.rank=2", "optimizer.qk_clip=100"], "set optimizer.qk_clip=0"),
    "adapters and balanced routers": (
        ["lora.rank=2", "optimizer.router_bias_rate=0.001"],
        "set optimizer.router_bias_rate=0",
    ),
    "adapters for those that read them": (
        ["lora.rank=2", "checkpoint_engine.strategy=shard_aware"],
        "checkpoint_engine.strategy=shard_aware is for pushes of all weights",
    ),
    "no such strategy": (["checkpoint_engine.strategy=p2p"], "not one of: broadcast, shard_aware, delta"),
    "no room for a push": (["checkpoint_engine.memory_mib=0.1"], "checkpoint_engine.memory_mib"),
    "long chat": (["train.micro_batch_tokens=20"], "train.micro_batch_tokens=20"),
    "no curated chats": (["ptx.path=/nowhere.jsonl"], "/nowhere.jsonl"),
}


@pytest.mark.parametrize("case", CASES)
def test_one_line_and_exit_code_2(
    case: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    overrides, expected = CASES[case]
    monkeypatch.chdir(tmp_path)
    assert main(["train", "experiment=tiny", *overrides]) == 2
    error = capsys.readouterr().err.strip()
    assert expected in error
    assert error.startswith("k2rl: ")
    assert "\n" not in error
    assert not (tmp_path / "outputs").exists()


def test_a_ptx_chat_that_gives_an_evaluation_task_away(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    task = next(envs.make("calculator").tasks("eval", 0))
    messages = [
        {"role": "user", "content": f"A riddle: {task.data['question']}"},
        {"role": "assistant", "content": str(task.data["answer"])},
    ]
    (tmp_path / "chats.jsonl").write_text(json.dumps({"messages": messages}))
    monkeypatch.chdir(tmp_path)
    assert main(["train", "experiment=tiny", "ptx.path=chats.jsonl"]) == 2
    error = capsys.readouterr().err.strip()
    assert f"chats.jsonl, chat 1 holds a part of evaluation task {task.id}: " in error
    assert "\n" not in error


def test_a_judge_that_raises(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "raising_judge.py").write_text(
        "from rubrics.base import Rubric\n"
        "class Raising(Rubric):\n"
        "    async def judge(self, trajectory):\n"
        "        raise RuntimeError('no such file: gold.json')\n"
    )
    monkeypatch.chdir(tmp_path)
    assert main(["train", "experiment=tiny", "rubric.id=raising_judge:Raising"]) == 2
    error = capsys.readouterr().err.strip()
    assert "RuntimeError: no such file: gold.json" in error
    assert "\n" not in error


PRELUDE = "import threading\nfrom itertools import islice\nfrom envs.calculator import CalculatorEnv\n"
BAD_ENVIRONMENTS = {
    "a constructor that raises": (
        "def __init__(self):\n        raise OSError('no container runtime')",
        "OSError: no container runtime",
    ),
    "a close() that raises": ("def close(self):\n        raise OSError('it runs on')", "close(): OSError"),
    "no training tasks": (
        "def tasks(self, split, seed):\n"
        "        return super().tasks(split, seed) if split == 'eval' else iter(())",
        "gives only 0 training tasks, but a step draws rollout.tasks_per_step=2",
    ),
    "too few training tasks": (
        "def tasks(self, split, seed):\n"
        "        return islice(super().tasks(split, seed), None if split == 'eval' else 1)",
        "gives only 1 training tasks",
    ),
    "what is no task": ("def tasks(self, split, seed):\n        yield {'question': '1 + 1'}", "dict is no"),
    "a demonstration that ends too soon": (
        "def demonstration(self, task):\n        return ['calc(1)']",
        "its script is at its end, but the episode is not",
    ),
}


@pytest.mark.parametrize("case", BAD_ENVIRONMENTS)
def test_a_bad_environment_is_one_line(
    case: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    method, expected = BAD_ENVIRONMENTS[case]
    module = f"bad_env_{list(BAD_ENVIRONMENTS).index(case)}"
    (tmp_path / f"{module}.py").write_text(f"{PRELUDE}class Bad(CalculatorEnv):\n    {method}\n")
    monkeypatch.chdir(tmp_path)
    assert main(["train", "experiment=tiny", f"env.id={module}:Bad"]) == 2
    error = capsys.readouterr().err.strip()
    assert expected in error
    assert "\n" not in error


def test_an_environment_that_hangs_in_preflight_ends_the_command(tmp_path: Path) -> None:
    """In a process of its own: its end must not wait for the thread that never ends."""
    (tmp_path / "hanging.py").write_text(
        f"{PRELUDE}class Hanging(CalculatorEnv):\n"
        "    def step(self, action):\n        threading.Event().wait()\n"
        "    def close(self):\n        raise OSError('told by the log alone')\n"
    )
    deadlines = ["rollout.episode_deadline_s=0.5", "deadlines.generate_s=0.1"]
    done = subprocess.run(
        [sys.executable, "-m", "k2rl.cli", "train", "experiment=tiny", "env.id=hanging:Hanging", *deadlines],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 2, done.stderr
    assert "not done within rollout.episode_deadline_s=0.5 s" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_a_sliding_window_is_found_before_anything_starts(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    model = tmp_path / "sliding"
    shutil.copytree(resolve_model("tiny-qwen3"), model)
    config = json.loads((model / "config.json").read_text())
    config |= {"use_sliding_window": True, "sliding_window": 4}
    config["layer_types"] = ["sliding_attention", *config["layer_types"][1:]]
    (model / "config.json").write_text(json.dumps(config))
    monkeypatch.chdir(tmp_path)
    assert main(["train", "experiment=tiny", f"model.path={model}"]) == 2
    assert "has layers with sliding_attention" in capsys.readouterr().err


@pytest.mark.parametrize("folder", ["nosuch", "."])
def test_a_report_of_what_is_no_run(
    folder: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["report", folder]) == 2
    assert capsys.readouterr().err == f"k2rl: {folder} is not the folder of a run (no config.yaml in it)\n"
    assert not list(tmp_path.iterdir())


def test_a_folder_called_as_one_of_our_packages_is_no_trouble(tmp_path: Path) -> None:
    (tmp_path / "envs").mkdir()
    (tmp_path / "envs" / "__init__.py").write_text("raise ImportError('the wrong package')")
    # -P as for an installed command: Python itself does not put the working folder first.
    done = subprocess.run(
        [sys.executable, "-P", "-m", "k2rl.cli", "envs", "list"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "calculator" in done.stdout


def test_every_job_of_a_multirun_is_checked_first(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["train", "-m", "experiment=tiny", "rollout.group_size=4,1"]) == 2
    assert "rollout.group_size=1" in capsys.readouterr().err
    assert not (tmp_path / "outputs").exists()


def test_the_command_itself_exits_with_2(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "k2rl.cli", "train", "experiment=tiny", "rollout.group_size=1"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 2
    assert len(done.stderr.strip().splitlines()) == 1


def test_every_experiment_composes() -> None:
    for name in config_groups()["experiment"]:
        assert composition.compose([f"experiment={name}"]).name == name


def test_a_multirun_expands_to_its_jobs() -> None:
    jobs = composition.jobs(["experiment=tiny", "seed=1,2", "rollout.group_size=2,4"], multirun=True)
    configs = [composition.compose(job) for job in jobs]
    assert [(c.seed, c.rollout.group_size) for c in configs] == [(1, 2), (1, 4), (2, 2), (2, 4)]


def test_resume_takes_up_the_overrides(tmp_path: Path) -> None:
    (tmp_path / "overrides.yaml").write_text("- experiment=tiny\n- seed=5\n- train.steps=2\n")
    config = composition.compose(composition.resumed([f"resume={tmp_path}", "train.steps=9"]))
    assert (config.seed, config.train.steps, config.model.path) == (5, 9, "tiny-qwen3")


def test_the_config_reference_is_current() -> None:
    script = Path(__file__).parents[2] / "docs" / "config_reference.py"
    done = subprocess.run([sys.executable, str(script), "--check"], check=False, timeout=60)
    assert done.returncode == 0, "run `make docs`"


def test_hydra_leaves_our_loggers_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own way to be quiet would switch off every logger made before, and leave driver.log empty."""
    monkeypatch.chdir(tmp_path)
    logger = logging.getLogger("k2rl.made_before_hydra")
    composition.run_jobs(["experiment=tiny"], False, lambda config, run_dir: int(logger.disabled))
