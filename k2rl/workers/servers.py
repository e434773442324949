"""Actors that serve over HTTP, each in its own process: their start and their end."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import ray
from ray.exceptions import RayError

from k2rl.errors import RunError

START_SECONDS = 120.0
STOP_SECONDS = 30.0


async def addresses_of(actors: Sequence[Any], what: str, *arguments: Any) -> list[str]:
    """Call `start(*arguments)` of each, which answers with its address; if one does not, none is left.

    Args:
        what: they serve, for errors.

    Raises:
        RunError: one did not start, or not in time.
    """
    starting = asyncio.gather(*(actor.start.remote(*arguments) for actor in actors))
    try:
        return await asyncio.wait_for(starting, START_SECONDS)
    except (RayError, TimeoutError) as error:
        for actor in actors:
            ray.kill(actor)
        why = f"not within {START_SECONDS:g} s" if isinstance(error, TimeoutError) else str(error)
        raise RunError(f"{what} of the cluster did not start: {why}") from error


async def end(actors: Sequence[Any]) -> None:
    """Call `stop()` of each, which closes what is open there; then they are gone."""
    stopping = asyncio.gather(*(actor.stop.remote() for actor in actors), return_exceptions=True)
    with suppress(TimeoutError):
        await asyncio.wait_for(stopping, STOP_SECONDS)
    for actor in actors:
        with suppress(RayError):
            ray.kill(actor)
