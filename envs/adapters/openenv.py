"""Environments served by OpenEnv, as a client of theirs: JSON over a WebSocket, a session an episode.

Its own client cannot be installed beside vLLM (it asks for another `mcp`); what it says is little.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from itertools import count
from typing import Any

from gymnasium.error import ResetNeeded

from envs.answers import split_of
from envs.base import Messages, ResetResult, StepResult, TextEnv
from k2rl.errors import ConfigError
from k2rl.types import Message, Split, Task
from rubrics.environment import EnvironmentReward

ANSWER_S = 120.0


class OpenEnvEnv(TextEnv):
    """An environment that an OpenEnv server serves; the policy's turn is one field of its action.

    What the observation says, or all of it as JSON, is the message. Its rewards are summed.
    """

    kinds = ("served",)

    def __init__(
        self,
        url: str = "http://127.0.0.1:8000",
        action_field: str = "message",
        observation_field: str = "",
        low: float = 0.0,
        high: float = 1.0,
    ) -> None:
        """`url`: the server's; `action_field`: where an action takes the policy's words; `observation_field`:
        what of an observation is shown, all of it if empty; `low`, `high`: of the summed reward.

        Raises:
            ConfigError: the address is none, or aiohttp is not installed.
        """
        super().__init__()
        try:
            import aiohttp
        except ImportError as error:
            raise ConfigError(f"openenv needs: pip install aiohttp ({error})") from error
        if not url.startswith(("http://", "https://")):
            raise ConfigError(f"url={url!r} is no address, http://HOST:PORT")
        self.rubric = EnvironmentReward(low, high)
        self._url = url.rstrip("/") + "/ws"
        self._action, self._shown_field = action_field, observation_field
        self._session: aiohttp.ClientSession | None = None
        self._socket: aiohttp.ClientWebSocketResponse | None = None

    def tasks(self, split: Split, seed: int) -> Iterator[Task]:
        """Seeds of episodes; a seed decides which split it belongs to."""
        rng = random.Random(f"openenv/{split}/{seed}")
        for place in count():
            while True:
                own = rng.randrange(2**31)
                if split_of(f"openenv {own}") == split:
                    break
            yield Task(f"openenv/{split}/{seed}/{place}", "openenv", "served", split, own, {"seed": own})

    async def reset(  # type: ignore[override]
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> ResetResult:
        """Begin a session.

        Raises:
            RuntimeError, aiohttp.ClientError: the server is not there or refuses.
        """
        import aiohttp

        task = self.start_episode(seed, options)
        await self.close()
        self._session = aiohttp.ClientSession()
        self._socket = await self._session.ws_connect(self._url)
        data = await self._ask({"type": "reset", "data": {"seed": task.data["seed"]}})
        return self._shown(data), {"task": task}

    async def step(self, action: str) -> StepResult:  # type: ignore[override]
        """Send the policy's words.

        Raises:
            gymnasium.error.ResetNeeded: if no episode is running.
            RuntimeError, aiohttp.ClientError: the server is gone or refuses.
        """
        if self._socket is None:
            raise ResetNeeded("the episode is over or was never begun: call reset()")
        data = await self._ask({"type": "step", "data": {self._action: action}})
        done = bool(data.get("done"))
        if done:
            await self.close()
        return self._shown(data), float(data.get("reward") or 0.0), done, False, {}

    async def close(self) -> None:  # type: ignore[override]
        """End the session."""
        session, socket = self._session, self._socket
        self._session = self._socket = None
        if socket is not None and not socket.closed:
            await socket.send_json({"type": "close"})
            await socket.close()
        if session is not None:
            await session.close()

    async def _ask(self, message: dict[str, Any]) -> dict[str, Any]:
        assert self._socket is not None
        await self._socket.send_str(json.dumps(message))
        answer = await self._socket.receive_str(timeout=ANSWER_S)
        said = json.loads(answer)
        data = said.get("data", {}) if isinstance(said, dict) else None
        if not isinstance(data, dict) or said.get("type") == "error":
            raise RuntimeError(f"the OpenEnv server at {self._url} answers: {answer[:300]}")
        return data

    def _shown(self, data: dict[str, Any]) -> Messages:
        observation = data.get("observation", {})
        field = self._shown_field
        text = observation.get(field, "") if field else json.dumps(observation, ensure_ascii=False)
        return (Message("user", str(text) or "(nothing)"),)
