"""What a configuration's values may be: one table of bounds, and the checks between several of them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from k2rl.config import Config
from k2rl.errors import ConfigError
from k2rl.objective.parameters import ESTIMATORS, PARAMETERS, check_objective


@dataclass(frozen=True)
class Bound:
    """The finite numbers from `low` to `high`; a bound that is itself excluded is `open`."""

    low: float
    high: float = math.inf
    open_low: bool = False
    open_high: bool = False

    def holds(self, value: float) -> bool:
        above = value > self.low if self.open_low else value >= self.low
        below = value < self.high if self.open_high else value <= self.high
        return math.isfinite(value) and above and below

    def __str__(self) -> str:
        parts = [f"{'above' if self.open_low else 'at least'} {self.low:g}"]
        if math.isfinite(self.high):
            parts.append(f"{'below' if self.open_high else 'at most'} {self.high:.10g}")
        return "a finite number, " + " and ".join(parts)


ABOVE_0 = Bound(0, open_low=True)
FROM_0 = Bound(0)
FROM_1 = Bound(1)
SHARE = Bound(0, 1)
DECAY = Bound(0, 1, open_high=True)

DEVICE_BOUNDS = {
    "per_host": FROM_1,
    "per_switch": FROM_1,
    "copy_in_gbps": ABOVE_0,
    "switch_gbps": FROM_0,
    "memory_gbps": ABOVE_0,
    "nvlink_gbps": FROM_0,
    "network_gbps": ABOVE_0,
    "apply_gbps": ABOVE_0,
    "block_us": FROM_0,
    "bucket_us": FROM_0,
    "message_us": FROM_0,
    "relay_mib": FROM_0,
    "push_ms": FROM_0,
}

SCHEDULE_BOUNDS = {"warmup_steps": FROM_0, "decay_from": SHARE, "end": SHARE}

BOUNDS = {
    "env.eval_tasks": FROM_1,
    "env.max_turns": FROM_1,
    "env.service.workers": FROM_0,
    "env.service.episodes": FROM_1,
    "env.service.call_seconds": ABOVE_0,
    "rubric.deadline_s": ABOVE_0,
    "rubric.max_tokens": FROM_1,
    "rubric.critic_examined": FROM_1,
    "rubric.critic_probed": FROM_0,
    "rubric.critic_examples": FROM_0,
    "rubric.critic_updates": FROM_1,
    "rubric.critic_replay": FROM_0,
    "rollout.tasks_per_step": FROM_1,
    "rollout.group_size": Bound(2),  # K2's baseline is the group mean
    "rollout.max_concurrent": FROM_1,
    "rollout.max_tokens_per_turn": FROM_1,
    "rollout.oversample": FROM_1,
    "rollout.step_tokens": FROM_0,
    "rollout.step_s": FROM_0,
    "rollout.max_staleness": FROM_0,
    "rollout.refill": FROM_0,
    "rollout.candidates": FROM_1,
    "rollout.curriculum_steps": FROM_1,
    "rollout.repeat_size": FROM_0,
    "rollout.repeat_count": Bound(2),
    "rollout.max_failed_share": SHARE,
    "rollout.episode_deadline_s": ABOVE_0,
    "gateway.port": Bound(0, 65535),
    "gateway.body_mib": FROM_1,
    # vLLM samples anything between 0 and 0.01 at 0.01, while the trainer would divide by the lower value.
    "temperature.start": Bound(0.01),
    "temperature.end": Bound(0.01),
    "budget.default": FROM_1,
    "budget.penalty": FROM_0,
    "budget.correct_above": Bound(-1e9),
    "budget.length_weight": FROM_0,
    "budget.length_warmup_steps": FROM_0,
    "budget.toggle_steps": FROM_0,
    "budget.toggle_percentile": Bound(0, 100),
    "budget.toggle_accuracy": SHARE,
    "temperature.step_at": SHARE,
    "temperature.reward_at": Bound(-1e9),
    "temperature.reward_steps": FROM_1,
    "objective.tau": ABOVE_0,
    "objective.log_ratio_min": Bound(-100, 0, open_high=True),
    "objective.log_ratio_max": ABOVE_0,
    "objective.clip_low": SHARE,
    "objective.clip_high": FROM_0,
    "objective.correction_cap": Bound(1, open_low=True),
    "objective.kl_weight": FROM_0,
    "optimizer.lr": ABOVE_0,
    "optimizer.momentum": DECAY,
    "optimizer.ns_steps": FROM_1,
    "optimizer.weight_decay": FROM_0,
    "optimizer.eps": ABOVE_0,
    "optimizer.max_grad_norm": FROM_0,
    "optimizer.qk_clip": FROM_0,
    "optimizer.router_bias_rate": FROM_0,
    "lora.rank": FROM_0,
    "lora.alpha": ABOVE_0,
    "ptx.weight": FROM_0,
    "ptx.sequences_per_step": FROM_1,
    "ptx.held_out": FROM_0,
    "warm_start.steps": FROM_0,
    "warm_start.demos_per_step": FROM_1,
    "warm_start.demonstrations": FROM_0,
    "warm_start.judgements": FROM_0,
    "warm_start.texts": FROM_0,
    "warm_start.lr": ABOVE_0,
    **{f"warm_start.schedule.{name}": bound for name, bound in SCHEDULE_BOUNDS.items()},
    "data.held_out_share": Bound(0, 1, open_high=True),
    "sft.chats_per_step": FROM_1,
    "sft.lr": ABOVE_0,
    **{f"sft.schedule.{name}": bound for name, bound in SCHEDULE_BOUNDS.items()},
    "train.steps": FROM_1,
    "train.updates_per_step": FROM_1,
    "train.micro_batch_tokens": FROM_1,
    "train.checkpoint_every": FROM_0,
    "train.keep_checkpoints": FROM_1,
    "train.eval_every": FROM_0,
    "train.num_threads": FROM_0,
    "inference.max_model_len": Bound(32),
    "inference.max_num_seqs": Bound(1, 8192),  # vLLM wants at least so many tokens in a batch; ours has 8192
    "inference.kv_cache_gib": ABOVE_0,
    "inference.max_logprob_gap": ABOVE_0,
    "inference.tensor_parallel": FROM_1,
    "checkpoint_engine.bucket_mib": FROM_1,
    "checkpoint_engine.memory_mib": FROM_0,
    "checkpoint_engine.deadline_s": ABOVE_0,
    "cluster.workers": FROM_1,
    "cluster.cpus_per_worker": FROM_0,
    "cluster.gpus_per_worker": FROM_0,
    **{f"cluster.device.{name}": bound for name, bound in DEVICE_BOUNDS.items()},
    "deadlines.start_s": ABOVE_0,
    "deadlines.heartbeat_s": ABOVE_0,
    "deadlines.generate_s": ABOVE_0,
    "deadlines.train_s": ABOVE_0,
    "deadlines.publish_s": ABOVE_0,
    "deadlines.checkpoint_s": ABOVE_0,
    "deadlines.store_s": ABOVE_0,
    "recovery.max_restarts": FROM_0,
    "tracking.samples_per_step": FROM_0,
    "seed": Bound(0, 2**32 - 1),  # what NumPy takes
}

SCHEDULES = ("constant", "linear", "cosine")

CHOICES = {
    "model.dtype": ("auto", "bfloat16", "float32"),
    "rollout.sampling": ("stream", "prioritised", "curriculum"),
    "rollout.surplus": ("drop", "park"),
    "rollout.pause": ("turn", "generation"),
    "rollout.old_tokens": ("train", "mask", "correct"),
    "temperature.schedule": ("constant", "linear", "cosine", "step", "reward"),
    "objective.name": tuple(PARAMETERS),
    "objective.baseline": ("mean", "leave_one_out", "normalised", "exponential"),
    "objective.average_over": (None, "tokens", "sequences", "sums"),
    "objective.kl_estimator": ESTIMATORS,
    "objective.correction": (None, "truncated", "masked"),
    "optimizer.name": ("muon", "adamw"),
    "warm_start.schedule.name": SCHEDULES,
    "sft.schedule.name": SCHEDULES,
    "train.offload": ("none", "file", "host"),
    "train.gradients": ("drop", "keep", "offload"),
    "inference.running_requests": ("keep", "abort"),
    "checkpoint_engine.strategy": ("broadcast", "shard_aware", "delta"),
    "cluster.strategy": ("PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD"),
    "debug.mode": ("none", "rollout_only", "train_only"),
    "tracking.live": ("auto", "on", "off"),
}

NOT_EMPTY = (
    *("model.path", "env.id", "rubric.id", "ptx.path", "inference.cpu_threads_bind"),
    *("cluster.address", "gateway.host", "tracking.wandb_project", "name"),
)

OWN_ENGINE_ARGS = {
    "model": "model.path",
    "dtype": "model.dtype",
    "seed": "seed",
    "max_model_len": "inference.max_model_len",
    "max_num_seqs": "inference.max_num_seqs",
    "kv_cache_memory_bytes": "inference.kv_cache_gib",
    "enforce_eager": "inference.enforce_eager",
    "load_format": None,
    "logprobs_mode": None,
    "skip_tokenizer_init": None,
    "tensor_parallel_size": "inference.tensor_parallel",
    "enable_return_routed_experts": "inference.return_routed_experts",
    "distributed_executor_backend": None,
    "weight_transfer_config": None,
    "worker_cls": None,
}
"""Arguments of vLLM that are not for `inference.engine_args`, and the setting to use instead. Those
without one are what weight pushes and importance ratios rest on."""


def check(config: Config) -> None:
    """Check a configuration's values, each and against each other; the cheap half of the start-up checks.

    Raises:
        ConfigError: one line that says what is wrong and how to mend it.
    """
    for key, bound in BOUNDS.items():
        value = _value(config, key)
        if value is not None and not bound.holds(value):
            raise ConfigError(f"{key}={value} must be {bound}")
    for key, choices in CHOICES.items():
        if (value := _value(config, key)) not in choices:
            raise ConfigError(f"{key}={value!r} is not one of: {', '.join(map(str, choices))}")
    for key in NOT_EMPTY:
        if not _value(config, key).strip():
            raise ConfigError(f"{key} is empty; leave it out for its default")
    betas = config.optimizer.betas
    if len(betas) != 2 or not all(map(DECAY.holds, betas)):
        raise ConfigError(f"optimizer.betas={betas} must be two numbers, each at least 0 and below 1")
    check_objective(config.objective)
    _check_debug(config)
    url = config.gateway.url
    if url is not None and not url.startswith(("http://", "https://")):
        raise ConfigError(f"gateway.url={url} is no address: http://host:port/v1")
    _check_rollout(config)
    _check_budgets(config)
    _check_engine_args(config)
    _check_workers(config)
    _check_offload(config)
    _check_lora(config)
    if config.warm_start.texts and not config.warm_start.steps:
        raise ConfigError(
            f"warm_start.texts={config.warm_start.texts} does nothing with warm_start.steps=0: raise "
            "that, or set warm_start.texts=0"
        )
    request, episode = config.deadlines.generate_s, config.rollout.episode_deadline_s
    if request >= episode:
        raise ConfigError(
            f"deadlines.generate_s={request:g} must be below rollout.episode_deadline_s={episode:g}: else an "
            "engine that hangs looks like episodes that fail"
        )


def _check_offload(config: Config) -> None:
    offload, gpus = config.train.offload, config.cluster.gpus_per_worker
    if offload != "none" and (offload == "file") == bool(gpus):
        where, other = ("CPU", "host") if offload == "file" else ("a GPU", "file")
        raise ConfigError(
            f"train.offload={offload} is for a trainer on {where}; with cluster.gpus_per_worker={gpus:g} it "
            f"must be none or {other}"
        )
    if config.train.gradients == "offload" and offload == "none":
        raise ConfigError("train.gradients=offload goes where train.offload says; that is none")


def _check_lora(config: Config) -> None:
    lora = config.lora
    if not lora.rank:
        if lora.target_modules:
            raise ConfigError(
                f"lora.target_modules={lora.target_modules} does nothing with lora.rank=0: raise that, "
                "or leave it out"
            )
        return
    if config.optimizer.qk_clip or config.optimizer.router_bias_rate:
        key = "qk_clip" if config.optimizer.qk_clip else "router_bias_rate"
        raise ConfigError(
            f"optimizer.{key}={getattr(config.optimizer, key):g} changes the model's own weights, which stay "
            f"as they are with lora.rank={lora.rank}: set optimizer.{key}=0"
        )
    if config.checkpoint_engine.strategy == "shard_aware":
        raise ConfigError(
            "checkpoint_engine.strategy=shard_aware is for pushes of all weights; with "
            f"lora.rank={lora.rank} adapters go to all engines alike: leave it out"
        )


def _check_debug(config: Config) -> None:
    mode, rollouts = config.debug.mode, config.debug.rollouts
    if mode == "train_only" and rollouts is None:
        raise ConfigError("debug=train_only needs debug.rollouts=<folder of a run that recorded rollouts>")
    if mode != "train_only" and rollouts is not None:
        raise ConfigError(f"debug.rollouts={rollouts} does nothing with debug={mode}; set debug=train_only")
    if mode == "rollout_only" and config.resume is not None:
        raise ConfigError("debug=rollout_only trains nothing, so that there is nothing to resume")
    if mode == "rollout_only" and not config.tracking.record_rollouts:
        raise ConfigError("debug=rollout_only records rollouts; leave tracking.record_rollouts=true")


def _check_rollout(config: Config) -> None:
    rollout, temperature = config.rollout, config.temperature
    for kind, most in rollout.max_per_kind.items():
        if not FROM_1.holds(most):
            raise ConfigError(f"rollout.max_per_kind.{kind}={most} must be {FROM_1}")
    if rollout.old_tokens == "correct" and config.objective.correction is None:
        raise ConfigError(
            "rollout.old_tokens=correct weighs old tokens by objective.correction, which is null: set it "
            "(with objective=grpo, dapo, cispo or rloo), or rollout.old_tokens=train"
        )
    varies = temperature.schedule != "constant" and temperature.start != temperature.end
    if rollout.surplus == "park" and varies:
        raise ConfigError(
            "rollout.surplus=park brings responses of several steps into a batch, which the trainer scores "
            "at one temperature: set temperature=constant, or rollout.surplus=drop"
        )


def _check_workers(config: Config) -> None:
    workers, ranks = config.cluster.workers, config.inference.tensor_parallel
    if workers % ranks:
        raise ConfigError(
            f"inference.tensor_parallel={ranks} does not divide cluster.workers={workers}: every replica "
            f"takes {ranks} of them"
        )
    gpus = config.cluster.gpus_per_worker
    if ranks > 1 and 0 < gpus < 1:
        raise ConfigError(
            f"cluster.gpus_per_worker={gpus:g} lets workers share a GPU, so that it cannot be a rank of "
            f"inference.tensor_parallel={ranks}: set cluster.gpus_per_worker=1"
        )


def _check_budgets(config: Config) -> None:
    limit = config.inference.max_model_len
    per_kind = {f"budget.per_kind.{kind}": tokens for kind, tokens in config.budget.per_kind.items()}
    for key, tokens in {"budget.default": config.budget.default, **per_kind}.items():
        if not FROM_1.holds(tokens):
            raise ConfigError(f"{key}={tokens} must be {FROM_1}")
        if tokens >= limit:
            raise ConfigError(
                f"{key}={tokens} does not fit the engine's context of inference.max_model_len={limit}; "
                "lower the budget or raise inference.max_model_len"
            )


def _check_engine_args(config: Config) -> None:
    for name in config.inference.engine_args:
        if name in OWN_ENGINE_ARGS:
            own = OWN_ENGINE_ARGS[name]
            remedy = f"set {own} instead" if own else "it is fixed: weight pushes or log-probs rest on it"
            raise ConfigError(f"inference.engine_args.{name} cannot be set here; {remedy}")


def _value(config: Config, key: str) -> Any:
    value: Any = config
    for part in key.split("."):
        value = getattr(value, part)
    return value
