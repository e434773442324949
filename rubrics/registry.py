"""Rubrics by id: built in, from installed packages (entry points `k2rl.rubrics`), or `module:Class`."""

from __future__ import annotations

from typing import Any

from rubrics.base import Rubric
from rubrics.plugins import Registry

_REGISTRY: Registry[Rubric] = Registry(
    noun="rubric",
    base=Rubric,
    group="k2rl.rubrics",
    builtin={
        "environment_reward": "rubrics.environment:EnvironmentReward",
        "weighted_sum": "rubrics.compose:WeightedSum",
        "minimum": "rubrics.compose:Minimum",
        "gate": "rubrics.compose:Gate",
        "first_failure": "rubrics.compose:FirstFailure",
        "by_task": "rubrics.compose:ByTask",
        "exact": "rubrics.verifiers.plain:ExactJudge",
        "numeric": "rubrics.verifiers.plain:NumericJudge",
        "regex": "rubrics.verifiers.plain:RegexJudge",
        "json_schema": "rubrics.verifiers.plain:JsonSchemaJudge",
        "math": "rubrics.verifiers.math:MathJudge",
        "puzzle": "rubrics.verifiers.puzzles:PuzzleJudge",
        "instructions": "rubrics.verifiers.instructions.judge:InstructionJudge",
        "tool_calls": "rubrics.verifiers.tools:ToolCallJudge",
        "format": "rubrics.verifiers.form:FormatJudge",
        "repetition": "rubrics.verifiers.form:RepetitionJudge",
        "pointwise": "rubrics.critics.pointwise:Pointwise",
        "pairwise": "rubrics.critics.pairwise:Pairwise",
        "self_critique": "rubrics.critics.self_critique:SelfCritique",
        "faithfulness": "rubrics.critics.faithfulness:Faithfulness",
        "safety": "rubrics.critics.safety:Safety",
        "hack_check": "rubrics.critics.hack_check:HackCheck",
    },
    listing="use `env` for the environment's own",
)


def make(id: str, /, **kwargs: Any) -> Rubric:
    """A rubric by id, built with these arguments.

    Raises:
        ConfigError: one line, if the id, its class or the arguments are wrong.
    """
    return _REGISTRY.make(id, kwargs)


def resolve(id: str) -> type[Rubric]:
    """The class behind a rubric id.

    Raises:
        ConfigError: one line, if there is no usable one.
    """
    return _REGISTRY.resolve(id)


def available() -> dict[str, str]:
    """Every registered id with its description."""
    return _REGISTRY.available()
