"""What `k2rl eval suite=…` is asked for."""

from __future__ import annotations

import difflib
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from k2rl.authoring.commands import keywords_of
from k2rl.errors import ConfigError

OUTPUTS = ("text", "json")


@dataclass
class SuiteOptions:
    """Every field is a key of the command line."""

    #: Name of a suite (docs/evaluation.md lists them), or of an environment: an id, or `module:Class`.
    suite: str = ""
    #: A checkpoint's folder or name, an OpenAI-compatible `http://…/v1`, `gold`, `null`, or `cheat:NAME`.
    model: str = ""
    #: For an http model: its name there; empty: the only one it serves.
    name: str = ""
    #: A file of tasks or problems, for suites that take one, and its format.
    path: str = ""
    format: str = "auto"
    #: Only problems released from this ISO date on, and before that one.
    since: str = ""
    until: str = ""
    #: For `reasoning_gym`: names of its data sets, separated by commas.
    datasets: str = ""
    #: At most so many tasks; 0: all of a finite suite, 128 of an endless one.
    limit: int = 0
    #: Answers to each task.
    samples: int = 1
    #: pass@k for these, separated by commas.
    k: str = "1"
    temperature: float = 0.0
    seed: int = 0
    #: Tokens of a turn, turns of an episode (0: the suite's).
    max_tokens: int = 2048
    max_turns: int = 0
    #: No episode begins after so many sampled tokens of all together, or so many minutes; 0: no limit.
    token_budget: int = 0
    minutes: float = 0.0
    #: Episodes at once, and seconds that one may take.
    parallel: int = 16
    episode_s: float = 900.0
    #: For a checkpoint: GiB of vLLM's KV cache; 0: 1 on a CPU, what vLLM chooses on a GPU.
    kv_cache_gib: float = 0.0
    #: `bubblewrap`, `docker` or `remote`.
    sandbox: str = "bubblewrap"
    #: Use episodes again that were finished before: `on`, `off`; `auto`: on but for gold, null and cheats.
    cache: str = "auto"
    #: Folder of the results; empty: a new one under outputs/eval/.
    out: str = ""
    output: str = "text"
    #: `env.NAME=VALUE`: arguments of the environment's constructor, in JSON or as they are.
    env_values: dict[str, Any] = field(default_factory=dict)

    @property
    def ks(self) -> tuple[int, ...]:
        return tuple(sorted({int(part) for part in self.k.split(",")}))


def parse(words: Sequence[str]) -> SuiteOptions:
    """Read `key=value` words.

    Raises:
        ConfigError: one line that names the word and what there is.
    """
    options = SuiteOptions()
    kinds: dict[str, Any] = {each.name: type(getattr(options, each.name)) for each in fields(options)}
    del kinds["env_values"]
    for word in words:
        key, equals, value = word.partition("=")
        base, _, name = key.partition(".")
        if base == "env" and name.isidentifier() and equals:
            options.env_values |= keywords_of([f"{name}={value}"])
            continue
        if key not in kinds or not equals:
            close = difflib.get_close_matches(key, kinds, 1)
            hint = f"did you mean {close[0]}=?" if close else f"there are: {', '.join(kinds)}, env.NAME"
            raise ConfigError(f"{word}: no key of `k2rl eval suite=…`; {hint}")
        try:
            setattr(options, key, kinds[key](value))
        except ValueError as error:
            raise ConfigError(f"{word}: {key} is a number") from error
    _check(options)
    return options


def _check(options: SuiteOptions) -> None:
    if not options.suite or not options.model:
        missing = "suite" if not options.suite else "model"
        raise ConfigError(f"{missing}= is missing, such as: k2rl eval suite=humaneval model=gold")
    for key, low in {"samples": 1, "max_tokens": 1, "parallel": 1, "limit": 0, "max_turns": 0}.items():
        if getattr(options, key) < low:
            raise ConfigError(f"{key}={getattr(options, key)} must be at least {low}")
    for key in ("temperature", "minutes", "token_budget", "episode_s", "kv_cache_gib"):
        value = getattr(options, key)
        if not math.isfinite(value) or value < 0:
            raise ConfigError(f"{key}={value} must be a finite number of at least 0")
    for key, choices in (("output", OUTPUTS), ("cache", ("auto", "on", "off"))):
        if getattr(options, key) not in choices:
            raise ConfigError(f"{key}={getattr(options, key)} is not one of: {', '.join(choices)}")
    try:
        wrong = [k for k in options.ks if not 1 <= k <= options.samples]
    except ValueError as error:
        raise ConfigError(f"k={options.k} must be whole numbers, separated by commas") from error
    if wrong:
        raise ConfigError(f"k={options.k}: pass@{wrong[-1]} needs samples={max(1, wrong[-1])} or more")
    scripted = options.model in ("gold", "null") or options.model.startswith("cheat:")
    if options.samples > 1 and options.temperature == 0 and not scripted:
        raise ConfigError(
            f"samples={options.samples} at temperature=0 are all alike; set a temperature, such as 0.8"
        )
