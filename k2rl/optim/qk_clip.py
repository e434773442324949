"""QK-Clip: after a step, scale down the projections of those heads whose logits have grown too large.

Kimi K2 (arXiv 2507.20534, section 2.1, Algorithm 1): gamma_h = min(1, tau / S_h) for each head, S_h its
largest attention logit in the step's forward passes. `qk_rules.py` says which rows take which power of gamma.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from k2rl.errors import ConfigError
from k2rl.optim.exchange import rows_held
from k2rl.optim.qk_rules import HeadRows


@dataclass(frozen=True)
class _Rows:
    """What this rank holds of a parameter, with the head that each row belongs to and the power it takes."""

    layer: int
    weights: Tensor
    #: int64; 0 where there is none, with a power of 0.
    heads: Tensor
    powers: Tensor


class QKClip:
    """Clips the logits of a model's heads at `threshold`, by its (master) weights."""

    def __init__(
        self, rules: Sequence[HeadRows], parameters: Mapping[str, Tensor], heads: int, threshold: float
    ) -> None:
        """Args:
            rules: from `head_rows`.
            parameters: those that are trained, by name; plain or sharded by FSDP2.
            heads: query heads of a layer.
            threshold: tau, K2: 100.

        Raises:
            ConfigError: if one that must be scaled is not trained, or has other rows than its rule says.
        """
        self._threshold = threshold
        powers: dict[str, tuple[int, Tensor, Tensor]] = {}
        for rule in rules:
            for name in rule.parameters:
                if name not in parameters:
                    raise ConfigError(f"optimizer.qk_clip scales {name}, which is not trained; set it to 0")
                size = parameters[name].shape[0]
                if rule.first + (heads - 1) * rule.stride + rule.rows > size:
                    raise ConfigError(f"optimizer.qk_clip: {name} has {size} rows, too few for {heads} heads")
                _, owner, power = powers.setdefault(
                    name, (rule.layer, torch.zeros(size, dtype=torch.int64), torch.zeros(size))
                )
                for head in range(heads):
                    start = rule.first + head * rule.stride
                    owner[start : start + rule.rows] = head
                    power[start : start + rule.rows] = rule.power
        self._rows = []
        for name, (layer, owner, power) in powers.items():
            first, last = rows_held(parameters[name])
            device = parameters[name].device
            held = (owner[first:last].to(device), power[first:last].to(device))
            self._rows.append(_Rows(layer, parameters[name], *held))

    @torch.no_grad()
    def clip(self, maxima: Tensor) -> dict[str, float]:
        """Scale what belongs to heads above the threshold; rows of other heads keep their bits.

        Args:
            maxima: [layers, heads] float32, the largest logits of the step over all micro-batches and ranks.

        Returns:
            `qk_clip/max_logit` (of all heads), `qk_clip/mean_logit` (the mean of the heads' largest),
            `qk_clip/clipped_share` (of heads), `qk_clip/layer_<n>/max_logit` and `…/mean_logit`.
        """
        gamma = torch.where(maxima > self._threshold, self._threshold / maxima.double(), 1.0)
        clipped = gamma < 1
        some = clipped.any(dim=1).tolist()
        for rows in self._rows:
            if some[rows.layer]:
                factors = gamma[rows.layer, rows.heads] ** rows.powers
                weights = rows.weights.to_local() if isinstance(rows.weights, DTensor) else rows.weights
                weights.mul_(factors.to(weights.dtype).view(-1, *(1,) * (weights.ndim - 1)))
        metrics = {
            "qk_clip/max_logit": float(maxima.max()),
            "qk_clip/mean_logit": float(maxima.mean()),
            "qk_clip/clipped_share": float(clipped.float().mean()),
        }
        for layer, (largest, mean) in enumerate(
            zip(maxima.amax(1).tolist(), maxima.mean(1).tolist(), strict=True)
        ):
            metrics[f"qk_clip/layer_{layer}/max_logit"] = largest
            metrics[f"qk_clip/layer_{layer}/mean_logit"] = mean
        return metrics
