"""Load a Hugging Face causal LM, and check that packing means the same to it as to us."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM

from k2rl.errors import ConfigError
from k2rl.models.attention import check_attention_config
from k2rl.models.logit_probe import LogitProbe
from k2rl.training import tree_attention
from k2rl.training.batch import SupervisedSequence
from k2rl.training.logprobs import TokenLogprobs, token_logprobs
from k2rl.training.lora import Adapters
from k2rl.training.packing import MicroBatch, pack

_WEIGHT_SUFFIXES = {".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack"}
PACKING_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.1}
"""Nats, by the dtype that the check computes in."""
CPU = torch.device("cpu")


def load_causal_lm(path: Path, device: torch.device = CPU, adapters: Adapters | None = None) -> Any:
    """The model in float32 and evaluation mode (no dropout: log-probs must be those of the policy).

    Args:
        path: folder of its checkpoint.
        device: that it is for.
        adapters: put into it, all else frozen.

    Raises:
        ConfigError: if the folder holds no checkpoint, or its model has layers without full attention.
    """
    model = AutoModelForCausalLM.from_pretrained(
        path,
        config=checked_config(path),
        dtype=torch.float32,
        attn_implementation=tree_attention.NAME,
        local_files_only=True,
    )
    if adapters is not None:
        adapters.add_to(model)
        adapters.fill(model)
    return model.to(device).eval()


def checked_config(path: Path) -> Any:
    """The configuration of a checkpoint that can be trained, as far as that shows in it.

    Raises:
        ConfigError: as `load_causal_lm`.
    """
    if not (path / "config.json").is_file():
        raise ConfigError(f"model.path={path} is not a Hugging Face checkpoint: it has no config.json")
    return check_attention_config(path)


def layers_of(model: Any) -> nn.ModuleList:
    """The decoder layers, one after the other."""
    return next(module for module in model.base_model.modules() if isinstance(module, nn.ModuleList))


def checkpoint_activations(model: Any) -> None:
    """Keep the input of each layer alone, and compute the layer again in the backward pass: the same bits."""
    for layer in layers_of(model):
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False)


def packed_logprobs(
    model: Any, batch: MicroBatch, temperature: float, probe: LogitProbe | None = None
) -> TokenLogprobs:
    """Log-probs of a micro-batch's labels, in its order; differentiable; `probe` sees the logits."""
    hidden: Tensor = model.base_model(
        input_ids=batch.input_ids,
        position_ids=batch.position_ids,
        use_cache=False,
        tree=batch.tree,
        probe=probe,
    ).last_hidden_state
    predicting = hidden[0].index_select(0, batch.predictors)
    head: nn.Linear = model.get_output_embeddings()
    return token_logprobs(predicting, head.weight, batch.label_predictor, batch.targets, temperature)


@torch.no_grad()
def check_packing(
    model: Any, path: Path, dtype: torch.dtype, score: Callable[[MicroBatch, float], TokenLogprobs]
) -> None:
    """Compare packed log-probs with the model's own forward on two short sequences with a shared prefix.

    Catches what would otherwise train on wrong numbers: an attention that ignores our mask or positions,
    logits that are scaled or capped after the head, a head with a bias.

    Args:
        model: as loaded.
        path: where from.
        dtype: that it computes in now.
        score: its log-probs of a micro-batch, at a temperature.

    Raises:
        ConfigError: they differ, so the model cannot be trained on packed rows.
    """
    size, device = model.config.vocab_size, next(model.buffers()).device
    sequences = [
        SupervisedSequence(tuple(token % size for token in tokens), (False,) + (True,) * (len(tokens) - 1))
        for tokens in ((11, 7, 5, 23, 42, 3, 9), (11, 7, 5, 31, 2, 8), (13, 4, 6))
    ]
    batch = pack([sequences], micro_batch_tokens=64)[0].to(device)
    packed = score(batch, 1.0).logprobs
    alone = []
    for index in batch.sequences:
        ids = torch.tensor([sequences[index].token_ids], device=device)
        logprobs = torch.log_softmax(model(input_ids=ids, use_cache=False).logits[0].float(), dim=-1)
        alone.append(logprobs[:-1].gather(1, ids[0, 1:, None])[:, 0])
    gap = float((packed - torch.cat(alone)).abs().max())
    if not gap <= PACKING_TOLERANCE[dtype]:
        raise ConfigError(
            f"model.path={path} ({type(model).__name__}) cannot be trained on packed rows: its log-probs "
            f"differ by {gap:.3g} nats from its own forward; choose a plain decoder (Llama, Qwen3, …)"
        )


def copy_companions(source: Path, target: Path) -> None:
    """Copy tokenizer, chat template and whatever else lies beside the weights; overwrites nothing."""
    for file in sorted(source.iterdir()):
        is_weight = file.suffix in _WEIGHT_SUFFIXES or file.name.endswith(".index.json")
        if file.is_file() and not is_weight and not (target / file.name).exists():
            shutil.copyfile(file, target / file.name)
