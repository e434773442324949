"""What environments of a run share ends with the run, not with the process."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.integration, pytest.mark.slow]

RUN = """
import sys
import psutil
from k2rl.cli import main

if __name__ == "__main__":  # Ray and vLLM start processes that import this
    code = main(sys.argv[1:])
    children = [" ".join(child.cmdline()) for child in psutil.Process().children()]
    print("ended", code, [words for words in children if "bubblewrap.keeper" in words])
"""


def test_no_sandbox_outlives_a_run(tmp_path: Path) -> None:
    words = ["experiment=tiny", "env=python_math", "warm_start=none", "debug=rollout_only", "train.steps=1"]
    more = ["inference.max_model_len=1024", "rollout.max_tokens_per_turn=8", "env.eval_tasks=2"]
    (tmp_path / "run.py").write_text(RUN)
    command = [sys.executable, "run.py", "train", *words, *more]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=400, check=False)
    assert done.stdout.splitlines()[-1] == "ended 0 []", done.stdout + done.stderr
