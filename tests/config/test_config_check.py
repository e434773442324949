"""What values a configuration may have."""

from __future__ import annotations

import math
from dataclasses import fields, is_dataclass
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from k2rl.config import Config
from k2rl.config_check import BOUNDS, CHOICES, NOT_EMPTY, OWN_ENGINE_ARGS, check
from k2rl.errors import ConfigError

FREE = {
    *("env.kwargs", "rubric.kwargs", "rollout.drop_uniform_groups", "budget.per_kind", "optimizer.nesterov"),
    *("optimizer.reset_each_step",),
    *("optimizer.betas", "warm_start.kinds", "inference.enforce_eager", "inference.engine_args"),
    *(
        "inference.sleep_while_training",
        "inference.return_routed_experts",
        "train.activation_checkpointing",
        "tracking.record_rollouts",
    ),
    *("debug.rollouts", "lora.target_modules", "gateway.url", "data.path", "data.held_out"),
    *("rollout.store", "rollout.max_per_kind", "rollout.longest_first", "rubric.cache_verdicts"),
    *("tracking.tensorboard", "tracking.wandb", "resume"),
}
"""Booleans, and what is checked by itself or against the environment."""


def keys(schema: Any, prefix: str = "") -> list[str]:
    found = []
    for field in fields(schema):
        value = getattr(schema, field.name)
        key = f"{prefix}{field.name}"
        found += keys(value, f"{key}.") if is_dataclass(value) else [key]
    return found


def changed(key: str, value: Any) -> Config:
    config: Any = Config()
    *path, name = key.split(".")
    owner = config
    for part in path:
        owner = getattr(owner, part)
    setattr(owner, name, value)
    return config


def test_every_field_is_checked_or_known_to_be_free() -> None:
    assert sorted([*BOUNDS, *CHOICES, *NOT_EMPTY, *FREE]) == sorted(keys(Config()))


def test_the_defaults_pass() -> None:
    check(Config())


@pytest.mark.parametrize("key", BOUNDS)
@settings(max_examples=10)
@given(data=st.data())
def test_numbers_out_of_bounds_are_refused_by_name(key: str, data: st.DataObject) -> None:
    bound = BOUNDS[key]
    outside = [st.floats(max_value=bound.low, exclude_max=not bound.open_low, allow_infinity=False)]
    if math.isfinite(bound.high):
        outside.append(st.floats(min_value=bound.high, exclude_min=not bound.open_high, allow_infinity=False))
    value = data.draw(st.one_of(*outside, st.sampled_from([math.nan, math.inf, -math.inf])))
    with pytest.raises(ConfigError, match=f"^{key}="):
        check(changed(key, value))


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("ptx.weight", -1.0, "ptx.weight=-1.0 must be a finite number, at least 0"),
        ("optimizer.momentum", 1.5, "at least 0 and below 1"),
        ("optimizer.betas", [0.9], "two numbers"),
        ("optimizer.betas", [0.9, 1.0], "below 1"),
        ("optimizer.betas", [math.nan, 0.9], "below 1"),
        ("temperature.end", 0.005, "at least 0.01"),
        ("budget.per_kind", {"add": 0}, "budget.per_kind.add=0"),
        ("budget.per_kind", {"default": 4000}, "budget.per_kind.default=4000"),
        ("budget.default", 512, "inference.max_model_len=512"),
        ("deadlines.generate_s", 600.0, "rollout.episode_deadline_s=600"),
        ("model.dtype", "float16", "is not one of: auto"),
        ("name", " ", "name is empty"),
        ("seed", -1, "at least 0"),
    ],
)
def test_what_is_wrong_is_said(key: str, value: Any, expected: str) -> None:
    with pytest.raises(ConfigError) as raised:
        check(changed(key, value))
    assert expected in str(raised.value)
    assert "\n" not in str(raised.value)


def test_state_is_offloaded_to_where_it_is_not() -> None:
    config = changed("train.offload", "file")
    check(config)
    config.cluster.gpus_per_worker = 1
    with pytest.raises(ConfigError, match=r"train\.offload=file is for a trainer on CPU; .* none or host"):
        check(config)
    config.train.offload = "host"
    check(config)
    config.cluster.gpus_per_worker = 0
    with pytest.raises(ConfigError, match=r"train\.offload=host is for a trainer on a GPU; .* none or file"):
        check(config)


def test_gradients_are_offloaded_with_the_state_alone() -> None:
    config = changed("train.gradients", "offload")
    with pytest.raises(ConfigError, match=r"goes where train\.offload says; that is none"):
        check(config)
    config.train.offload = "file"
    check(config)


@pytest.mark.parametrize("name", OWN_ENGINE_ARGS)
def test_what_the_engine_rests_on_cannot_be_overridden(name: str) -> None:
    with pytest.raises(ConfigError, match=f"inference.engine_args.{name} cannot be set here"):
        check(changed("inference.engine_args", {name: "x"}))
    check(changed("inference.engine_args", {"block_size": 16}))
