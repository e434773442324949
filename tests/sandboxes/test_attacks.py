"""The attack table (attacks.py) against every backend, as root and as a user without rights."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.sandboxes import attacks
from tests.sandboxes.unprivileged import run_as_nobody

pytestmark = pytest.mark.xdist_group("sandboxes")

#: Name of the case -> backend, its options, and whether nobody rather than this user starts it.
CASES = {
    "bubblewrap": ("bubblewrap", {}, False),
    "bubblewrap-as-nobody": ("bubblewrap", {}, True),
    "bubblewrap-no-cgroups": ("bubblewrap", {"cgroups": False}, False),
}
ROOT_ONLY = "the probes prove themselves as root, and only root can become nobody"


def said(done: subprocess.CompletedProcess[str]) -> dict[str, str]:
    assert done.returncode == 0, done.stderr
    answers: dict[str, str] = json.loads(done.stdout)
    return answers


def play(*words: str) -> dict[str, str]:
    command = [sys.executable, "-m", "tests.sandboxes.attacks", *words]
    return said(subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, cwd=ROOT))


@pytest.fixture(scope="module")
def outside() -> dict[str, str]:
    if os.geteuid() != 0:
        pytest.skip(ROOT_ONLY)
    return play("outside")


@pytest.fixture(scope="module", params=list(CASES))
def inside(request: pytest.FixtureRequest) -> dict[str, str]:
    backend, options, as_nobody = CASES[request.param]
    words = (backend, json.dumps(options))
    if not as_nobody:
        return play(*words)
    if os.geteuid() != 0:
        pytest.skip(ROOT_ONLY)
    with tempfile.TemporaryDirectory() as folder:
        return said(run_as_nobody(Path(folder), "-m", "tests.sandboxes.attacks", *words))


def test_the_table_is_held(inside):
    assert len(inside) >= 40
    assert inside.keys() == attacks.probes().keys()
    assert {name: what for name, what in inside.items() if not what.startswith("held")} == {}
    assert {name: what for name, what in inside.items() if "the sandbox died" in what} == {}


def test_every_probe_reaches_its_target_where_there_is_no_sandbox(outside):
    assert {name: what for name, what in outside.items() if not what.startswith(("reached", "absent"))} == {}
    absent = {name for name, what in outside.items() if what.startswith("absent")}
    assert len(absent) <= 25, absent
