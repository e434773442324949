"""A run's folder belongs to one process at a time."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from k2rl.cli import main
from k2rl.errors import ConfigError
from k2rl.ownership import owned

OWNER = """
import sys
from pathlib import Path
from k2rl.ownership import owned
with owned(Path(sys.argv[1]), fresh=True):
    print("mine", flush=True)
    sys.stdin.read()
"""


@pytest.mark.parametrize("fresh", [True, False])
def test_a_folder_has_one_owner_until_it_dies(tmp_path: Path, fresh: bool) -> None:
    run_dir = tmp_path / "run"
    root = Path(__file__).parents[2]
    owner = subprocess.Popen(
        [sys.executable, "-c", OWNER, str(run_dir)],
        cwd=root,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert owner.stdout is not None
    assert owner.stdout.readline() == "mine\n"
    with (
        pytest.raises(ConfigError, match="belongs to a k2rl that is still running") as error,
        owned(run_dir, fresh),
    ):
        pass
    assert "\n" not in str(error.value)
    owner.kill()
    owner.communicate()
    with owned(run_dir, fresh):
        pass
    with owned(run_dir, fresh):
        pass


@pytest.mark.parametrize("trace", ["checkpoints/step_000001/checkpoint.json", "metrics.jsonl"])
def test_a_fresh_run_takes_no_folder_of_an_earlier_one(tmp_path: Path, trace: str) -> None:
    (tmp_path / trace).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / trace).write_text("something")
    with pytest.raises(ConfigError, match=f"holds an earlier run; go on with it .resume={tmp_path}"):
        owned(tmp_path, fresh=True).__enter__()
    with owned(tmp_path, fresh=False):
        pass


def test_a_run_in_a_taken_folder_is_refused_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    run_dir = tmp_path / "run"
    with owned(run_dir, fresh=True), pytest.raises(SystemExit) as ending:
        main(["train", "experiment=tiny", f"hydra.run.dir={run_dir}"])
    assert ending.value.code == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith(f"k2rl: {run_dir} belongs to a k2rl that is still running")
    assert "\n" not in error
    assert [path.name for path in run_dir.iterdir()] == [".lock"]


def test_resume_and_multirun_exclude_each_other(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "overrides.yaml").write_text("- experiment=tiny\n")
    assert main(["train", "-m", f"resume={tmp_path}", "seed=1,2"]) == 2
    assert "leave out --multirun" in capsys.readouterr().err


def test_a_refused_resume_leaves_the_folder_as_it_was(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "overrides.yaml").write_text("- experiment=tiny\n")
    assert main(["train", f"resume={tmp_path}", "optimizer=adamw"]) == 2
    assert "no whole checkpoint" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["overrides.yaml"]
    assert (tmp_path / "overrides.yaml").read_text() == "- experiment=tiny\n"
