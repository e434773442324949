"""Small random models for tests and for trying out the plumbing; `hub.py` runs this as a process.

They have a byte-level tokenizer of 512 tokens and a chat template of their own, so that making them needs
no download.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

SEED = 0
VOCAB_SIZE = 512
PAD, START, END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"

# ChatML. Each message is rendered on its own, so a conversation begins with the very text of its beginning.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

# What the tokenizer's merges come from: the roles, and the words of the tasks that these models are tried on.
CORPUS = """system user assistant tool
You are a helpful assistant. You can call a tool and then answer with a number.
The capital of France is Paris. What is the sum of two and three? The answer is five.
A shop sells apples at four coins each and pears at six coins each. How many coins do nine apples cost?
Think step by step, call the calculator with an expression, read its result, and give the final answer.
There were twenty children in the school; some of them left before noon, others came back in the evening.
{"name": "calculator", "arguments": {"expression": "(12 + 30) * 4"}} {"result": 168, "error": null}
def solve(values): return sum(value for value in values if value is not None)
Every language model reads tokens and writes tokens; the trainer must see the very tokens that were sampled.
"""

# Shared by all. Initialised at about 1/sqrt(hidden_size): at this width the usual 0.02 would make every next
# token equally likely, and any comparison of log-probabilities blind.
SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 4096,
    "initializer_range": 0.09,
}

# The architecture of Kimi K2 and DeepSeek V3: latent attention, and experts after one dense layer. The sizes
# of the latent key and of its rotated part are the ones that vLLM's kernels for the CPU take.
DEEPSEEK: dict[str, Any] = {
    "num_key_value_heads": 4,
    "q_lora_rank": 64,
    "kv_lora_rank": 512,
    "qk_rope_head_dim": 64,
    "qk_nope_head_dim": 32,
    "v_head_dim": 32,
    "head_dim": 64,
    "first_k_dense_replace": 1,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
    "n_group": 1,
    "topk_group": 1,
    "topk_method": "noaux_tc",
    "scoring_func": "sigmoid",
}

# Kimi K2 in miniature: one dense layer, then routed experts of which few work at a time, and a shared one.
# Its routers' biases begin at zero, as those of a model that is yet to be trained.
K2_MINI: dict[str, Any] = {
    **DEEPSEEK,
    "num_hidden_layers": 4,
    "n_routed_experts": 16,
    "norm_topk_prob": True,
    "routed_scaling_factor": 1.0,
}


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE of 512 tokens: any text survives the round trip."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[PAD, START, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS.splitlines(), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END,
        pad_token=PAD,
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def build_model(name: str, tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    """The random model of that name, the same at every call: `tiny-qwen3`, `tiny-llama-untied`,
    `tiny-deepseek` or `k2-mini`.

    Raises:
        ValueError: for another name.
    """
    shape = {
        **SHAPE,
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        match name:
            case "tiny-qwen3":
                return Qwen3ForCausalLM(Qwen3Config(**shape, tie_word_embeddings=True))
            case "tiny-llama-untied":
                return LlamaForCausalLM(LlamaConfig(**shape, tie_word_embeddings=False))
            case "tiny-deepseek":
                model = DeepseekV3ForCausalLM(DeepseekV3Config(**shape | DEEPSEEK, tie_word_embeddings=False))
                for name, buffer in model.named_buffers():
                    if name.endswith("e_score_correction_bias"):
                        torch.nn.init.normal_(buffer, std=0.1)  # a checkpoint's is not zero either
                return model
            case "k2-mini":
                return DeepseekV3ForCausalLM(DeepseekV3Config(**shape | K2_MINI, tie_word_embeddings=False))
    raise ValueError(f"no tiny model is called {name!r}")


def main() -> None:
    name, folder = sys.argv[1], Path(sys.argv[2])
    tokenizer = build_tokenizer()
    build_model(name, tokenizer).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    main()
