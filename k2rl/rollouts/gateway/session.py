"""One episode's turns, token by token, as an agent asked for them.

A session is a tree. Each turn hangs below the turn whose conversation its request goes on with, and its
prompt is that conversation's very ids, sampled ones included, with only what is new rendered behind them. A
request that goes on with none of them (another beginning, other tools, an edited message before the first
turn) is rendered whole.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec
import xxhash

from envs.tools.formats import parse
from k2rl.errors import ConfigError
from k2rl.inference.engine import Generation, InferenceEngine, Sampling
from k2rl.models.chat import ChatTemplate
from k2rl.rollouts.episode import Attempt, EpisodeLimits, add_routes, draw_turn, turn_seed, turn_segments
from k2rl.rollouts.gateway.wire import (
    ChatRequest,
    FinishReason,
    RefusedError,
    Reply,
    messages_of,
    stops_of,
    tools_of,
)
from k2rl.types import Message, Segment, StopReason, ToolCall, Trajectory

#: What no further request can change: a full context can be made smaller by the agent, these cannot.
FINAL: tuple[StopReason, ...] = ("max_turns", "token_budget", "repetition")


@dataclass(eq=False)
class Turn:
    """A turn of the policy, and what was new in the conversation before it."""

    parent: Turn | None
    messages: tuple[Message, ...]
    prompt: tuple[int, ...]
    reply: Message
    generation: Generation
    has_children: bool = False

    def line(self) -> list[Turn]:
        """From the first turn of the conversation to this one."""
        turns: list[Turn] = []
        turn: Turn | None = self
        while turn is not None:
            turns.append(turn)
            turn = turn.parent
        return turns[::-1]

    def token_ids(self) -> list[int]:
        """Of the conversation up to the end of this turn."""
        return [id for turn in self.line() for id in (*turn.prompt, *turn.generation.token_ids)]


@dataclass(frozen=True)
class Asked:
    """A request that was granted: what is to be sampled, and where it belongs."""

    request: ChatRequest
    conversation: list[Message]
    parent: Turn | None
    messages: tuple[Message, ...]
    before: list[int]
    prompt: list[int]
    sampling: Sampling
    #: What the sampled tokens are bounded by, beside the request itself.
    bound: StopReason | None


@dataclass
class Session:
    """What one agent asks in one episode. Its key is how requests are known to be of it."""

    attempt: Attempt
    engine: InferenceEngine
    chat: ChatTemplate
    limits: EpisodeLimits
    key: str = field(default_factory=lambda: f"sk-{secrets.token_urlsafe(24)}")
    #: Why the agent was refused its last request, if it was: the episode's limits are reached.
    stop_reason: StopReason | None = None

    def __post_init__(self) -> None:
        #: Done when the engine, and with it the episode, has failed.
        self.failed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._turns: list[Turn] = []
        self._by_conversation: dict[bytes, Turn] = {}
        self._sampled = self._reserved = self._requests = 0

    def ask(self, request: ChatRequest) -> Asked:
        """Find out what a request asks for, and reserve its tokens; `sample` must follow.

        Raises:
            RefusedError: it is none, or is beyond the episode's limits.
        """
        conversation = messages_of(request)
        parent, known = self._continued(request, conversation)
        new = conversation[known:]
        before = [] if parent is None else parent.token_ids()
        try:
            prompt = self._rendered(request, parent, new)
        except (ConfigError, ValueError) as error:
            raise RefusedError(400, f"the model's chat template: {error}") from None
        sampling, bound = self._sampling(request, len(before) + len(prompt))
        self._reserved += sampling.max_tokens
        self._requests += 1
        return Asked(request, conversation, parent, tuple(new), before, prompt, sampling, bound)

    async def sample(self, asked: Asked) -> Reply:
        """Draw the turn and keep it.

        Raises:
            Exception: what the engine raises; `failed` has it, too.
        """
        try:
            generation = await draw_turn(self.engine, [*asked.before, *asked.prompt], asked.sampling)
        except Exception as error:
            if not self.failed.done():
                self.failed.set_exception(error)
            raise
        finally:
            self._reserved -= asked.sampling.max_tokens
        self._sampled += len(generation.token_ids)
        text = self.chat.decode(generation.token_ids)
        cut = generation.finish_reason != "stop"
        if self.stop_reason not in FINAL:
            repeats = generation.finish_reason == "repetition"
            self.stop_reason = "repetition" if repeats else asked.bound if cut else None
        if stops := stops_of(asked.request):
            generation, text, stopped = self._stopped(generation, text, stops)
            cut = cut and not stopped
        return self._keep(asked, generation, text, "length" if cut else "stop")

    def trajectory(self) -> Trajectory:
        """The episode, without a verdict: the line that ends with the last turn, and its branches.

        Raises:
            ValueError: the agent has asked nothing.
        """
        if not self._turns:
            raise ValueError("the agent ended its episode without asking the policy anything")
        leaves = [turn for turn in self._turns if not turn.has_children]
        seen: set[int] = set()
        first, *others = [self._line(number, leaf, seen) for number, leaf in enumerate(leaves[::-1])]
        first.branches = others
        first.stop_reason = self.stop_reason or "env_done"
        return first

    def _line(self, number: int, leaf: Turn, seen: set[int]) -> Trajectory:
        attempt = self.attempt
        name = f"{attempt.id}/branch-{number}" if number else attempt.id
        line = Trajectory(name, attempt.group_id, attempt.task, attempt.temperature)
        for turn in leaf.line():
            line.segments.append(Segment(turn.prompt, sampled=False))
            again = id(turn) in seen
            line.segments += [
                Segment(segment.token_ids, sampled=False) if again else segment
                for segment in turn_segments(turn.generation)
            ]
            add_routes(line, turn.generation)
            line.messages += [*turn.messages, turn.reply]
            seen.add(id(turn))
        return line

    def _continued(self, request: ChatRequest, conversation: list[Message]) -> tuple[Turn | None, int]:
        """The last turn of this session that the conversation goes on from, and how many messages that is."""
        digests = list(_digests(request.tools, conversation))
        for known in range(len(conversation) - 1, 0, -1):
            if turn := self._by_conversation.get(digests[known - 1]):
                return turn, known
        return None, 0

    def _rendered(self, request: ChatRequest, parent: Turn | None, new: list[Message]) -> list[int]:
        if parent is not None:
            return self.chat.continuation_ids(new, parent.generation.finish_reason == "stop")
        return self.chat.prompt_ids(new, tools_of(request))

    def _sampling(self, request: ChatRequest, prompt: int) -> tuple[Sampling, StopReason | None]:
        limits = self.limits
        budget = limits.token_budget - self._sampled
        room = limits.max_model_len - prompt
        if self.stop_reason == "repetition":
            raise self._over("repetition", "the policy says the same over and over")
        if self._requests >= limits.max_turns:
            raise self._over("max_turns", f"the episode's {limits.max_turns} turns are used up")
        if budget <= 0:
            raise self._over("token_budget", f"the episode's {limits.token_budget} tokens are used up")
        if room <= 0:
            # The code that agents know, to forget something and ask again.
            message = f"the model's maximum context length is {limits.max_model_len} tokens, not {prompt}"
            raise self._over("context", message, "context_length_exceeded")
        if budget <= self._reserved:
            raise RefusedError(429, "the tokens that are left are promised to the turns under way", "wait")
        budget -= self._reserved
        asked = request.max_completion_tokens or request.max_tokens or limits.max_tokens_per_turn
        most = min(budget, room, asked, limits.max_tokens_per_turn)
        bound: StopReason | None = None
        if most == min(budget, room):
            bound = "token_budget" if budget <= room else "context"
        seed = turn_seed(self.attempt.seed, self._requests)
        sampling = Sampling(self.attempt.temperature, most, seed, limits.repeat_size, limits.repeat_count)
        return sampling, bound

    def _over(self, reason: StopReason, message: str, code: str = "") -> RefusedError:
        self.stop_reason = reason
        return RefusedError(400, message, code or f"{reason}_reached")

    def _stopped(
        self, generation: Generation, text: str, stops: Sequence[str]
    ) -> tuple[Generation, str, bool]:
        """The turn up to where it has written one of the stops; the text ends before it."""
        at = min((place for stop in stops if (place := text.find(stop)) >= 0), default=-1)
        if at < 0:
            return generation, text, False
        ids = generation.token_ids
        kept = next(
            count
            for count in range(1, len(ids) + 1)
            if any(stop in self.chat.decode(ids[:count]) for stop in stops)
        )
        spans = tuple((start, version) for start, version in generation.weight_spans if start < kept)
        whole = kept == len(ids)
        reason = generation.finish_reason if whole else "length"  # its stop token was not kept
        return Generation(ids[:kept], generation.logprobs[:kept], spans, reason), text[:at], True

    def _keep(self, asked: Asked, generation: Generation, text: str, finish: FinishReason) -> Reply:
        calls: tuple[ToolCall, ...] = ()
        content = text
        if asked.request.tools and asked.request.tool_choice != "none":
            content, calls = _read(text, sum(len(message.tool_calls) for message in asked.conversation))
        reply = Message("assistant", content, calls)
        turn = Turn(asked.parent, asked.messages, tuple(asked.prompt), reply, generation)
        if asked.parent is not None:
            asked.parent.has_children = True
        self._turns.append(turn)
        *_, conversation = _digests(asked.request.tools, [*asked.conversation, reply])
        self._by_conversation[conversation] = turn
        return Reply(
            content,
            calls,
            "tool_calls" if calls else finish,
            len(asked.before) + len(asked.prompt),
            tuple(self.chat.decode([token]) for token in generation.token_ids),
            generation.logprobs,
        )


def _read(text: str, made: int) -> tuple[str, tuple[ToolCall, ...]]:
    """What a turn says and the tools it calls, `made` of which there were before.

    Where a call cannot be read, the turn is all text: its client would have nothing to answer to.
    """
    turn = parse(text)
    if not turn.calls or any(call.problem for call in turn.calls):
        return text, ()
    calls = [
        ToolCall(call.id or f"functions.{call.name}:{number}", call.name, call.arguments)
        for number, call in enumerate(turn.calls, start=made)
    ]
    return turn.content, tuple(calls)


def _digests(tools: Sequence[dict[str, Any]] | None, conversation: Sequence[Message]) -> Iterator[bytes]:
    """One for each message, of the conversation up to it.

    Clients may write a turn back with other white space around it: it is the same turn.
    """
    state = xxhash.xxh3_128(msgspec.json.encode(tools or [], order="deterministic"))
    for message in conversation:
        own = message.role == "assistant"
        said = msgspec.structs.replace(message, content=message.content.strip()) if own else message
        state.update(msgspec.json.encode(said, order="deterministic") + b"\n")
        yield state.digest()
