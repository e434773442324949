"""What an environment service and its clients say to each other: msgpack over HTTP, typed on both sides.

`GET /v1/about` says what is served. `POST /v1/tasks`, `/v1/demonstration` and `/v1/judge` ask what needs no
episode. `POST /v1/episodes` begins one (body: `Begin`, answer: `Begun`), `POST /v1/episodes/<id>` takes a
step (`Step`, `Stepped`), `DELETE` closes it, `POST /v1/renew` keeps several from being closed for lack of a
client. What failed comes back as a `Fault` with a status of 400 or more.
"""

from __future__ import annotations

from typing import Any

import msgspec

from k2rl.types import Message, Split, Task, ToolSpec, prepare

TOKEN_VARIABLE, SERVICES_VARIABLE = "K2RL_ENVS_TOKEN", "K2RL_ENVS_SERVICES"
MOST_TASKS = 256
"""Tasks that are given at once."""


class About(msgspec.Struct, frozen=True, kw_only=True):
    """What a service serves."""

    env: str
    kinds: list[str]
    reward_range: tuple[float, float]
    #: Whether the rewards of the steps are all there is to a verdict; else the service is asked for it.
    sums_rewards: bool


class Draw(msgspec.Struct, frozen=True, kw_only=True):
    """The tasks from number `start` on of a stream."""

    split: Split
    seed: int
    start: int
    count: int


class Begin(msgspec.Struct, frozen=True, kw_only=True):
    seed: int | None
    task: Task | None


class Begun(msgspec.Struct, frozen=True, kw_only=True):
    id: str
    #: Seconds without a call or a renewal after which the service closes the episode.
    lease: float
    messages: list[Message]
    tools: list[ToolSpec]
    info: dict[str, Any]


class Step(msgspec.Struct, frozen=True, kw_only=True):
    action: str


class Stepped(msgspec.Struct, frozen=True, kw_only=True):
    messages: list[Message]
    reward: float
    terminated: bool
    truncated: bool
    #: What of the environment's can be written as msgpack.
    info: dict[str, Any]


prepare(About, Draw, Begin, Begun, Step, Stepped)
