"""Of `gpu.py`: what a train step of SmolLM2-135M's shape is made of, beside plain transformers."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from gpu_attention import Problem, Row, by_blocks, rows
from gpu_bench import Bench
from optim import SMOLLM2
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from k2rl.config import OptimizerConfig
from k2rl.models.logit_probe import LogitProbe
from k2rl.optim.muon import build_optimizer
from k2rl.training import tree_attention
from k2rl.training.logprobs import token_logprobs
from k2rl.training.tree_attention import Tree

SMALL = {
    "vocab_size": 512,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "tie_word_embeddings": True,
}


class Case:
    """A packed row's tokens, and the same as a batch of sequences padded to the longest."""

    def __init__(self, bench: Bench, row: Row, vocabulary: int) -> None:
        ends, length = row.subtree_end.tolist(), len(row.subtree_end)
        self.name = row.name
        leaves = [i for i in range(length) if ends[i] == i + 1]
        paths = [[i for i in range(leaf + 1) if leaf < ends[i]] for leaf in leaves]
        depth = torch.zeros(length, dtype=torch.int64)
        for path in paths:
            depth[path] = torch.arange(len(path))
        self.tree = Tree(row.subtree_end, bench.device)
        self.visible = row.visible(bench.device)[None, None]
        self.positions = depth.to(bench.device)[None]
        self.ids = torch.randint(vocabulary, (1, length), generator=bench.generator, device=bench.device)
        self.targets = self.ids[0].roll(-1)
        longest = max(map(len, paths))
        batch = torch.tensor([path + [-1] * (longest - len(path)) for path in paths], device=bench.device)
        self.batch_ids = self.ids[0][batch.clamp(min=0)]
        self.batch_targets = self.targets[batch.clamp(min=0)].masked_fill(batch < 0, -100)
        self.padding = None if (batch >= 0).all() else (batch >= 0).long()


def step(bench: Bench) -> None:
    """The train engine's parts in its order, without the engine, which imports more than torch.

    bfloat16, float32 masters. Plain transformers computes the same sequences as a batch, and the same row
    under a dense mask, with SDPA and all logits at once; it has no probe and no optimizer of its own.
    """
    shape = SMALL if bench.small else SMOLLM2
    torch.manual_seed(0)
    model, theirs = (
        LlamaForCausalLM(LlamaConfig(**shape, attn_implementation=name)).to(bench.device, torch.bfloat16)
        for name in (tree_attention.NAME, "sdpa")
    )
    named = dict(model.named_parameters())
    masters = {name: nn.Parameter(parameter.detach().float()) for name, parameter in named.items()}
    optimizer = build_optimizer(masters.items(), OptimizerConfig(), 1e-5, model)
    probe = LogitProbe(shape["num_hidden_layers"], shape["num_attention_heads"], bench.device)

    @torch.no_grad()
    def update() -> None:
        optimizer.step()
        torch._foreach_copy_(list(named.values()), list(masters.values()))

    length = 128 if bench.small else 8192
    for row in rows(length)[1:]:
        case = Case(bench, row, shape["vocab_size"])
        runs = {
            "plain transformers": partial(_passes, theirs, partial(_plain, case)),
            "plain transformers, the row under a dense mask": partial(_passes, theirs, partial(_dense, case)),
            "k2rl": partial(_passes, model, partial(_packed, case, probe)),
            "k2rl, attention by blocks": partial(_passes, model, partial(_by_blocks, case, probe)),
        }
        runs["k2rl"]()
        for name, parameter in named.items():
            masters[name].grad = parameter.grad.float()
        taken = bench.in_turns(runs | {"optimizer": update})
        base = taken["plain transformers"]
        for name, run in runs.items():
            bench.row(
                "step",
                f"{row.name}, SmolLM2-135M, forward and backward, {name}",
                {
                    "ms": taken[name] * 1e3,
                    "host's ms": bench.host_seconds(run) * 1e3,
                    "tokens/s": length / taken[name],
                    "plain / it": base / taken[name],
                    "peak GiB": bench.peak(run),
                },
            )
        _parts(bench, case, row, model, update, taken["k2rl"])
        bench.free()


def _passes(model: Any, run: Callable[[Any], None]) -> None:
    model.zero_grad()
    run(model)


def _packed(case: Case, probe: LogitProbe, model: Any) -> None:
    hidden: Tensor = model.base_model(
        input_ids=case.ids, position_ids=case.positions, use_cache=False, tree=case.tree, probe=probe
    ).last_hidden_state[0]
    _logprobs(case, hidden, model.get_output_embeddings().weight)


def _logprobs(case: Case, hidden: Tensor, head: Tensor) -> None:
    every = torch.arange(len(hidden), device=hidden.device)
    token_logprobs(hidden, head, every, case.targets, 1.0).logprobs.mean().neg().backward()


def _by_blocks(case: Case, probe: LogitProbe, model: Any) -> None:
    with by_blocks():
        _packed(case, probe, model)


def _plain(case: Case, model: Any) -> None:
    logits = model(input_ids=case.batch_ids, attention_mask=case.padding, use_cache=False).logits
    F.cross_entropy(logits.float().flatten(0, 1), case.batch_targets.flatten()).backward()


def _dense(case: Case, model: Any) -> None:
    logits = model(
        input_ids=case.ids, position_ids=case.positions, attention_mask=case.visible, use_cache=False
    ).logits
    F.cross_entropy(logits[0].float(), case.targets).backward()


def _parts(bench: Bench, case: Case, row: Row, model: Any, update: Callable[[], None], whole: float) -> None:
    """Attention of all layers, log-probs and the optimizer, each alone, as shares of k2rl's whole step."""
    config = model.config
    length = len(row.subtree_end)
    width = config.hidden_size // config.num_attention_heads
    problem = Problem(bench, length, (config.num_attention_heads, config.num_key_value_heads, width))
    attention = partial(problem.run, partial(problem.tree, case.tree), True)
    head = nn.Parameter(model.get_output_embeddings().weight.detach().clone())
    hidden = nn.Parameter(bench.random(length, config.hidden_size, dtype=torch.bfloat16))

    def layers() -> None:
        for _ in range(config.num_hidden_layers):
            attention()

    runs = {
        "attention of all layers": layers,
        "log-probs": partial(_logprobs, case, hidden, head),
        "optimizer": update,
    }
    taken = bench.in_turns(runs)
    for name, run in runs.items():
        figures = {
            "ms": taken[name] * 1e3,
            "host's ms": bench.host_seconds(run) * 1e3,
            "of the step": taken[name] / (whole + taken["optimizer"]),
        }
        bench.row("step", f"{row.name}, k2rl's {name}", figures)
