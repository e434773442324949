"""The trainer of one worker: groups in, updated weights out."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from k2rl.config import ObjectiveConfig, OptimizerConfig
from k2rl.errors import ConfigError, RunError
from k2rl.models.hub import shapes_fingerprint
from k2rl.objective.base import PolicyLoss, PolicyLossInputs
from k2rl.objective.losses import build_policy_loss
from k2rl.objective.mismatch import Mismatch
from k2rl.objective.ptx import ptx_loss
from k2rl.optim.muon import MuonAdamW, build_optimizer
from k2rl.training.batch import BatchTotals, LabelledSequence, SupervisedSequence, TrainSequence
from k2rl.training.checkpoint import read_state, replaced_folder, write_checkpoint
from k2rl.training.loading import copy_companions, load_causal_lm, packed_logprobs
from k2rl.training.masters import MasterWeights
from k2rl.training.offload import StateFiles
from k2rl.training.packing import MicroBatch, pack
from k2rl.training.ranks import ALONE, Ranks

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


class TrainEngine:
    """A causal LM with float32 master weights, its optimizer and its gradient steps.

    Deterministic: on one machine, the same calls with the same seed and threads give the same bits.
    """

    def __init__(
        self,
        model_path: str | Path,
        dtype: str = "bfloat16",
        optimizer: OptimizerConfig | None = None,
        micro_batch_tokens: int = 4096,
        seed: int = 0,
        num_threads: int = 0,
        device: str = "cpu",
        offload: str = "none",
        offload_folder: Path | None = None,
        gradients: str = "drop",
        activation_checkpointing: bool = False,
        ranks: Ranks = ALONE,
    ) -> None:
        """Load the model and its master weights, all of them or one rank's shards.

        Args:
            model_path: folder with a Hugging Face checkpoint.
            dtype: compute dtype, `bfloat16` or `float32`; master weights are float32 either way.
            optimizer: its settings; `lr` is the first learning rate.
            micro_batch_tokens: positions per forward and backward pass.
            seed: of torch's generator.
            num_threads: CPU threads of the calling thread, which should then make all further calls; 0
                means all cores it may run on.
            device: `cpu` or `cuda`, where weights, optimizer state and computation live.
            offload: where weights and optimizer state are between `offload()` and `reload()`: `none` (where
                they were), `host` (the host's memory, pinned for a GPU), `file` (files of `offload_folder`).
            offload_folder: for `file`.
            gradients: what becomes of their memory after a step: `drop`, `keep`, or `offload` (kept while it
                trains, and treated like the optimizer's state between phases).
            activation_checkpointing: keep each layer's input alone, and compute the layer again in the
                backward pass.
            ranks: our place among those that train this model together.

        Raises:
            ConfigError: if the model cannot be loaded or trained, or the dtype is unknown.
        """
        if dtype not in DTYPES:
            raise ConfigError(f"model.dtype={dtype!r} is not one of: {', '.join(DTYPES)}")
        compute_with(num_threads or len(os.sched_getaffinity(0)))
        torch.manual_seed(seed)
        self._path = Path(model_path)
        self._shapes = shapes_fingerprint(self._path)
        self._dtype = DTYPES[dtype]
        self._device = torch.device(device)
        self._model = load_causal_lm(self._path, self._device)
        self._weights = MasterWeights(self._model, self._dtype)
        self._model.config.dtype = self._dtype
        self._optimizer_config = optimizer or OptimizerConfig()
        self._micro_batch_tokens = micro_batch_tokens
        self.step_count = 0
        self._optimizer: MuonAdamW
        self.reset_optimizer(self._optimizer_config.lr)
        self._files = StateFiles(offload_folder) if offload_folder else None
        self._keep_state()

    def _keep_state(self) -> None:
        """Put what the optimizer or a checkpoint made into files, too."""
        if self._files:
            self._files.adopt(tensor for _, tensor in self._state())

    def _state(self) -> Iterator[tuple[str, Tensor]]:
        """All tensors that outlive a step, each once, after what they are: `parameters` or `optimizer`."""
        masters = [master for _, master in self._weights.named_masters()]
        compute = list(self._model.parameters())
        for parameter in {id(tensor): tensor for tensor in (*masters, *compute)}.values():
            yield "parameters", parameter
        for state in self._optimizer.state.values():
            yield from (("optimizer", value) for value in state.values() if isinstance(value, Tensor))

    def state_bytes(self) -> dict[str, int]:
        """Bytes of `parameters` (masters, compute copies), `optimizer` state, and `gradients` in a step."""
        totals = {"parameters": 0, "optimizer": 0}
        totals["gradients"] = sum(master.nbytes for _, master in self._weights.named_masters())
        for kind, tensor in self._state():
            totals[kind] += tensor.nbytes
        return totals

    def offload(self) -> None:
        """Give the memory of what lives in files back; whoever touches it takes its pages again."""
        self._weights.drop_gradients()
        if self._files:
            self._files.offload()

    def reload(self) -> None:
        """Take the memory again, all at once."""
        if self._files:
            self._files.reload()

    def reset_optimizer(self, lr: float) -> None:
        """Forget momentum and go on with another learning rate (k1.5 does so at each iteration)."""
        self._optimizer = build_optimizer(self._weights.named_masters(), self._optimizer_config, lr)

    def policy_step(
        self,
        groups: Sequence[Sequence[TrainSequence]],
        *,
        objective: ObjectiveConfig,
        temperature: float,
        ptx_sequences: Sequence[SupervisedSequence] = (),
        ptx_weight: float = 0.0,
        updates: int = 1,
        totals: BatchTotals | None = None,
    ) -> dict[str, float]:
        """Update the policy on a rollout batch.

        The gradient is that of `policy loss + ptx_weight * ptx loss`. Each of the `updates` goes over the
        whole batch; from the second on the policy has left the behaviour policy and tau holds it back.

        Args:
            groups: the responses of each prompt, with their advantages.
            objective: the policy loss and its parameters.
            temperature: under which the responses were sampled.
            ptx_sequences: curated texts for the auxiliary next-token loss (temperature 1).
            ptx_weight: of that loss; 0 leaves it out.
            updates: optimizer steps on this batch.
            totals: what the loss is averaged over; default: what is given. Pass the numbers before groups
                without signal were left out, so that leaving them out changes no gradient.

        Returns:
            Means over the updates: `loss`, `ptx_loss` and the policy loss's own metrics. Of the last
            update: `grad_norm` (before clipping), `update_rms` (over the first rows of all weights).
            Before the first update: `logprob_gap_mean`, `logprob_gap_max` (trainer against behaviour,
            nats), `ratio_min`, `ratio_max`, `entropy` (nats a sampled token). Of the call: `tokens`
            (sampled), `positions` (computed), `sequences`, `lr`,
            `forward_backward_s`, `optimizer_s`.

        Raises:
            RunError: if a loss or the gradient norm is not finite; that update has touched no weight.
            ValueError: if there is no sampled token to learn from.
        """
        sequences = [sequence for group in groups for sequence in group]
        tokens = sum(sum(sequence.sampled_mask) for sequence in sequences)
        if tokens == 0 or updates < 1:
            raise ValueError(f"policy_step with {tokens} sampled tokens and {updates} updates")
        batches = self._pack(groups)
        policy = _PolicyPass(
            sequences,
            build_policy_loss(objective),
            temperature,
            totals or BatchTotals(len(sequences), tokens),
            proximal={},
        )
        use_ptx = ptx_weight > 0 and bool(ptx_sequences)
        metrics: dict[str, float] = {"loss": 0.0, "ptx_loss": 0.0}
        clock = _Clock()
        self._weights.drop_gradients()  # of a call that ended early
        for update in range(updates):
            sums = [
                self._policy_backward(policy, number, batch, measure=update == 0)
                for number, batch in enumerate(batches)
            ]
            for name in sums[0]:
                metrics[name] = metrics.get(name, 0.0) + sum(share[name] for share in sums) / updates
            if use_ptx:
                metrics["ptx_loss"] += self._nll_backward(ptx_sequences, ptx_weight, "ptx_loss") / updates
            clock.lap("forward_backward_s")
            metrics |= self._apply_gradients(sequences)
            clock.lap("optimizer_s")
        return {
            **metrics,
            **policy.mismatch.metrics(),
            "entropy": policy.entropy_sum / tokens,
            "tokens": float(tokens),
            "positions": float(sum(batch.num_positions for batch in batches)),
            "sequences": float(len(sequences)),
            "lr": self._lr,
            **clock.seconds,
        }

    def sft_step(self, sequences: Sequence[SupervisedSequence]) -> dict[str, float]:
        """One supervised update on the mean negative log-likelihood of all loss tokens.

        Returns:
            `loss`, `grad_norm`, `update_rms`, `tokens`, `sequences`, `lr`, `forward_backward_s`,
            `optimizer_s`.

        Raises:
            RunError: if the loss or the gradient norm is not finite; no weight was touched.
            ValueError: if there is no loss token.
        """
        clock = _Clock()
        self._weights.drop_gradients()  # of a call that ended early
        loss = self._nll_backward(sequences, 1.0, "loss")
        clock.lap("forward_backward_s")
        step = self._apply_gradients(sequences)
        clock.lap("optimizer_s")
        return {
            "loss": loss,
            **step,
            "tokens": float(sum(sum(sequence.loss_mask) for sequence in sequences)),
            "sequences": float(len(sequences)),
            "lr": self._lr,
            **clock.seconds,
        }

    @torch.no_grad()
    def logprobs(self, sequences: Sequence[Sequence[int]], temperature: float = 1.0) -> list[list[float]]:
        """Log-probs of every token after the first, for each sequence."""
        labelled = [
            SupervisedSequence(tuple(tokens), (False,) + (True,) * (len(tokens) - 1)) for tokens in sequences
        ]
        results: list[list[float]] = [[] for _ in sequences]
        for batch in self._pack([[sequence] for sequence in labelled]):
            values = packed_logprobs(self._model, batch, temperature).logprobs.cpu()
            lengths = torch.bincount(batch.sequence_index.cpu(), minlength=len(batch.sequences)).tolist()
            for sequence, part in zip(batch.sequences, values.split(lengths), strict=True):
                results[sequence] = part.tolist()
        return results

    def named_weights(self) -> Iterator[tuple[str, Tensor]]:
        """The weights to publish: compute dtype, checkpoint names, tied weights once."""
        return self._weights.named_weights()

    def save(self, folder: str | Path) -> None:
        """Write a resumable checkpoint; `folder` is whole or not there, also when the process is killed."""
        state = {
            "masters": {name: master.detach() for name, master in self._weights.named_masters()},
            "optimizer_name": self._optimizer_config.name,
            "optimizer": self._optimizer.state_dict(),
            "step_count": self.step_count,
            "rng": torch.get_rng_state(),
        }
        write_checkpoint(Path(folder), state, self._optimizer_config.name, self._path, self._shapes)

    def load(self, folder: str | Path) -> None:
        """Go on from a checkpoint: its weights and optimizer state, this engine's optimizer settings.

        Raises:
            ConfigError: if there is none, or it is of another model or optimizer.
        """
        state = read_state(Path(folder))
        masters = dict(self._weights.named_masters())
        ours = {name: tuple(master.shape) for name, master in masters.items()}
        theirs = {name: tuple(master.shape) for name, master in state["masters"].items()}
        if ours != theirs:
            name = min(name for name, _ in ours.items() ^ theirs.items())
            raise ConfigError(f"{folder} is a checkpoint of another model: {name} differs")
        if state["optimizer_name"] != self._optimizer_config.name:
            raise ConfigError(
                f"{folder} was trained with optimizer.name={state['optimizer_name']}, "
                f"not {self._optimizer_config.name}"
            )
        with torch.no_grad():
            for name, master in masters.items():
                master.copy_(state["masters"][name])
        self._weights.publish()
        self.reset_optimizer(self._optimizer_config.lr)
        # Its state alone: the checkpoint's own learning rate and such would undo overrides of a resumed run.
        settings = self._optimizer.state_dict()["param_groups"]
        self._optimizer.load_state_dict({**state["optimizer"], "param_groups": settings})
        self._keep_state()
        self.step_count = state["step_count"]
        torch.set_rng_state(state["rng"])

    def save_pretrained(self, folder: str | Path) -> None:
        """Write a plain Hugging Face checkpoint in the compute dtype, with tokenizer and chat template."""
        with replaced_folder(Path(folder)) as target:
            self._model.save_pretrained(target)
            copy_companions(self._path, target)

    @property
    def _lr(self) -> float:
        return float(self._optimizer.param_groups[0]["lr"])

    def _pack(self, groups: Sequence[Sequence[LabelledSequence]]) -> list[MicroBatch]:
        return [batch.to(self._device) for batch in pack(groups, self._micro_batch_tokens)]

    def _floats(self, values: Sequence[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float32, device=self._device)

    def _policy_backward(
        self, policy: _PolicyPass, number: int, batch: MicroBatch, measure: bool
    ) -> dict[str, float]:
        """Add the gradient of micro-batch `number`; returns its share of `loss` and of the loss's metrics."""
        members = [policy.sequences[index] for index in batch.sequences]
        scored = packed_logprobs(self._model, batch, policy.temperature)
        behaviour = self._floats([value for member in members for value in member.behaviour_logprobs])
        if measure:
            policy.mismatch.add(scored.logprobs, behaviour)
            policy.entropy_sum += float(scored.entropy.sum())
            policy.proximal[number] = scored.logprobs.detach()
        output = policy.loss(
            PolicyLossInputs(
                logprobs=scored.logprobs,
                behaviour_logprobs=behaviour,
                proximal_logprobs=policy.proximal[number],
                sequence_index=batch.sequence_index,
                advantages=self._floats([member.advantage for member in members]),
                num_sequences_total=policy.totals.sequences,
                num_tokens_total=policy.totals.tokens,
            )
        )
        self._require_finite("policy loss", output.loss, scored.logprobs, batch, members)
        output.loss.backward()
        return {"loss": output.loss.item(), **{name: float(value) for name, value in output.metrics.items()}}

    def _nll_backward(self, sequences: Sequence[SupervisedSequence], weight: float, what: str) -> float:
        """Add the gradient of `weight` times the mean NLL of all loss tokens; returns the mean."""
        total, tokens = 0.0, sum(sum(sequence.loss_mask) for sequence in sequences)
        if tokens == 0:
            raise ValueError(f"{what}: none of {len(sequences)} sequences has a token to learn")
        for batch in self._pack([[sequence] for sequence in sequences]):
            logprobs = packed_logprobs(self._model, batch, 1.0).logprobs
            loss = ptx_loss(logprobs, tokens)
            self._require_finite(what, loss, logprobs, batch, [sequences[index] for index in batch.sequences])
            (weight * loss).backward()
            total += loss.item()
        return total

    def _apply_gradients(
        self, sequences: Sequence[TrainSequence] | Sequence[SupervisedSequence]
    ) -> dict[str, float]:
        """Clip, check, step and round; returns `grad_norm` and `update_rms`."""
        norm = self._weights.clip_gradients(self._optimizer_config.max_grad_norm)
        if not math.isfinite(norm):
            names = self._weights.nonfinite_gradients()
            self._weights.drop_gradients()
            raise RunError(
                f"gradient norm is {norm} at update {self.step_count + 1} "
                f"({_some(names) or 'overflow of the norm'}); batch of {_some([s.id for s in sequences])}"
            )
        before = self._weights.sample()
        self._optimizer.step()
        self._keep_state()
        moved = torch._foreach_sub(self._weights.sample(), before)
        self._weights.drop_gradients()
        self._weights.publish()
        self.step_count += 1
        rms = float(nn.utils.get_total_norm(moved)) / math.sqrt(sum(part.numel() for part in moved))
        return {"grad_norm": norm, "update_rms": rms}

    def _require_finite(
        self,
        what: str,
        loss: Tensor,
        logprobs: Tensor,
        batch: MicroBatch,
        members: Sequence[TrainSequence] | Sequence[SupervisedSequence],
    ) -> None:
        if bool(torch.isfinite(loss)):
            return
        bad = batch.sequence_index[~torch.isfinite(logprobs)].unique().tolist()
        self._weights.drop_gradients()
        raise RunError(
            f"{what} is {loss.item()} at update {self.step_count + 1}; sequences "
            f"{_some([members[index].id for index in bad] or [member.id for member in members])}"
        )


def compute_with(threads: int) -> None:
    """Let this thread, and no other, compute with so many threads, whatever others set later."""
    # At its first parallel work a thread takes the number that was last set anywhere; here that is over
    # before ours is set.
    torch.get_num_threads()
    torch.set_num_threads(threads)


class _PolicyPass:
    """What all micro-batches of one `policy_step` share, and what they measure together."""

    def __init__(
        self,
        sequences: Sequence[TrainSequence],
        loss: PolicyLoss,
        temperature: float,
        totals: BatchTotals,
        proximal: dict[int, Tensor],
    ) -> None:
        self.sequences = sequences
        self.loss = loss
        self.temperature = temperature
        self.totals = totals
        #: Log-probs before the first update, by micro-batch.
        self.proximal = proximal
        self.mismatch = Mismatch()
        self.entropy_sum = 0.0


class _Clock:
    """Seconds by phase."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, phase: str) -> None:
        now = time.perf_counter()
        self.seconds[phase] = self.seconds.get(phase, 0.0) + now - self._last
        self._last = now


def _some(names: Sequence[str], limit: int = 5) -> str:
    """The first few names, and how many more there are."""
    shown = ", ".join(name or "(unnamed)" for name in names[:limit])
    return f"{shown} and {len(names) - limit} more" if len(names) > limit else shown
