"""The wheel holds what an installed k2rl needs beside its code, and only our packages."""

from __future__ import annotations

import subprocess
import zipfile
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.installation import base_alone, environment, install

# With those that also need the wheel: it is built once for them all.
pytestmark = pytest.mark.xdist_group("tiny_run")

PACKAGES = ("k2rl", "envs", "rubrics", "sandboxes")


@pytest.fixture(scope="module")
def names(wheel: Path) -> list[str]:
    return zipfile.ZipFile(wheel).namelist()


def test_every_file_of_the_packages_is_in_the_wheel(names: list[str]) -> None:
    files = {
        str(path.relative_to(ROOT))
        for package in PACKAGES
        for path in (ROOT / package).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert files - set(names) == set()


def test_configuration_travels_with_the_code(names: list[str]) -> None:
    files = {f"k2rl/{path.relative_to(ROOT)}" for path in (ROOT / "conf").rglob("*.yaml")}
    assert files
    assert files - set(names) == set()


def test_nothing_else_is_in_the_wheel(names: list[str]) -> None:
    roots = {name.split("/")[0] for name in names}
    assert {root for root in roots if not root.endswith(".dist-info")} == set(PACKAGES)


def test_a_plain_installation_says_what_training_needs(wheel: Path, tmp_path: Path) -> None:
    """`pip install k2rl` is for authors of environments: no torch, Ray, vLLM or Hydra."""
    binaries = install(wheel, tmp_path / "venv", base_alone(tmp_path / "base"))

    def k2rl(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [binaries / "k2rl", *arguments],
            cwd=tmp_path,
            env=environment(),
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    for command in (
        ("train", "experiment=tiny"),
        ("train", "--cfg", "experiment=tiny"),
        ("eval", "experiment=tiny"),
        ("report", "."),
    ):
        done = k2rl(*command)
        assert (done.returncode, done.stdout) == (2, ""), done
        assert len(done.stderr.splitlines()) == 1, done.stderr
        assert done.stderr.startswith(f"k2rl: `k2rl {command[0]}` needs ")
        assert "pip install 'k2rl[cpu]'" in done.stderr
        assert "k2rl[cuda]" in done.stderr

    for arguments, expected in {
        ("--help",): "train a model",
        ("train", "--help"): "optimizer    muon, adamw",
        ("eval", "--help"): "model.path=",
        ("envs", "list"): "calculator",
    }.items():
        done = k2rl(*arguments)
        assert (done.returncode, done.stderr) == (0, ""), done
        assert expected in done.stdout
