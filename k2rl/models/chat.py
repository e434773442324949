"""The chat template as token bookkeeping: ids are appended, never rendered again.

A conversation is held as ids. The first prompt is rendered once; after each policy turn only the ids
that the template puts between two policy turns are added. What the policy sampled stays as it was.

Only the template writes control tokens. Where an environment's text spells one (`<|im_end|>`), it is
encoded as the plain characters it is: no tool result can end its message and speak as somebody else.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import TemplateError

from envs.tools.formats import MARKERS, introduced, written
from k2rl.errors import ConfigError
from k2rl.types import Message, ToolCall, ToolSpec

# Names under which transformers saves a tokenizer that is all in its tokenizer.json.
PLAIN_CLASSES = ("PreTrainedTokenizerFast", "TokenizersBackend")

_PROBE = [{"role": "user", "content": "u"}]
_PROBE_TURN = {"role": "assistant", "content": "a"}
_PROBE_TOOL = ToolSpec("probe_tool", "d", {"type": "object", "properties": {}})
_PROBE_CALL = Message("assistant", "", (ToolCall("functions.probe_tool:0", "probe_tool", {}),))
# Stands in a rendered text for a control token that was spelled in a message; not to be guessed.
_STAND_IN = f"control{secrets.token_hex(16)}n"


class ChatTemplate:
    """Renders messages to ids with a model's own tokenizer and template.

    Attributes:
        stop_token_ids: ids that end a policy turn.
    """

    def __init__(self, tokenizer: Any, stop_token_ids: Sequence[int]) -> None:
        """Raises:
        ConfigError: the template is missing or rewrites earlier turns, so that ids can't be kept, or
            there is no token that ends a turn.
        """
        if not stop_token_ids:
            raise ConfigError(f"{tokenizer.name_or_path} names no end-of-sequence token: no turn could end")
        if not tokenizer.chat_template:
            raise ConfigError(
                f"{tokenizer.name_or_path} has no chat template; use an instruction-tuned model"
            )
        self._tokenizer = tokenizer
        self.stop_token_ids = tuple(stop_token_ids)
        special = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
        special |= set(tokenizer.convert_ids_to_tokens(list(stop_token_ids)))
        self._control_ids = set(tokenizer.convert_tokens_to_ids(sorted(special)))
        # Longest first, so that one that begins another does not hide it.
        self._control = re.compile("|".join(map(re.escape, sorted(special, key=len, reverse=True))))
        # What a turn's text loses: all that is special but the marks of tool calls.
        self._unsaid = self._control_ids - set(tokenizer.convert_tokens_to_ids(sorted(special & MARKERS)))
        self._turn_end = self._tail_after_turn()
        self._offers_tools = self._names_probe(_PROBE, [_as_function(_PROBE_TOOL)])
        self._writes_calls = self._names_probe([*_PROBE, _as_dict(_PROBE_CALL)])

    @classmethod
    def from_pretrained(cls, path: Path) -> ChatTemplate:
        """Load from a Hugging Face folder; the generation config may name further stop tokens.

        Raises:
            ConfigError: as the constructor, or if the tokenizer is damaged.
        """
        try:
            tokenizer = _tokenizer_class(path).from_pretrained(path)
            settings = path / "generation_config.json"
            configured = json.loads(settings.read_bytes()).get("eos_token_id") if settings.exists() else None
        # Whatever its many readers raise; the tokenizers library raises bare Exceptions.
        except Exception as error:
            reason = " ".join(str(error).split())[:200]
            raise ConfigError(f"the tokenizer in {path} cannot be read: {reason}") from error
        stop = [tokenizer.eos_token_id]
        stop += configured if isinstance(configured, list) else [configured]
        return cls(tokenizer, list(dict.fromkeys(token for token in stop if token is not None)))

    def prompt_ids(self, messages: Sequence[Message], tools: Sequence[ToolSpec] = ()) -> list[int]:
        """The opening of a conversation with these tools, up to where the policy starts to write.

        Where the template leaves tools out, the system message has them, to be called as Hermes's are.

        Raises:
            ConfigError: the template refuses these messages (some know no system role).
        """
        spelled: list[str] = []
        if tools and not self._offers_tools:
            messages, tools = introduced(messages, tools), ()
        offered = [self._mask(_as_function(tool), spelled) for tool in tools]
        return self._encode(self._render(self._masked(messages, spelled), True, offered), spelled)

    def continuation_ids(self, messages: Sequence[Message], turn_closed: bool) -> list[int]:
        """What stands between two policy turns: the environment's messages and the next turn's opening.

        Args:
            messages: what the environment said (tool results, a user's reply).
            turn_closed: whether the policy ended its turn with a stop token itself; else one is put in.
        """
        spelled: list[str] = []
        history = [*_PROBE, _PROBE_TURN]
        before = self._render(history, generate=False)
        after = self._render([*history, *self._masked(messages, spelled)], generate=True)
        if not after.startswith(before):
            raise ConfigError(
                "the chat template rewrites earlier turns; token ids can't be kept across turns"
            )
        close = [] if turn_closed else [self.stop_token_ids[0]]
        return close + self._encode(self._turn_end + after[len(before) :], spelled)

    def turn_ids(self, turn: str | Message) -> list[int]:
        """A policy turn as it would be sampled: its ids and the stop token (for texts to imitate).

        Tool calls of a message are written as the template writes them.
        """
        spelled: list[str] = []
        if isinstance(turn, str) or not turn.tool_calls or not self._writes_calls:
            text = self._mask(written(turn), spelled)
        else:
            text = self._rendered_turn(self._masked([turn], spelled)[0])
        return [*self._encode(text, spelled), self.stop_token_ids[0]]

    def decode(self, token_ids: Sequence[int]) -> str:
        """A policy turn as text, without special tokens but the marks of tool calls."""
        said = [token for token in token_ids if token not in self._unsaid]
        text = self._tokenizer.decode(said, skip_special_tokens=False)
        assert isinstance(text, str)
        return text

    def _tail_after_turn(self) -> str:
        """What the template writes after a turn's stop token, such as ChatML's line break."""
        rendered = self._render([*_PROBE, _PROBE_TURN], generate=False)
        stop = self._tokenizer.convert_ids_to_tokens(self.stop_token_ids[0])
        head, found, tail = rendered.rpartition(stop)
        if not found or not head.endswith("a"):
            raise ConfigError(f"the chat template does not end an assistant turn with {stop!r}")
        return tail

    def _names_probe(self, messages: Sequence[dict[str, Any]], tools: Sequence[dict[str, Any]] = ()) -> bool:
        """Whether the template writes the probe's tool rather than leave it out, or refuse it."""
        try:
            return _PROBE_TOOL.name in self._render(messages, False, tools)
        except ConfigError:
            return False

    def _rendered_turn(self, turn: dict[str, Any]) -> str:
        """What the template writes between the opening of the policy's turn and its stop token."""
        opening = self._render(_PROBE, generate=True)
        whole = self._render([*_PROBE, turn], generate=False)
        end = self._tokenizer.convert_ids_to_tokens(self.stop_token_ids[0]) + self._turn_end
        if not (whole.startswith(opening) and whole.endswith(end)):
            raise ConfigError("the chat template cannot write the tool calls of an assistant message")
        return whole[len(opening) : -len(end)]

    def _render(
        self, messages: Sequence[dict[str, Any]], generate: bool, tools: Sequence[dict[str, Any]] = ()
    ) -> str:
        try:
            text = self._tokenizer.apply_chat_template(
                list(messages), tools=list(tools) or None, tokenize=False, add_generation_prompt=generate
            )
        except TemplateError as error:
            roles = ", ".join(message["role"] for message in messages)
            raise ConfigError(f"the chat template refuses messages of roles {roles}: {error}") from error
        assert isinstance(text, str)
        return text

    def _masked(self, messages: Sequence[Message], spelled: list[str]) -> list[dict[str, Any]]:
        return [self._mask(_as_dict(self._writable(message)), spelled) for message in messages]

    def _writable(self, message: Message) -> Message:
        """With its calls in its text, where the template would leave them out."""
        if self._writes_calls or not message.tool_calls:
            return message
        return Message(message.role, written(message))

    def _mask(self, value: Any, spelled: list[str]) -> Any:
        """A copy in which every control token spelled in a text is a stand-in, numbered into `spelled`."""
        if isinstance(value, str):

            def stand_in(found: re.Match[str]) -> str:
                spelled.append(found[0])
                return f"{_STAND_IN}{len(spelled) - 1};"

            return self._control.sub(stand_in, value)
        if isinstance(value, dict):
            return {self._mask(key, spelled): self._mask(item, spelled) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [self._mask(item, spelled) for item in value]
        return value

    def _encode(self, text: str, spelled: Sequence[str]) -> list[int]:
        """The ids of a rendered text, whose control tokens are the template's; stand-ins become plain text.

        Raises:
            ValueError: the tokenizer has no plain spelling of a control token.
        """
        ids: list[int] = []
        for number, part in enumerate(re.split(f"{_STAND_IN}(\\d+);", text)):
            if number % 2 == 0:
                ids += self._ids(part)
                continue
            token = spelled[int(part)]
            # Cut after its first character, it is no control token any more.
            plain = self._ids(token[:1]) + self._ids(token[1:])
            if self._control_ids & set(plain):
                raise ValueError(
                    f"a message spells {token!r}, which this tokenizer cannot write as plain text"
                )
            ids += plain
        return ids

    def _ids(self, text: str) -> list[int]:
        return list(self._tokenizer.encode(text, add_special_tokens=False)) if text else []


def _tokenizer_class(path: Path) -> Any:
    """`AutoTokenizer` imports models' code and torch first, half of a command's start."""
    settings = path / "tokenizer_config.json"
    config = json.loads(settings.read_bytes()) if settings.exists() else {}
    if config.get("tokenizer_class") in PLAIN_CLASSES and "auto_map" not in config:
        from transformers import PreTrainedTokenizerFast

        return PreTrainedTokenizerFast
    from transformers import AutoTokenizer

    return AutoTokenizer


def _as_function(tool: ToolSpec) -> dict[str, Any]:
    """A tool as chat templates expect it."""
    about = {"name": tool.name, "description": tool.description, "parameters": tool.parameters}
    return {"type": "function", "function": about}


def _as_dict(message: Message) -> dict[str, Any]:
    """A message as chat templates expect it; what it does not have is left out."""
    fields: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.tool_calls:
        fields["tool_calls"] = [
            {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
            for call in message.tool_calls
        ]
    if message.tool_call_id is not None:
        fields["tool_call_id"] = message.tool_call_id
    return fields
