"""k2rl as its users get it: a wheel, installed in an environment of its own."""

from __future__ import annotations

import gc
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


# What the tests import stays: until all are collected the collector would look in vain.
gc.disable()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="run the tests marked slow, and only those")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    slow = config.getoption("--slow")
    by_choice: dict[bool, list[pytest.Item]] = {True: [], False: []}
    for item in items:
        by_choice[(item.get_closest_marker("slow") is not None) == slow].append(item)
    config.hook.pytest_deselected(items=by_choice[False])
    # The long ones first: a test process that took one of them last would work alone at the end.
    items[:] = sorted(by_choice[True], key=lambda item: item.get_closest_marker("integration") is None)


def pytest_collection_finish() -> None:
    gc.freeze()
    gc.enable()
    # Tensors in tests are small: several threads would wait for each other, and for other test processes.
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """k2rl's wheel, built from this checkout."""
    folder = tmp_path_factory.mktemp("wheel")
    build = ["pip", "wheel", "-qq", "--no-deps", "--no-build-isolation", "--wheel-dir", str(folder)]
    subprocess.run([sys.executable, "-m", *build, str(ROOT)], check=True, timeout=120)
    (path,) = folder.glob("k2rl-*.whl")
    return path
