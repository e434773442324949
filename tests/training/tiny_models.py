"""Random models of a few thousand parameters as Hugging Face folders, and random batches for them."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from k2rl.training.batch import SupervisedSequence, TrainSequence

VOCABULARY = 64


def save_model(kind: str, folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    """`llama` (grouped-query attention, tied embeddings) or `qwen3` (query-key norm, a head of its own)."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "initializer_range": 0.2,
        "max_position_embeddings": 512,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 2,
    }
    model: Any
    if kind == "llama":
        model = LlamaForCausalLM(LlamaConfig(**sizes, tie_word_embeddings=True))
    else:
        model = Qwen3ForCausalLM(Qwen3Config(**sizes, tie_word_embeddings=False))
    model.to(dtype).save_pretrained(folder)
    words = {f"w{index}": index for index in range(VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="w2", pad_token="w2")
    fast.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    fast.save_pretrained(folder)
    return folder


def random_group(rng: random.Random, size: int, name: str = "g") -> list[TrainSequence]:
    """Responses to one prompt: policy tokens, tool tokens, policy tokens; some share a beginning."""
    prompt = [rng.randrange(VOCABULARY) for _ in range(rng.randint(3, 9))]
    shared = [rng.randrange(VOCABULARY) for _ in range(3)]
    group = []
    for index in range(size):
        first = shared[: rng.randint(0, 3)] + [rng.randrange(VOCABULARY) for _ in range(rng.randint(1, 4))]
        tool = [rng.randrange(VOCABULARY) for _ in range(rng.randint(0, 3))]
        last = [rng.randrange(VOCABULARY) for _ in range(rng.randint(0, 4))]
        mask = [False] * len(prompt) + [True] * len(first) + [False] * len(tool) + [True] * len(last)
        group.append(
            TrainSequence(
                token_ids=tuple(prompt + first + tool + last),
                sampled_mask=tuple(mask),
                behaviour_logprobs=tuple(rng.uniform(-5, -3) for _ in range(sum(mask))),
                advantage=rng.uniform(-1, 1),
                id=f"{name}/{index}",
            )
        )
    return group


def random_groups(seed: int, groups: int = 3, size: int = 4) -> list[list[TrainSequence]]:
    rng = random.Random(seed)
    return [random_group(rng, size, f"g{index}") for index in range(groups)]


def random_texts(seed: int, count: int = 4) -> list[SupervisedSequence]:
    rng = random.Random(seed)
    texts = []
    for index in range(count):
        ids = tuple(rng.randrange(VOCABULARY) for _ in range(rng.randint(4, 12)))
        mask = (False, False) + (True,) * (len(ids) - 2)
        texts.append(SupervisedSequence(ids, mask, id=f"text{index}"))
    return texts
