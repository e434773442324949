"""k2rl as its users get it: a wheel, installed in an environment of its own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """k2rl's wheel, built from this checkout."""
    folder = tmp_path_factory.mktemp("wheel")
    build = ["pip", "wheel", "-qq", "--no-deps", "--no-build-isolation", "--wheel-dir", str(folder)]
    subprocess.run([sys.executable, "-m", *build, str(ROOT)], check=True, timeout=120)
    (path,) = folder.glob("k2rl-*.whl")
    return path
