"""The experiments that ship, each with its environment, and the task kinds that its warm start shows."""

from __future__ import annotations

from itertools import islice

import pytest

import envs
from k2rl.choices import config_folder
from k2rl.composition import compose
from k2rl.config_check import check

EXPERIMENTS = sorted(path.stem for path in (config_folder() / "experiment").glob("*.yaml"))


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_an_experiment_is_valid_and_its_environment_has_tasks(name: str) -> None:
    config = compose([f"experiment={name}"])
    check(config)
    assert config.name == name
    with envs.make(config.env.id, **config.env.kwargs) as env:
        assert len(list(islice(env.tasks("train", 0), 8))) == 8
        assert set(config.warm_start.kinds) <= set(env.kinds)
