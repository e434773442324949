"""Of `gpu.py`: what a train step of SmolLM2-135M's shape is made of, beside plain transformers."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from gpu_bench import Bench
from optim import SMOLLM2
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from k2rl.config import OptimizerConfig
from k2rl.models.logit_probe import LogitProbe
from k2rl.optim.muon import build_optimizer
from k2rl.training import tree_attention
from k2rl.training.logprobs import token_logprobs
from k2rl.training.tree_attention import QueryBlock, plan_blocks


def step(bench: Bench) -> None:
    """The train engine's parts in its order, without the engine, which imports more than torch.

    Eight sequences in a row, bfloat16, float32 masters. The same model with the same tokens in a batch,
    SDPA and all logits at once is the plain side; it has no probe and no optimizer of its own.
    """
    shape = SMOLLM2
    if bench.small:
        shape = {
            "vocab_size": 512,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "tie_word_embeddings": True,
        }
    count, length = (8, 16) if bench.small else (8, 1024)
    tokens = count * length
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**shape, attn_implementation=tree_attention.NAME))
    model = model.to(bench.device, torch.bfloat16).eval()
    named = dict(model.named_parameters())
    masters = {name: nn.Parameter(parameter.detach().float()) for name, parameter in named.items()}
    optimizer = build_optimizer(masters.items(), OptimizerConfig(), 1e-5, model)
    ids = torch.randint(shape["vocab_size"], (count, length), generator=bench.generator, device=bench.device)
    targets = ids.roll(-1, dims=1)
    ends = (torch.arange(tokens) // length + 1) * length
    probe = LogitProbe(shape["num_hidden_layers"], shape["num_attention_heads"], bench.device)

    def packed(blocks: tuple[QueryBlock, ...]) -> None:
        positions = torch.arange(length, device=bench.device).repeat(count)[None]
        hidden: Tensor = model.base_model(
            input_ids=ids.view(1, -1), position_ids=positions, use_cache=False, tree=blocks, probe=probe
        ).last_hidden_state[0]
        head = model.get_output_embeddings().weight
        rows = torch.arange(tokens, device=bench.device)
        token_logprobs(hidden, head, rows, targets.flatten(), 1.0).logprobs.mean().neg().backward()

    def plain() -> None:
        logits = model(input_ids=ids, use_cache=False).logits
        F.cross_entropy(logits.float().flatten(0, 1), targets.flatten()).backward()

    @torch.no_grad()
    def update() -> None:
        optimizer.step()
        torch._foreach_copy_(list(named.values()), list(masters.values()))

    def passes(run: object) -> None:
        model.zero_grad()
        run()

    runs = {"plain transformers": partial(passes, plain)}
    for size in (96, 512):
        planned = plan_blocks(ends, size)
        blocks = tuple(_on(block, bench.device) for block in planned)
        runs[f"k2rl, blocks of {size}"] = partial(passes, partial(packed, blocks))
    passes(partial(packed, blocks))
    for name, parameter in named.items():
        masters[name].grad = parameter.grad.float()
    taken = bench.in_turns({**runs, "optimizer": update})
    base = taken["plain transformers"]
    for name in runs:
        bench.row(
            "step",
            f"{tokens} tokens, SmolLM2-135M, forward and backward, {name}",
            {
                "ms": taken[name] * 1e3,
                "tokens/s": tokens / taken[name],
                "plain / it": base / taken[name],
                "optimizer's ms": taken["optimizer"] * 1e3,
                "optimizer's share": taken["optimizer"] / (taken[name] + taken["optimizer"]),
                "peak GiB": bench.peak(runs[name]),
            },
        )


def _on(block: QueryBlock, device: torch.device) -> QueryBlock:
    return QueryBlock(block.start, block.stop, block.key_runs, block.mask.to(device))
