"""The chat template as token bookkeeping: ids are appended, never rendered again.

A conversation is held as ids. The first prompt is rendered once; after each policy turn only the ids
that the template puts between two policy turns are added. What the policy sampled stays as it was.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from k2rl.errors import ConfigError
from k2rl.types import Message

_PROBE = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]
_PROBE_TURN = {"role": "assistant", "content": "a"}


class ChatTemplate:
    """Renders messages to ids with a model's own tokenizer and template.

    Attributes:
        stop_token_ids: ids that end a policy turn.
    """

    def __init__(self, tokenizer: Any, stop_token_ids: Sequence[int]) -> None:
        """Raises:
        ConfigError: the template is missing or rewrites earlier turns, so that ids can't be kept.
        """
        if not tokenizer.chat_template:
            raise ConfigError(
                f"{tokenizer.name_or_path} has no chat template; use an instruction-tuned model"
            )
        self._tokenizer = tokenizer
        self.stop_token_ids = tuple(stop_token_ids)
        self._turn_end = self._tail_after_turn()

    @classmethod
    def from_pretrained(cls, path: Path) -> ChatTemplate:
        """Load from a Hugging Face folder; the generation config may name further stop tokens."""
        from transformers import AutoTokenizer, GenerationConfig

        tokenizer = AutoTokenizer.from_pretrained(path)
        stop = [tokenizer.eos_token_id]
        if (path / "generation_config.json").exists():
            configured = GenerationConfig.from_pretrained(path).eos_token_id
            stop += configured if isinstance(configured, list) else [configured]
        return cls(tokenizer, list(dict.fromkeys(token for token in stop if token is not None)))

    def prompt_ids(self, messages: Sequence[Message]) -> list[int]:
        """The opening of a conversation, up to where the policy starts to write."""
        return self._encode(self._render(_as_dicts(messages), generate=True))

    def continuation_ids(self, messages: Sequence[Message], turn_closed: bool) -> list[int]:
        """What stands between two policy turns: the environment's messages and the next turn's opening.

        Args:
            messages: what the environment said (tool results, a user's reply).
            turn_closed: whether the policy ended its turn with a stop token itself; else one is put in.
        """
        history = [*_PROBE, _PROBE_TURN]
        before = self._render(history, generate=False)
        after = self._render([*history, *_as_dicts(messages)], generate=True)
        if not after.startswith(before):
            raise ConfigError(
                "the chat template rewrites earlier turns; token ids can't be kept across turns"
            )
        close = [] if turn_closed else [self.stop_token_ids[0]]
        return close + self._encode(self._turn_end + after[len(before) :])

    def turn_ids(self, text: str) -> list[int]:
        """A policy turn as it would be sampled: the text's ids and the stop token (for demonstrations)."""
        return [*self._encode(text), self.stop_token_ids[0]]

    def decode(self, token_ids: Sequence[int]) -> str:
        """A policy turn as text, without special tokens."""
        text = self._tokenizer.decode(list(token_ids), skip_special_tokens=True)
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

    def _render(self, messages: list[dict[str, Any]], generate: bool) -> str:
        text = self._tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=generate)
        assert isinstance(text, str)
        return text

    def _encode(self, text: str) -> list[int]:
        return list(self._tokenizer.encode(text, add_special_tokens=False))


def _as_dicts(messages: Sequence[Message]) -> list[dict[str, Any]]:
    return [{"role": message.role, "content": message.content} for message in messages]
