"""Forward and backward passes over a rank's share of a batch; gradients add up to those of the whole."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from k2rl.errors import RunError
from k2rl.models.logit_probe import LogitProbe
from k2rl.objective.base import PolicyLoss, PolicyLossInputs, PolicyLossOutput
from k2rl.objective.mismatch import Mismatch
from k2rl.objective.ptx import ptx_loss
from k2rl.training.batch import BatchTotals, LabelledSequence, SupervisedSequence, TrainSequence
from k2rl.training.group import Group
from k2rl.training.loading import packed_logprobs
from k2rl.training.logprobs import TokenLogprobs
from k2rl.training.packing import MicroBatch, empty_micro_batch, pack
from k2rl.training.replay import RouterReplay
from k2rl.training.sharing import share


@dataclass
class PolicyPass:
    """What all micro-batches of one `policy_step` share, and what they measure together."""

    sequences: Sequence[TrainSequence]
    loss: PolicyLoss
    temperature: float
    totals: BatchTotals
    #: Log-probs before the first update, by micro-batch.
    proximal: dict[int, Tensor] = field(default_factory=dict)
    #: Log-probs of the reference policy, by micro-batch; empty where there is none.
    reference: dict[int, Tensor] = field(default_factory=dict)
    mismatch: Mismatch = field(default_factory=Mismatch)
    entropy_sum: float = 0.0


class Passes:
    """Scores micro-batches, and adds their gradients to the model's.

    Ranks make the same number of passes, as each is a collective of a sharded model. A loss that is not
    finite on one of them fails on all.
    """

    def __init__(
        self,
        model: Any,
        group: Group,
        device: torch.device,
        micro_batch_tokens: int,
        probe: LogitProbe | None = None,
        replay: RouterReplay | None = None,
    ) -> None:
        """Args:
        model: plain, or sharded over the group.
        group: of all ranks.
        device: that it computes on.
        micro_batch_tokens: positions in a micro-batch, at most.
        probe: told the attention logits of all passes that make gradients.
        replay: sends tokens to the experts that their sequences name.
        """
        self._replay = replay
        self._model = model
        self._probe = probe
        self._group = group
        self._device = device
        self._micro_batch_tokens = micro_batch_tokens

    def pack(self, groups: Sequence[Sequence[LabelledSequence]]) -> list[MicroBatch]:
        """This rank's share of a batch: as many micro-batches as any rank has, the last of them empty.

        Raises:
            ValueError: as `pack`.
        """
        flat = [sequence for group in groups for sequence in group]

        def packed() -> list[MicroBatch]:
            dealt = share(groups, self._group.world)[self._group.rank]
            order = [index for unit in dealt for index in unit]
            units = [[flat[index] for index in unit] for unit in dealt]
            batches = pack(units, self._micro_batch_tokens)
            return [replace(batch, sequences=tuple(order[i] for i in batch.sequences)) for batch in batches]

        batches = self._group.agreed(packed)
        missing = self._group.most(len(batches)) - len(batches)
        return [
            batch.to(self._device) for batch in (*batches, *(empty_micro_batch() for _ in range(missing)))
        ]

    def score(self, batch: MicroBatch, temperature: float) -> TokenLogprobs:
        """Log-probs of a micro-batch's labels, in its order; differentiable."""
        learns = torch.is_grad_enabled() and len(batch.predictors)  # what only fills a row up is not measured
        probe = self._probe if learns else None
        if self._replay:
            self._replay.use(batch.routes)
        if self._group.world == 1:
            return packed_logprobs(self._model, batch, temperature, probe)
        scored: TokenLogprobs = self._model.packed_logprobs(batch, temperature, probe)
        if not torch.is_grad_enabled():  # else the backward pass lets go of what was gathered
            self.let_go()
        return scored

    def let_go(self) -> None:
        """After a forward pass alone: hold no gathered weights, which the next update would make stale."""
        if self._group.world > 1:
            self._model.reshard()

    def policy_backward(
        self, policy: PolicyPass, number: int, batch: MicroBatch, measure: bool, where: str
    ) -> dict[str, float]:
        """Add the gradient of micro-batch `number`; returns its share of `loss` and of the loss's metrics."""
        members = [policy.sequences[index] for index in batch.sequences]
        scored = self.score(batch, policy.temperature)
        behaviour = self._floats([value for member in members for value in member.behaviour_logprobs])
        if measure:
            policy.mismatch.add(scored.logprobs, behaviour)
            policy.entropy_sum += float(scored.entropy.sum())
            policy.proximal[number] = scored.logprobs.detach()
            if self._replay:
                policy.mismatch.add_choices(self._replay.choices, self._replay.other_choices)

        def loss() -> PolicyLossOutput:
            output = policy.loss(
                PolicyLossInputs(
                    logprobs=scored.logprobs,
                    behaviour_logprobs=behaviour,
                    proximal_logprobs=policy.proximal[number],
                    sequence_index=batch.sequence_index,
                    advantages=self._floats([member.advantage for member in members]),
                    num_sequences_total=policy.totals.sequences,
                    num_tokens_total=policy.totals.tokens,
                    reference_logprobs=policy.reference.get(number),
                )
            )
            _require_finite("policy loss", where, output.loss, scored.logprobs, batch, members)
            return output

        output = self._agreed_loss(loss, scored)
        output.loss.backward()
        return {"loss": output.loss.item(), **{name: float(value) for name, value in output.metrics.items()}}

    def nll_backward(
        self,
        batches: Sequence[MicroBatch],
        sequences: Sequence[SupervisedSequence],
        weight: float,
        what: str,
        where: str,
    ) -> float:
        """Add the gradient of `weight` times the mean NLL of all loss tokens; returns our share of it."""
        total, tokens = 0.0, sum(sum(sequence.loss_mask) for sequence in sequences)
        for batch in batches:
            scored = self.score(batch, 1.0)
            members = [sequences[index] for index in batch.sequences]
            mean = self._agreed_loss(partial(_mean_nll, scored, batch, members, tokens, what, where), scored)
            (weight * mean).backward()
            total += mean.item()
        return total

    def _agreed_loss(self, loss: Callable[[], Any], scored: TokenLogprobs) -> Any:
        try:
            return self._group.agreed(loss)
        except Exception:
            if self._group.world > 1:  # a sharded model is left as it was only by a whole pass
                scored.logprobs.sum().backward()
            raise

    def _floats(self, values: Sequence[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float32, device=self._device)


def _mean_nll(
    scored: TokenLogprobs,
    batch: MicroBatch,
    members: Sequence[SupervisedSequence],
    tokens: int,
    what: str,
    where: str,
) -> Tensor:
    mean = ptx_loss(scored.logprobs, tokens)
    _require_finite(what, where, mean, scored.logprobs, batch, members)
    return mean


def _require_finite(
    what: str,
    where: str,
    loss: Tensor,
    logprobs: Tensor,
    batch: MicroBatch,
    members: Sequence[TrainSequence] | Sequence[SupervisedSequence],
) -> None:
    if bool(torch.isfinite(loss)):
        return
    bad = batch.sequence_index[~torch.isfinite(logprobs)].unique().tolist()
    names = [members[index].id for index in bad] or [member.id for member in members]
    raise RunError(f"{what} is {loss.item()} at {where}; sequences {some(names)}")


def some(names: Sequence[str], limit: int = 5) -> str:
    """The first few names, and how many more there are."""
    shown = ", ".join(name or "(unnamed)" for name in names[:limit])
    return f"{shown} and {len(names) - limit} more" if len(names) > limit else shown
