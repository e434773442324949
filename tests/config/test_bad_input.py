"""Wrong input: one clear line, before anything heavy starts."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from k2rl import composition
from k2rl.choices import config_groups
from k2rl.cli import main

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
