"""The trainer, or one rank of several: groups in, updated weights out."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from k2rl.checkpoint_engine.sender import TensorSource
from k2rl.config import LoraConfig, ObjectiveConfig, OptimizerConfig
from k2rl.diagnosis.activity import TRAINER
from k2rl.errors import ConfigError, RunError
from k2rl.models.adapters import settings
from k2rl.models.factors import is_factor
from k2rl.models.hub import shapes_fingerprint
from k2rl.models.logit_probe import LogitProbe
from k2rl.objective.losses import build_policy_loss
from k2rl.objective.mismatch import Mismatch
from k2rl.optim.muon import MuonAdamW, build_optimizer
from k2rl.optim.qk_clip import QKClip
from k2rl.optim.qk_rules import head_rows
from k2rl.optim.router_balance import RouterBalance
from k2rl.training.batch import BatchTotals, SupervisedSequence, TrainSequence
from k2rl.training.checkpoint import FORMAT, About, read_about
from k2rl.training.experts import unstacked
from k2rl.training.export import export
from k2rl.training.group import DistributedGroup, Group
from k2rl.training.loading import check_packing, checkpoint_activations, load_causal_lm
from k2rl.training.lora import Adapters
from k2rl.training.masters import MasterWeights
from k2rl.training.measures import Clock, added, longest
from k2rl.training.offload import residence
from k2rl.training.packing import MicroBatch
from k2rl.training.passes import Passes, PolicyPass, some
from k2rl.training.ranks import ALONE, Ranks
from k2rl.training.reference import Reference
from k2rl.training.replay import RouterReplay
from k2rl.training.saving import Saver, on_host, read_into, read_shapes, snapshot
from k2rl.training.sharding import load_sharded, local
from k2rl.workers.memory import trim

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
        lora: LoraConfig | None = None,
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
            lora: train adapters; the model's own weights stay as they are.

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
        self._optimizer_config = optimizer or OptimizerConfig()
        self._adapters = None if lora is None else Adapters(self._path, lora, seed)
        self.step_count = 0
        self._offloads_gradients = gradients == "offload"
        self._residence = residence(offload, offload_folder)
        self._group = Group() if ranks.alone else DistributedGroup(ranks, self._device)
        try:
            with self._group.call():
                self._build(micro_batch_tokens, activation_checkpointing, gradients != "drop")
        except BaseException:
            self._group.close()
            raise

    def _build(self, micro_batch_tokens: int, activation_checkpointing: bool, keep_gradients: bool) -> None:
        if isinstance(self._group, DistributedGroup):
            group, adapters = self._group, self._adapters
            self._model = load_sharded(self._path, self._dtype, self._device, group, adapters)
            dtype = self._dtype
        else:
            self._model = load_causal_lm(self._path, self._device, self._adapters)
            dtype = torch.float32
        self._probe = self._make_probe()
        self._passes = Passes(
            *(self._model, self._group, self._device, micro_batch_tokens, self._probe),
            replay=RouterReplay(self._model),
        )
        self._group.agreed(lambda: check_packing(self._model, self._path, dtype, self._passes.score))
        self._passes.let_go()
        if activation_checkpointing:
            checkpoint_activations(self._model)
        self._weights = MasterWeights(self._model, self._dtype, self._group, keep_gradients)
        self._model.config.dtype = self._dtype
        self._qk_clip = self._make_qk_clip()
        self._balance = RouterBalance(self._model, self._optimizer_config.router_bias_rate)
        self._saver = Saver(self._group)
        self._reference: Reference | None = None
        self._optimizer = self._fresh_optimizer(self._optimizer_config.lr)
        self._settle_state()
        trim()  # what the check above has gathered

    def _make_probe(self) -> LogitProbe | None:
        if not self._optimizer_config.qk_clip:
            return None
        config = self._model.config
        return LogitProbe(config.num_hidden_layers, config.num_attention_heads, self._device)

    def _make_qk_clip(self) -> QKClip | None:
        if self._probe is None:
            return None
        masters, config = dict(self._weights.named_masters()), self._model.config
        rules = self._group.agreed(lambda: head_rows(masters, config))
        return QKClip(rules, masters, config.num_attention_heads, self._optimizer_config.qk_clip)

    def _fresh_optimizer(self, lr: float) -> MuonAdamW:
        return build_optimizer(self._weights.named_masters(), self._optimizer_config, lr, self._model)

    def _settle_state(self) -> None:
        """Put what the optimizer or a checkpoint made where the rest of the state lives."""
        self._residence.adopt(tensor for kind, tensor in self._state() if self._moves(kind))
        self._weights.moved_in()

    def _moves(self, kind: str) -> bool:
        return kind != "gradients" or self._offloads_gradients

    def _state(self) -> Iterator[tuple[str, Tensor]]:
        """What this rank holds, each once, after what it is: `parameters`, `optimizer`, `gradients`."""
        for tensor in self._weights.memory():
            yield "parameters", tensor
        for _, tensor in self._reference.named() if self._reference else ():
            yield "parameters", local(tensor)
        for state in self._optimizer.state.values():
            yield from (("optimizer", local(value)) for value in state.values() if isinstance(value, Tensor))
        for tensor in self._weights.gradients():
            yield "gradients", tensor

    def state_bytes(self) -> dict[str, int]:
        """Bytes on this rank: `parameters` (masters, copies), `optimizer`, `gradients` of a step."""
        totals = {"parameters": 0, "optimizer": 0}
        totals["gradients"] = sum(local(master).nbytes for _, master in self._weights.named_masters())
        for kind, tensor in self._state():
            if kind != "gradients":
                totals[kind] += tensor.nbytes
        return totals

    def offload(self) -> None:
        """Give the memory of the state back, as the constructor's `offload` says; `reload` takes it again."""
        self._weights.clear_gradients()
        self._residence.offload()

    def reload(self) -> None:
        """Take the memory again, all at once."""
        self._residence.reload()

    def reset_optimizer(self, lr: float) -> None:
        """Forget momentum and go on with another learning rate (k1.5 does so at each iteration)."""
        with self._group.call():
            self._residence.need()
            self._optimizer = self._fresh_optimizer(lr)
            self._settle_state()

    def _trained(self) -> dict[str, Tensor]:
        """All that training changes, by name."""
        return {**dict(self._weights.named_masters()), **self._balance.biases}

    @torch.no_grad()
    def _score_reference(self, policy: PolicyPass, batches: Sequence[MicroBatch]) -> None:
        """The reference's log-probs of a batch; the first call takes the weights of now as the reference."""
        if self._reference is None:
            self._reference = Reference(self._trained())
            self._settle_state()
        try:
            with TRAINER.doing("the reference's forward pass"), self._reference.in_place_of(self._trained()):
                self._weights.publish()
                for number, batch in enumerate(batches):
                    policy.reference[number] = self._passes.score(batch, policy.temperature).logprobs
        finally:
            self._weights.publish()

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
        whole batch; from the second on the policy has left the behaviour policy and tau holds it back. With
        a `kl_weight` the reference is the policy before the first step that has one; checkpoints keep it.

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
            nats), `ratio_min`, `ratio_max`, `entropy` (nats a sampled token), where experts are replayed
            `other_experts_share`. Of the call: `tokens`
            (sampled), `positions` (computed), `sequences`, `lr`,
            `forward_backward_s`, `optimizer_s`.

        Raises:
            RunError: if a loss or the gradient norm is not finite; that update has touched no weight.
            ValueError: if there is no sampled token to learn from.
        """
        sequences = [sequence for group in groups for sequence in group]
        tokens = sum(sum(sequence.sampled_mask) for sequence in sequences)
        use_ptx = ptx_weight > 0 and bool(ptx_sequences)

        def prepared() -> PolicyPass:
            if tokens == 0 or updates < 1:
                raise ValueError(f"policy_step with {tokens} sampled tokens and {updates} updates")
            if use_ptx:
                _loss_tokens(ptx_sequences, "ptx_loss")
            _check_temperature(temperature)
            counted = totals or BatchTotals(len(sequences), tokens)
            return PolicyPass(sequences, build_policy_loss(objective), temperature, counted)

        with self._step(), self._group.call():
            policy = self._group.agreed(prepared)
            clock = Clock()
            if self._optimizer_config.reset_each_step:
                self._optimizer = self._fresh_optimizer(self._lr)
                self._settle_state()
            batches = self._passes.pack(groups)
            if objective.kl_weight:
                self._score_reference(policy, batches)
            ptx_batches = self._passes.pack([[text] for text in ptx_sequences]) if use_ptx else []
            shares: dict[str, float] = {"loss": 0.0, "ptx_loss": 0.0}
            for update in range(updates):
                sums = []
                for number, batch in enumerate(batches):
                    with TRAINER.doing(f"forward and backward of micro-batch {number + 1} of {len(batches)}"):
                        share = self._passes.policy_backward(
                            policy, number, batch, measure=update == 0, where=self._where
                        )
                    sums.append(share)
                for name in sums[0]:
                    shares[name] = shares.get(name, 0.0) + sum(share[name] for share in sums) / updates
                if use_ptx:
                    nll = self._passes.nll_backward(
                        ptx_batches, ptx_sequences, ptx_weight, "ptx_loss", self._where
                    )
                    shares["ptx_loss"] += nll / updates
                clock.lap("forward_backward_s")
                step = self._apply_gradients([sequence.id for sequence in sequences])
                clock.lap("optimizer_s")
            positions = sum(batch.num_positions for batch in batches if batch.sequences)
            mine = (shares, policy.mismatch, policy.entropy_sum, positions, clock.seconds)
            parts = self._group.gather(mine)
        mismatch = Mismatch()
        for part in parts:
            mismatch.merge(part[1])
        return {
            **added(part[0] for part in parts),
            **step,
            **mismatch.metrics(),
            "entropy": sum(part[2] for part in parts) / tokens,
            "tokens": float(tokens),
            "positions": float(sum(part[3] for part in parts)),
            "sequences": float(len(sequences)),
            "lr": self._lr,
            **longest(part[4] for part in parts),
        }

    def sft_step(self, sequences: Sequence[SupervisedSequence], lr: float | None = None) -> dict[str, float]:
        """One supervised update on the mean negative log-likelihood of all loss tokens.

        Args:
            sequences: texts to imitate.
            lr: learning rate from here on; None: as it was.

        Returns:
            `loss`, `grad_norm`, `update_rms`, `tokens`, `sequences`, `lr`, `forward_backward_s`,
            `optimizer_s`.

        Raises:
            RunError: if the loss or the gradient norm is not finite; no weight was touched.
            ValueError: if there is no loss token.
        """
        with self._step(), self._group.call():
            tokens = self._group.agreed(lambda: _loss_tokens(sequences, "loss"))
            if lr is not None:
                for group in self._optimizer.param_groups:
                    group["lr"] = lr
            clock = Clock()
            batches = self._passes.pack([[sequence] for sequence in sequences])
            loss = self._passes.nll_backward(batches, sequences, 1.0, "loss", self._where)
            clock.lap("forward_backward_s")
            step = self._apply_gradients([sequence.id for sequence in sequences])
            clock.lap("optimizer_s")
            parts = self._group.gather((loss, clock.seconds))
        return {
            "loss": sum(part[0] for part in parts),
            **step,
            "tokens": float(tokens),
            "sequences": float(len(sequences)),
            "lr": self._lr,
            **longest(part[1] for part in parts),
        }

    @torch.no_grad()
    def nll(self, sequences: Sequence[SupervisedSequence]) -> dict[str, float]:
        """How well texts are predicted; nothing is learned.

        Returns:
            `nll`, the mean negative log-likelihood of their loss tokens (nats), and `tokens`.

        Raises:
            ValueError: if there is no loss token.
        """
        with self._group.call():
            tokens = self._group.agreed(lambda: _loss_tokens(sequences, "nll"))
            self._residence.need()
            total = 0.0
            for batch in self._passes.pack([[sequence] for sequence in sequences]):
                total -= float(self._passes.score(batch, 1.0).logprobs.double().sum())
            parts = self._group.gather(total)
        return {"nll": sum(parts) / tokens, "tokens": float(tokens)}

    @torch.no_grad()
    def logprobs(self, sequences: Sequence[Sequence[int]], temperature: float = 1.0) -> list[list[float]]:
        """Log-probs of every token after the first, for each sequence."""

        def labelled() -> list[SupervisedSequence]:
            _check_temperature(temperature)
            return [
                SupervisedSequence(tuple(tokens), (False,) + (True,) * (len(tokens) - 1))
                for tokens in sequences
            ]

        with self._group.call():
            self._residence.need()
            mine: dict[int, list[float]] = {}
            for batch in self._passes.pack([[sequence] for sequence in self._group.agreed(labelled)]):
                values = self._passes.score(batch, temperature).logprobs.cpu()
                lengths = torch.bincount(batch.sequence_index.cpu(), minlength=len(batch.sequences)).tolist()
                for sequence, part in zip(batch.sequences, values.split(lengths), strict=True):
                    mine[sequence] = part.tolist()
            everything = {index: row for part in self._group.gather(mine) for index, row in part.items()}
        return [everything[index] for index in range(len(sequences))]

    def named_weights(self) -> Iterator[tuple[str, Tensor]]:
        """The weights, or this rank's rows of them: checkpoint names, tied ones once, and routers' biases.

        They are in the compute dtype; those of several ranks are the masters, which round to it. They can be
        read while the state is offloaded. Of experts each is a tensor of its own, that one rank has.
        """
        for name, weight in self._stacked_weights():
            yield from unstacked(self._model, name, weight)

    def _stacked_weights(self) -> Iterator[tuple[str, Tensor]]:
        """The same, with the experts of a layer as the model has them: as many tensors on all ranks."""
        for name, weight in self._weights.named_weights():
            away = self._residence.away
            yield name, on_host(weight, self._group, self._residence.readable) if away else weight
        yield from self._balance.biases.items()

    def weights_source(self) -> TensorSource:
        """What this rank sends in a push; not a collective."""
        dtype = str(self._dtype).removeprefix("torch.")
        named = list(self.named_weights())
        frozen = () if self._adapters is None else [name for name, _ in named if not is_factor(name)]
        return TensorSource(named, self._group.rank, dtype, frozen)

    def save(self, folder: str | Path) -> None:
        """Begin a resumable checkpoint: its files are written while other things are done, see `saved`.

        `folder` is whole or not there, also when a process is killed.

        Raises:
            RunError: the checkpoint before this one could not be written; this one has not been begun.
        """
        with self._group.call():
            self._group.agreed(self._saver.wait)
            state = snapshot(self._named_state(), self._group, self._residence.readable)
            about = partial(
                About,
                FORMAT,
                optimizer=self._optimizer_config.name,
                model=str(self._path),
                shapes=self._shapes,
                adapters=self._adapters_settings,
            )
            self._saver.start(Path(folder), state, about)

    def saved(self) -> None:
        """Wait until what `save` has begun is there.

        Raises:
            RunError: it could not be written; nothing of it is left, earlier checkpoints are as they were.
        """
        with self._group.call():
            self._group.agreed(self._saver.wait)

    def _named_state(self) -> Iterator[tuple[str, Tensor]]:
        for name, master in self._weights.named_masters():
            yield f"masters/{name}", master
            for key, value in self._optimizer.state.get(master, {}).items():
                yield f"optimizer/{name}/{key}", value
        for name, bias in self._balance.biases.items():
            yield f"buffers/{name}", bias
        for name, tensor in self._reference.named() if self._reference else ():
            yield f"reference/{name}", tensor
        yield "step_count", torch.tensor(self.step_count)
        yield "rng", torch.get_rng_state()

    def load(self, folder: str | Path) -> None:
        """Go on from a checkpoint: its weights, reference and optimizer state, our optimizer settings.

        Raises:
            ConfigError: if there is none, or it is of another model or optimizer.
        """
        folder = Path(folder)
        with self._group.call():
            self._group.agreed(self._saver.wait)
            self._residence.need()
            shapes = self._group.agreed(lambda: self._loadable(folder))
            self._optimizer = self._fresh_optimizer(self._optimizer_config.lr)
            for name, master in self._weights.named_masters():
                prefix = f"optimizer/{name}/"
                for key, (shape, dtype) in shapes.items():
                    if key.startswith(prefix):
                        made = _empty_like(master, shape, dtype)
                        self._optimizer.state[master][key.removeprefix(prefix)] = made
            kept = any(name.startswith("reference/") for name in shapes)
            self._reference = Reference(self._trained()) if kept else None
            state = {name: tensor.detach() for name, tensor in self._named_state()}
            self._group.agreed(lambda: read_into(folder, state, self._group))
            self._weights.publish()
            self._settle_state()
            self.step_count = int(state["step_count"])
            torch.set_rng_state(state["rng"])

    def _loadable(self, folder: Path) -> dict[str, tuple[torch.Size, torch.dtype]]:
        """The tensors of a checkpoint that is of our model and optimizer."""
        shapes, about = read_shapes(folder), read_about(folder)
        if about is not None and about.adapters != self._adapters_settings:
            raise ConfigError(f"{folder} was trained with {about.adapters}, not {self._adapters_settings}")
        ours = {f"masters/{name}": master.shape for name, master in self._weights.named_masters()}
        theirs = {name: shape for name, (shape, _) in shapes.items() if name.startswith("masters/")}
        if ours != theirs:
            name = min(name for name, _ in ours.items() ^ theirs.items()).removeprefix("masters/")
            raise ConfigError(f"{folder} is a checkpoint of another model: {name} differs")
        if about is not None and about.optimizer != self._optimizer_config.name:
            raise ConfigError(
                f"{folder} was trained with optimizer.name={about.optimizer}, "
                f"not {self._optimizer_config.name}"
            )
        return shapes

    def save_pretrained(self, folder: str | Path) -> None:
        """Write a plain Hugging Face checkpoint in the compute dtype, with tokenizer and chat template.

        Adapters are merged into it, and also in a folder of their own (`ADAPTER_FOLDER`).
        """
        with self._group.call():
            self._residence.need()
            weights, path, target = self._stacked_weights(), self._path, Path(folder)
            export(self._model, weights, self._dtype, path, target, self._group, self._adapters)

    def close(self) -> None:
        """Wait for a checkpoint that is being written, and leave the other ranks.

        Raises:
            RunError: as `saved`.
        """
        try:
            self.saved()
        finally:
            self._group.close()

    @property
    def _adapters_settings(self) -> str:
        return settings(None if self._adapters is None else self._adapters.lora)

    @property
    def _lr(self) -> float:
        return float(self._optimizer.param_groups[0]["lr"])

    @property
    def _where(self) -> str:
        return f"update {self.step_count + 1}"

    @contextmanager
    def _step(self) -> Iterator[None]:
        """Around what makes gradients: none are left of a call that ends early."""
        self._residence.need()
        self._weights.clear_gradients()
        if self._probe:
            self._probe.take()
        self._balance.take()
        try:
            yield
        except Exception:
            self._weights.clear_gradients()
            raise

    def _apply_gradients(self, names: Sequence[str]) -> dict[str, float]:
        """Clip, check, step and round; returns `grad_norm`, `update_rms` and what QK-Clip did."""
        norm = self._weights.clip_gradients(self._optimizer_config.max_grad_norm)
        if not math.isfinite(norm):
            bad = self._weights.nonfinite_gradients()

            def refuse() -> None:
                raise RunError(
                    f"gradient norm is {norm} at {self._where} ({some(bad) or 'overflow of the norm'}); "
                    f"batch of {some(names)}"
                )

            self._group.agreed(refuse)
        before = self._weights.sample()
        with TRAINER.doing("optimizer"):
            self._optimizer.step()
        self._settle_state()
        rms = self._weights.moved(before)
        clipped = {}
        if self._probe and self._qk_clip:
            maxima = self._group.largest(self._probe.take().cpu())
            clipped = self._qk_clip.clip(maxima.to(self._device))
        counts = self._balance.take()
        balanced = self._balance.update(self._group.sum(counts)) if counts.numel() else {}
        self._weights.clear_gradients()
        self._weights.publish()
        self.step_count += 1
        return {"grad_norm": norm, "update_rms": rms, **clipped, **balanced}


def compute_with(threads: int) -> None:
    """Let this thread, and no other, compute with so many threads, whatever others set later."""
    # At its first parallel work a thread takes the number that was last set anywhere; here that is over
    # before ours is set.
    torch.get_num_threads()
    torch.set_num_threads(threads)


def _loss_tokens(sequences: Sequence[SupervisedSequence], what: str) -> int:
    tokens = sum(sum(sequence.loss_mask) for sequence in sequences)
    if tokens == 0:
        raise ValueError(f"{what}: none of {len(sequences)} sequences has a token to learn")
    return tokens


def _check_temperature(temperature: float) -> None:
    if not temperature > 0:
        raise ValueError(f"temperature={temperature} must be greater than 0")


def _empty_like(master: Tensor, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """Room for an optimizer's state: sharded as its parameter is, if it is of its shape."""
    if shape == master.shape:
        return torch.zeros_like(master, dtype=dtype, requires_grad=False)
    return torch.zeros(shape, dtype=dtype, device=master.device)
