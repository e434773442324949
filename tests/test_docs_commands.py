"""Every command in README.md and docs/ works as written, or is on a list here that says why it is not run."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import entry_points
from pathlib import Path
from shutil import which

import pytest

from k2rl import sft
from k2rl.composition import compose
from k2rl.preflight import preflight
from tests.conftest import ROOT
from tests.integration.test_tiny_run import MULTIRUN

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
SHELLS = ("bash", "sh", "console")


def _says(expected: str) -> Callable[[Path, str], None]:
    def check(cwd: Path, out: str) -> None:
        assert expected in out

    return check


#: Run as they stand, with what must come of them.
QUICK: dict[str, Callable[[Path, str], None]] = {
    "source .venv/bin/activate": _says(""),
    "k2rl --help": _says("k2rl train experiment=quickstart"),
    "k2rl train --cfg experiment=quickstart": _says("path: smollm2-135m"),
    "k2rl envs list": _says("calculator"),
    "k2rl plan model=kimi_k2 dtype=fp8 cluster=h20 gpus=256 strategy=broadcast output=json": _says(
        '"simulated": true'
    ),
    "k2rl eval suite=functions model=gold": _says("functions gold: 12/12"),
    "k2rl eval suite=functions model=null": _says("functions null: 0/12"),
    "k2rl eval suite=twenty_four model=gold env.tries=1 limit=16": _says("twenty_four gold: 16/16"),
    "k2rl judge answers.jsonl reward=math": _says("agreement with 2 labels: 100.0%"),
    "k2rl eval suite=calculator model=null limit=4 samples=2 out=profile": _says("calculator null:"),
    "k2rl difficulty --help": _says("guess=RESULTS"),
    "k2rl sandbox doctor": _says("bubblewrap: works"),
    "python run_it.py": _says("hello\nexited 0\ntimed_out"),
    "k2rl envs check guess:GuessEnv": _says("guess:GuessEnv: no fault"),
    "k2rl envs new my_envs": _says("k2rl envs check my_envs"),
}
#: Train a tiny model for real; tests/integration/test_sft_run.py does more of it. Here their checks are made.
FINE_TUNED = [
    "k2rl sft experiment=tiny data.path=curated",
    "k2rl sft experiment=tiny data.path=chats.jsonl data.held_out_share=0.3",
    "k2rl sft experiment=tiny data.path=curated lora.rank=4 'lora.target_modules=[q_proj,v_proj]'",
]
#: Trains for minutes; tests/integration/test_k2_mini.py runs it.
LONG = ["k2rl train experiment=k2_mini"]
#: Run by a fixture, whose folders many tests look at.
ELSEWHERE = [MULTIRUN]
#: Whole runs, of which only the start-up checks are made here, with a tiny model: two train a real one for
#: minutes, and the others are like the many tiny runs of tests/integration.
WHOLE_RUNS = [
    "k2rl train experiment=tiny env.id=guess:GuessEnv",
    "k2rl train experiment=tiny rollout=partial temperature=constant",
    "k2rl train experiment=tiny lora.rank=8",
    "k2rl train experiment=quickstart env.service.workers=2",
    "k2rl train experiment=quickstart optimizer=adamw rollout.group_size=16 seed=1",
    "k2rl train experiment=quickstart env.id=guess:GuessEnv env.max_turns=6 'warm_start.kinds=[]'",
    "k2rl train experiment=tiny env=agent env.kwargs.agent=my_agent:play env.kwargs.tasks=my_agent:tasks "
    "budget.default=64",
]
#: Need services on several nodes; tests/envs/test_service.py serves and plays on this one.
SERVICES = [
    "k2rl envs serve calculator max_calls=3 --host 0.0.0.0 --processes 4 --token-file token.txt",
    "k2rl train experiment=quickstart env=remote "
    "'env.kwargs.urls=[http://node1:8030,http://node1:8031,http://node2:8030]'",
]
#: Need a trained model, a server, or a repository of the reader's; tests/evaluation and tests/envs run such.
OWN_MODEL = [
    "k2rl eval suite=humaneval model=outputs/quickstart/2026-01-31_12-00-00/model limit=20",
    "k2rl eval suite=humaneval model=http://127.0.0.1:8000/v1 samples=10 k=1,10 temperature=0.8",
    "k2rl swe build path/to/repository tasks",
    "k2rl eval suite=swe path=tasks/tasks.jsonl model=gold",
]
#: Run one after the other.
COMPARED = [
    "k2rl eval suite=functions model=null out=first",
    "k2rl eval suite=functions model=gold out=second",
    "k2rl eval compare first second",
]
#: Measures for half a minute; tests/checkpoint_engine/test_plan_command.py runs it with small pushes.
MEASURES = ["k2rl plan calibrate"]
#: Not run, since one installs and trains for minutes and the other is what runs this test: what make would do
#: is looked at.
MAKE = ["make quickstart", "make test"]


def commands() -> list[str]:
    """All lines of the pages' shell blocks, without prompts and comments."""
    found = []
    for page in PAGES:
        for language, block in FENCE.findall(page.read_text(encoding="utf-8")):
            if language in SHELLS:
                lines = block.replace("\\\n", " ").splitlines()
                if language == "console":
                    lines = [line.removeprefix("$ ") for line in lines if line.startswith("$ ")]
                found += [re.sub(r"(^|\s+)#.*", "", line).strip() for line in lines]
    return [command for command in dict.fromkeys(found) if command]


def test_every_command_is_accounted_for() -> None:
    listed = [
        *QUICK,
        *ELSEWHERE,
        *FINE_TUNED,
        *LONG,
        *WHOLE_RUNS,
        *OWN_MODEL,
        *SERVICES,
        *COMPARED,
        *MEASURES,
        *MAKE,
    ]
    unknown = [command for command in commands() if command not in listed]
    assert not unknown, "in the docs; run it here, or list it with the reason why not"
    assert not [command for command in listed if command not in commands()], "no longer in the docs"


def test_no_command_hides_in_a_block_without_language() -> None:
    for page in PAGES:
        for language, block in FENCE.findall(page.read_text(encoding="utf-8")):
            hidden = re.findall(r"^\$? ?(?:k2rl|make|pip|python|source) .*$", block, re.MULTILINE)
            assert language in SHELLS or not hidden, (page.name, hidden)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A working folder with `.venv`, and the files that the pages tell the reader to save."""
    (tmp_path / ".venv").symlink_to(sys.prefix)
    for page in PAGES:
        saved = re.findall(r"Save this as `(\S+)`:\n\n```\w+\n(.*?)^```$", page.read_text(), re.DOTALL | re.M)
        for name, text in saved:
            (tmp_path / name).write_text(text)
    return tmp_path


def _run(command: str, cwd: Path) -> str:
    done = subprocess.run(
        ["bash", "-ec", f"source .venv/bin/activate\n{command}"],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.mark.parametrize("command", QUICK)
def test_quick_command(command: str, folder: Path) -> None:
    QUICK[command](folder, _run(command, folder))


def test_two_evaluations_are_compared(folder: Path) -> None:
    for command in COMPARED:
        said = _run(command, folder)
    assert "difference +1.000" in said


@pytest.mark.parametrize("command", WHOLE_RUNS)
def test_whole_run_passes_the_start_up_checks(
    command: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program, action, *overrides = shlex.split(command)
    assert (program, action) == ("k2rl", "train")
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(folder)
    # A byte-level tokenizer makes prompts longer than the real model's context was chosen for.
    config = compose([*overrides, "model=tiny", "inference.max_model_len=4096"])
    assert preflight(config).eval_tasks


@pytest.mark.parametrize("command", FINE_TUNED)
def test_fine_tuning_passes_the_start_up_checks(
    command: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program, action, *overrides = shlex.split(command)
    assert (program, action) == ("k2rl", "sft")
    monkeypatch.chdir(folder)
    texts = sft.prepare(compose(overrides))
    assert texts.train
    assert texts.held_out


def test_make_targets_exist_and_call_what_is_there() -> None:
    """Those in the text too."""
    pages = " ".join(page.read_text(encoding="utf-8") for page in PAGES)
    targets = set(re.findall(r"(?:`|^)make ([a-z-]+)", pages, re.MULTILINE))
    assert targets >= {command.removeprefix("make ") for command in MAKE}
    scripts = {script.name for script in entry_points(group="console_scripts")} | {"python", "pip"}
    for target in targets:
        done = subprocess.run(
            ["make", "-n", "--no-print-directory", "-o", ".venv/.installed", target],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        for line in done.stdout.splitlines():
            word = line.split()[0]
            assert Path(word).name in scripts or which(word) or (ROOT / word).exists(), line


def test_the_tests_that_pages_name_are_there() -> None:
    named = {
        found for page in PAGES for found in re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", page.read_text())
    }
    assert named
    missing = [(file, test) for file, test in named if f"def {test}(" not in (ROOT / file).read_text()]
    assert not missing
