"""Which parameters each objective has, and which baselines suit it. No torch: start-up checks read it."""

from __future__ import annotations

from k2rl.config import ObjectiveConfig
from k2rl.errors import ConfigError

_CORRECTED = ("average_over", "correction", "correction_cap")

#: Parameters by `objective.name`; all others must be left unset.
PARAMETERS: dict[str, tuple[str, ...]] = {
    "k2": ("tau",),
    "k2_token": ("tau",),
    "k2_5": ("tau", "log_ratio_min", "log_ratio_max"),
    "clipped": ("clip_low", "clip_high", *_CORRECTED),
    "gspo": ("clip_low", "clip_high"),
    "cispo": ("clip_low", "clip_high", *_CORRECTED),
    "reinforce": _CORRECTED,
}

#: Of the KL to a reference, see `kl.py`.
ESTIMATORS = ("k1", "k2", "k3")

_OPTIONAL = ("correction", "correction_cap")


def check_objective(config: ObjectiveConfig) -> None:
    """Check that an objective has what it needs and nothing that would do nothing.

    Raises:
        ConfigError: one line, with what to set or to leave out.
    """
    known = PARAMETERS.get(config.name)
    if known is None:
        raise ConfigError(f"objective.name={config.name!r} is not one of: {', '.join(PARAMETERS)}")
    for name in sorted({parameter for several in PARAMETERS.values() for parameter in several}):
        value = getattr(config, name)
        if name not in known and value is not None:
            raise ConfigError(
                f"objective.{name}={value} does nothing with objective.name={config.name}: set it to null, "
                "or choose an objective by its file, such as objective=grpo"
            )
        if name in known and name not in _OPTIONAL and value is None:
            raise ConfigError(f"objective.name={config.name} needs objective.{name}")
    if (config.correction is None) != (config.correction_cap is None):
        raise ConfigError(
            "objective.correction and objective.correction_cap go together: set both or neither"
        )
    squared = config.name in ("k2", "k2_token")
    if squared and config.baseline == "normalised":
        raise ConfigError(
            f"objective.baseline=normalised does not go with objective.name={config.name}: it weighs rewards "
            "against log-ratios, so their scale has a meaning; use mean, leave_one_out or exponential"
        )
    if config.baseline == "exponential" and config.tau is None:
        raise ConfigError(
            "objective.baseline=exponential needs objective.tau, which "
            f"objective.name={config.name} does not have"
        )
