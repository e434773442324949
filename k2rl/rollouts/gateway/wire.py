"""Chat completions as clients of OpenAI's API write and read them."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import msgspec

from k2rl.types import Message, ToolCall, ToolSpec

FinishReason = Literal["stop", "length", "tool_calls"]
ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "assistant": "assistant",
    "tool": "tool",
}


class RefusedError(Exception):
    """A request that is not granted: the client's fault, or a limit of its episode."""

    def __init__(self, status: int, message: str, code: str = "invalid_request") -> None:
        super().__init__(message)
        self.status = status
        self.code = code


class Part(msgspec.Struct):
    type: str
    text: str = ""


class CalledFunction(msgspec.Struct):
    name: str
    arguments: str = "{}"


class RequestedCall(msgspec.Struct):
    function: CalledFunction
    id: str = ""


class RequestMessage(msgspec.Struct):
    role: str
    content: str | list[Part] | None = None
    tool_calls: list[RequestedCall] | None = None
    tool_call_id: str | None = None


class StreamOptions(msgspec.Struct):
    include_usage: bool | None = None


class ChatRequest(msgspec.Struct):
    """What is read of a request. How tokens are drawn (temperature, top_p, seed …) is the run's to say."""

    messages: list[RequestMessage]
    model: str = ""
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    stop: str | list[str] | None = None
    n: int | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    response_format: dict[str, Any] | None = None
    logprobs: bool | None = None


class Reply(msgspec.Struct, frozen=True):
    """The policy's turn as the client sees it."""

    content: str
    tool_calls: tuple[ToolCall, ...]
    finish_reason: FinishReason
    prompt_tokens: int
    #: Of the turn: the text of each token, and its natural log-probability under the run's temperature.
    tokens: tuple[str, ...]
    logprobs: tuple[float, ...]


def read_request(body: bytes) -> ChatRequest:
    """Raises:
    RefusedError: it is no chat completion request, or asks for what cannot be done.
    """
    try:
        request = msgspec.json.decode(body, type=ChatRequest)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise RefusedError(400, f"not a chat completion request: {error}") from None
    if not request.messages:
        raise RefusedError(400, "messages is empty")
    if request.messages[-1].role == "assistant":
        raise RefusedError(400, "the last message is the assistant's own: there is nothing to answer")
    if request.n not in (None, 1):
        raise RefusedError(400, "n: one completion a request; ask again for another")
    if (request.response_format or {}).get("type", "text") != "text":
        raise RefusedError(400, "response_format: the policy's tokens are not constrained; only text")
    if request.tool_choice not in (None, "auto", "none"):
        raise RefusedError(400, "tool_choice: the policy's tokens are not constrained; only auto and none")
    for name in ("max_tokens", "max_completion_tokens"):
        value = getattr(request, name)
        if value is not None and value < 1:
            raise RefusedError(400, f"{name} must be at least 1")
    for tool in request.tools or ():
        if not isinstance(tool.get("function"), dict) or not isinstance(tool["function"].get("name"), str):
            raise RefusedError(400, "tools: each is {type: function, function: {name, …}}")
        if not isinstance(tool["function"].get("parameters") or {}, dict):
            raise RefusedError(400, "tools: parameters are a JSON schema, an object")
    return request


def messages_of(request: ChatRequest) -> list[Message]:
    """The conversation in our own vocabulary.

    Raises:
        RefusedError: a role, or a part of a message, that a text model cannot take.
    """
    return [_message(index, message) for index, message in enumerate(request.messages)]


def _message(index: int, message: RequestMessage) -> Message:
    role = ROLES.get(message.role)
    if role is None:
        raise RefusedError(400, f"messages[{index}]: role {message.role!r} is none of {', '.join(ROLES)}")
    calls = tuple(_call(index, call) for call in message.tool_calls or ())
    if calls and role != "assistant":
        raise RefusedError(400, f"messages[{index}]: only the assistant calls tools")
    return Message(role, _text(index, message.content), calls, message.tool_call_id)  # type: ignore[arg-type]


def _text(index: int, content: str | list[Part] | None) -> str:
    if content is None or isinstance(content, str):
        return content or ""
    for part in content:
        if part.type != "text":
            raise RefusedError(400, f"messages[{index}]: a part of type {part.type!r}; only text is taken")
    return "\n".join(part.text for part in content)


def _call(index: int, call: RequestedCall) -> ToolCall:
    try:
        arguments = msgspec.json.decode(call.function.arguments or "{}", type=dict[str, Any])
    except msgspec.MsgspecError:
        raise RefusedError(400, f"messages[{index}]: arguments of a tool call are no JSON object") from None
    return ToolCall(call.id, call.function.name, arguments)


def completion(reply: Reply, request: ChatRequest, id: str) -> dict[str, Any]:
    """A `chat.completion` object."""
    message: dict[str, Any] = {"role": "assistant", "content": reply.content or None, "refusal": None}
    if reply.tool_calls:
        message["tool_calls"] = [_spelled(call) for call in reply.tool_calls]
    choice = {
        "index": 0,
        "message": message,
        "finish_reason": reply.finish_reason,
        "logprobs": _logprobs(reply) if request.logprobs else None,
    }
    return {**_head(id, "chat.completion", request), "choices": [choice], "usage": _usage(reply)}


def chunks(reply: Reply, request: ChatRequest, id: str) -> Iterator[dict[str, Any]]:
    """The `chat.completion.chunk` objects of a streamed answer. A turn is drawn whole, and so it is told."""
    calls = [{"index": index, **_spelled(call)} for index, call in enumerate(reply.tool_calls)]
    deltas: list[dict[str, Any]] = [{"role": "assistant", "content": reply.content or None}]
    deltas += [{"tool_calls": [call]} for call in calls]
    head = _head(id, "chat.completion.chunk", request)
    for index, delta in enumerate(deltas):
        logprobs = _logprobs(reply) if request.logprobs and index == 0 else None
        choice = {"index": 0, "delta": delta, "finish_reason": None, "logprobs": logprobs}
        yield {**head, "choices": [choice]}
    yield {**head, "choices": [{"index": 0, "delta": {}, "finish_reason": reply.finish_reason}]}
    if request.stream_options is not None and request.stream_options.include_usage:
        yield {**head, "choices": [], "usage": _usage(reply)}


def error(refused: RefusedError) -> dict[str, Any]:
    """The body of a refusal."""
    kind = "invalid_request_error" if refused.status < 500 else "server_error"
    return {"error": {"message": str(refused), "type": kind, "param": None, "code": refused.code}}


def tools_of(request: ChatRequest) -> list[ToolSpec]:
    functions = [tool["function"] for tool in request.tools or ()]
    return [
        ToolSpec(each["name"], str(each.get("description") or ""), each.get("parameters") or {})
        for each in functions
    ]


def stops_of(request: ChatRequest) -> Sequence[str]:
    stops = [request.stop] if isinstance(request.stop, str) else request.stop or []
    return [stop for stop in stops if stop]


def _head(id: str, kind: str, request: ChatRequest) -> dict[str, Any]:
    return {"id": id, "object": kind, "created": int(time.time()), "model": request.model or "policy"}


def _spelled(call: ToolCall) -> dict[str, Any]:
    arguments = msgspec.json.encode(call.arguments).decode()
    return {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": arguments}}


def _usage(reply: Reply) -> dict[str, int]:
    prompt, sampled = reply.prompt_tokens, len(reply.logprobs)
    return {"prompt_tokens": prompt, "completion_tokens": sampled, "total_tokens": prompt + sampled}


def _logprobs(reply: Reply) -> dict[str, Any]:
    pairs = zip(reply.tokens, reply.logprobs, strict=True)
    return {
        "content": [
            {"token": token, "logprob": logprob, "bytes": list(token.encode()), "top_logprobs": []}
            for token, logprob in pairs
        ]
    }
