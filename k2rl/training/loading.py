"""Load a Hugging Face causal LM, and check that packing means the same to it as to us."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from k2rl.errors import ConfigError
from k2rl.models.attention import check_attention_config
from k2rl.models.logit_probe import LogitProbe
from k2rl.training import tree_attention
from k2rl.training.batch import SupervisedSequence
from k2rl.training.logprobs import TokenLogprobs, token_logprobs
from k2rl.training.packing import MicroBatch, pack

_WEIGHT_SUFFIXES = {".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack"}
PACKING_TOLERANCE = 1e-3
CPU = torch.device("cpu")


def load_causal_lm(path: Path, device: torch.device = CPU) -> Any:
    """The model in float32 and evaluation mode (no dropout: log-probs must be those of the policy).

    Raises:
        ConfigError: if the folder holds no checkpoint, or its model cannot be trained on packed rows.
    """
    if not (path / "config.json").is_file():
        raise ConfigError(f"model.path={path} is not a Hugging Face checkpoint: it has no config.json")
    config = check_attention_config(path)
    model = AutoModelForCausalLM.from_pretrained(
        path,
        config=config,
        dtype=torch.float32,
        attn_implementation=tree_attention.NAME,
        local_files_only=True,
    )
    model.to(device).eval()
    _check_packing(model, path)
    return model


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
def _check_packing(model: Any, path: Path) -> None:
    """Compare packed log-probs with the model's own forward on two short sequences with a shared prefix.

    Catches what would otherwise train on wrong numbers: an attention that ignores our mask or positions,
    logits that are scaled or capped after the head, a head with a bias.
    """
    size = model.get_output_embeddings().weight.shape[0]
    sequences = [
        SupervisedSequence(tuple(token % size for token in tokens), (False,) + (True,) * (len(tokens) - 1))
        for tokens in ((11, 7, 5, 23, 42, 3, 9), (11, 7, 5, 31, 2, 8), (13, 4, 6))
    ]
    batch = pack([sequences], micro_batch_tokens=64)[0].to(model.device)
    packed = packed_logprobs(model, batch, temperature=1.0).logprobs
    alone = []
    for index in batch.sequences:
        ids = torch.tensor([sequences[index].token_ids], device=model.device)
        logprobs = torch.log_softmax(model(input_ids=ids, use_cache=False).logits[0].float(), dim=-1)
        alone.append(logprobs[:-1].gather(1, ids[0, 1:, None])[:, 0])
    gap = float((packed - torch.cat(alone)).abs().max())
    if not gap <= PACKING_TOLERANCE:
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
