"""k2rl as its users get it: a wheel, installed in an environment of its own."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from pathlib import Path

import docker
import pytest
import requests

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
    chosen = by_choice[True]
    # A machine without docker has nothing to test it with; CI has it, or fails.
    with_docker = [item for item in chosen if item.get_closest_marker("docker") is not None]
    if with_docker and not os.environ.get("CI") and not docker_answers():
        config.hook.pytest_deselected(items=with_docker)
        chosen = [item for item in chosen if item not in with_docker]
    # The long ones first: a test process that took one of them last would work alone at the end.
    items[:] = sorted(chosen, key=lambda item: item.get_closest_marker("integration") is None)


def docker_answers() -> bool:
    try:
        return bool(docker.from_env(timeout=5).ping())
    except (docker.errors.DockerException, requests.exceptions.RequestException):
        return False


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
