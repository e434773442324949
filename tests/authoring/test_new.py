"""`k2rl envs new`: the package it makes, installed for real, passes its test and the check."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from k2rl import cli
from k2rl.authoring.new import make_package
from k2rl.errors import ConfigError
from tests.installation import environment, everything, install

pytestmark = pytest.mark.xdist_group("tiny_run")


@pytest.mark.parametrize("name", ["My", "my-envs", "class", "envs", "json", "", "../x"])
def test_names_that_are_none(name: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"is no name for a package|is taken"):
        make_package(name, tmp_path)


def test_what_is_there_stays(tmp_path: Path) -> None:
    (tmp_path / "shop").mkdir()
    with pytest.raises(ConfigError, match="is there already"):
        make_package("shop", tmp_path)


def test_a_new_package_is_installed_tested_and_checked(wheel: Path, tmp_path: Path) -> None:
    binaries = install(wheel, tmp_path / "venv", everything())

    def run(*command: str, cwd: Path = tmp_path) -> str:
        ran = subprocess.run(
            [str(binaries / command[0]), *command[1:]],
            cwd=cwd,
            env=environment(),
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        assert ran.returncode == 0, ran.stdout + ran.stderr
        return ran.stdout

    assert "pip install --no-deps -e corner_shop" in run("k2rl", "envs", "new", "corner_shop")
    package = tmp_path / "corner_shop"
    pip = [sys.executable, "-m", "pip", "--python", str(binaries / "python"), "install", "-qq", "--no-deps"]
    subprocess.run([*pip, "--no-build-isolation", "--no-index", str(package)], check=True, timeout=120)
    assert "corner_shop          What a basket costs" in run("k2rl", "envs", "list")
    assert "2 passed" in run("python", "-m", "pytest", "-q", "-p", "no:cacheprovider", cwd=package / "tests")
    assert "corner_shop: no fault" in run("k2rl", "envs", "check", "corner_shop")


def test_the_command_says_what_is_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(["envs", "new", "corner_shop"]) == 0
    assert "k2rl envs check corner_shop" in capsys.readouterr().out
    assert cli.main(["envs", "new", "corner_shop"]) == 2
