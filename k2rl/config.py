"""The typed configuration of a run: one dataclass a Hydra group (`config_check.py` says what values may be).

Importable without torch. Every field's comment (`#:` lines) is its documentation: the config
reference in `docs/config.md` is generated from them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass
class ModelConfig:
    #: A folder with a Hugging Face checkpoint, a hub id, or a built-in name (`smollm2-135m`, `tiny-qwen3`).
    path: str = "smollm2-135m"
    #: Compute and inference dtype: `bfloat16`, `float32`, or `auto`: bfloat16 where the worker's hardware
    #: multiplies it, else float32. Master weights are always float32.
    dtype: str = "auto"


@dataclass
class EnvServiceConfig:
    """The environment of this run in processes of their own, on the nodes of its Ray cluster."""

    #: Services that the run starts on the nodes of its Ray cluster, dealt out over them, to play its
    #: episodes; one that dies is replaced. 0: they are played in the driver's process, or where `env=remote`
    #: says.
    workers: int = 0
    #: Episodes that each service plays at once.
    episodes: int = 256
    #: Seconds that a call of the environment may take in a service.
    call_seconds: float = 300.0


@dataclass
class EnvConfig:
    #: Registered environment id (`k2rl envs list`) or `module:Class`.
    id: str = "calculator"
    #: Keyword arguments for the environment's constructor, added with a plus sign: `+env.kwargs.max_calls=3`.
    kwargs: dict[str, Any] = field(default_factory=dict)
    #: Held-out tasks in each evaluation.
    eval_tasks: int = 128
    #: Turns of the policy after which an episode is cut off.
    max_turns: int = 4
    service: EnvServiceConfig = field(default_factory=EnvServiceConfig)


@dataclass
class RubricConfig:
    #: `env` (the environment's own rubric), a registered one (`k2rl judge --help` lists them),
    #: or `module:Class`. Where it compares responses, evaluations are judged by the environment's own.
    id: str = "env"
    #: Keyword arguments for the rubric's constructor.
    kwargs: dict[str, Any] = field(default_factory=dict)
    #: Seconds a judgement may take before it counts as failed; of a group, where responses are compared.
    deadline_s: float = 30.0
    #: Tokens of a reply, where the trained model itself judges (`model: policy` in a rubric's arguments).
    max_tokens: int = 256
    #: With `rubric=self_critique`: held-out pairs (or answers) that the critic is asked about in each step.
    critic_examined: int = 16
    #: Of these, pairs whose answers are judged again with praise, padding and self-justification added.
    critic_probed: int = 4
    #: Judgements whose truth the verifier knows, imitated in each step; 0: the critic is not trained.
    critic_examples: int = 0
    #: Supervised updates that these are dealt out to, after the policy's own and at its learning rate.
    critic_updates: int = 1
    #: Own responses of the step, those no worse than their group, that are imitated with each judgement:
    #: learning to judge is not to change how it answers. Small models at high learning rates else forget to.
    critic_replay: int = 1
    #: Keep scores, and give them again where the same conversation on the same task is judged: for judges
    #: that are slow or cost money, and give the same answer twice.
    cache_verdicts: bool = False


@dataclass
class RolloutConfig:
    #: Tasks drawn per step.
    tasks_per_step: int = 12
    #: Responses drawn per task (K in K2's objective); at least 2.
    group_size: int = 8
    #: Episodes that run at the same time.
    max_concurrent: int = 256
    #: The same for episodes of a kind of task, where its environment can take only so many: `{swe: 16}`.
    max_per_kind: dict[str, int] = field(default_factory=dict)
    #: Begin with the groups that are expected to be the longest: by those of their responses that are over,
    #: else by earlier ones to the task or its kind. Else in the order in which they are drawn.
    longest_first: bool = True
    #: Tasks in play at once, as a multiple of `tasks_per_step`. A step takes the first `tasks_per_step` that
    #: are finished; what then is unfinished is surplus.
    oversample: float = 1.0
    #: What becomes of surplus: `drop` (thrown away), or `park` (partial rollouts: it waits with its
    #: environments while the trainer works, and goes on first under the next weights; a resumed run goes on
    #: with it, too).
    surplus: str = "drop"
    #: Sampled tokens after which a step ends with what is finished, at least one task; 0: no limit.
    step_tokens: int = 0
    #: Seconds after which a step does; 0: no limit.
    step_s: float = 0.0
    #: Where surplus is stopped: at the end of its `turn`, or in its `generation`, which is broken off and
    #: goes on from the tokens that it has.
    pause: str = "generation"
    #: Steps of training that a token may be old when it is learned from: a step waits for tasks that would be
    #: older at the next one. 0: nothing that has begun is parked.
    max_staleness: int = 2
    #: What becomes of tokens that older weights have sampled: `train` (as all others; k2's objectives
    #: regularise towards the weights that sampled them), `mask` (they are context only), or `correct`
    #: (importance weights: needs `objective.correction`).
    old_tokens: str = "train"
    #: Draw other tasks in place of those that teach nothing (fewer than two scored responses, or all rewards
    #: equal), until a step has `tasks_per_step` that do; at most so many times `tasks_per_step`. 0: none.
    refill: float = 0.0
    #: Which tasks a step draws: `stream` (as the environment gives them), `prioritised` (by 1 minus how often
    #: the task, or else its kind, succeeded), or `curriculum` (by how often it did, turning into the former).
    sampling: str = "stream"
    #: Of `prioritised` and `curriculum`: tasks to choose from, as a multiple of those drawn.
    candidates: int = 4
    #: Steps after which a `curriculum` is `prioritised`.
    curriculum_steps: int = 100
    #: End a response when a pattern of up to so many tokens comes `repeat_count` times in a row; it is
    #: penalised like one that used up its budget. 0: never.
    repeat_size: int = 0
    #: See `repeat_size`; at least 2.
    repeat_count: int = 4
    #: Where episodes are until they are learned from: null for an SQLite file in the run's folder, or a Redis
    #: (7 or newer): `redis://host:6379/0`.
    store: str | None = None
    #: Sampled tokens per policy turn.
    max_tokens_per_turn: int = 48
    #: Leave out groups whose rewards are all equal: their gradient is zero on policy, their cost is not.
    drop_uniform_groups: bool = True
    #: Share of failed episodes in a step above which the run stops.
    max_failed_share: float = 0.5
    #: Seconds an episode may take before it counts as failed; above `deadlines.generate_s`, so that an
    #: engine that hangs is found to be one.
    episode_deadline_s: float = 600.0


@dataclass
class GatewayConfig:
    #: Address at which agents (`env=agent`) reach the policy by OpenAI's API. Each episode has a key of its
    #: own, without which nobody is answered. `0.0.0.0` for agents on other machines.
    host: str = "127.0.0.1"
    #: Its port; 0 takes one that is free.
    port: int = 0
    #: What agents are told as base URL (it ends in `/v1`), where they reach this machine by another name.
    url: str | None = None
    #: Largest request, in MiB.
    body_mib: int = 16


@dataclass
class TemperatureConfig:
    #: `constant`, `linear`, `cosine`, `step` (all at once, at `step_at`) or `reward` (all at once, when the
    #: reward says so).
    schedule: str = "linear"
    #: Sampling temperature of the first step, at least 0.01.
    start: float = 1.0
    #: Sampling temperature of the last step, at least 0.01.
    end: float = 0.8
    #: Share of the run after which the schedule `step` goes from start to end.
    step_at: float = 0.5
    #: Mean reward of `reward_steps` steps after which the schedule `reward` goes from start to end, for good.
    reward_at: float = 0.7
    #: Steps in a row over which the schedule `reward` takes the mean.
    reward_steps: int = 3


@dataclass
class BudgetConfig:
    #: Sampled tokens per episode for task kinds not named below.
    default: int = 96
    #: Sampled tokens per episode by task kind.
    per_kind: dict[str, int] = field(default_factory=dict)
    #: Subtracted from the reward of an episode that was truncated at its budget.
    penalty: float = 0.5
    #: Reward above which a response counts as correct, for the following.
    correct_above: float = 0.5
    #: Weight of k1.5's length reward, which is between 0.5 (the shortest of its group, if correct) and -0.5
    #: (the longest); 0 switches it off.
    length_weight: float = 0.0
    #: Steps before the length reward begins.
    length_warmup_steps: int = 0
    #: K2.5's Toggle: in turn so many steps in which correct responses longer than the others of their group
    #: earn nothing, and as many in which they do; 0 switches it off.
    toggle_steps: int = 0
    #: Percentile of the group's correct lengths that may not be exceeded.
    toggle_percentile: float = 50.0
    #: Share of a group that must be correct for that.
    toggle_accuracy: float = 0.5


@dataclass
class ObjectiveConfig:
    #: The policy loss: `k2` (squared, by sequences), `k2_token` (by tokens), `k2_5` (masked tokens),
    #: `clipped` (PPO's: GRPO, Dr. GRPO, DAPO), `gspo`, `cispo`, `reinforce` (RLOO). What one does not use of
    #: the following must be null.
    name: str = "k2"
    #: What is subtracted from rewards: `mean` of the group, `leave_one_out`, `normalised` (mean, divided by
    #: the standard deviation) or `exponential` (`tau log mean exp(r / tau)`).
    baseline: str = "mean"
    #: Of `k2`, `k2_token`, `k2_5`: regularisation towards the behaviour policy; does not scale the learning
    #: rate.
    tau: float | None = 0.1
    #: Of `k2_5`: log-ratio of policy and behaviour (nats, below 0) under which a token teaches nothing.
    log_ratio_min: float | None = None
    #: The same from above (above 0).
    log_ratio_max: float | None = None
    #: Of `clipped`, `gspo`, `cispo`: the ratio of policy and policy before the step is cut at 1 minus this.
    clip_low: float | None = None
    #: And at 1 plus this.
    clip_high: float | None = None
    #: Of `clipped`, `cispo`, `reinforce`: `tokens` (all count alike), `sequences` (by the mean of their
    #: tokens) or `sums` (by the sum of their tokens).
    average_over: str | None = None
    #: Of the same: importance weights for the mismatch of trainer and inference engine, `truncated` or
    #: `masked` (0 where they are too far from 1).
    correction: str | None = None
    #: Largest importance weight of that, above 1.
    correction_cap: float | None = None
    #: Weight of a KL (nats a token) to a reference, which is the policy before the first step that has this,
    #: so after the warm start, and a float32 copy of the weights; 0: none.
    kl_weight: float = 0.0
    #: `k1`, `k2` or `k3`: how that KL is estimated.
    kl_estimator: str = "k3"


@dataclass
class OptimizerConfig:
    #: `muon` (Muon for matrices, AdamW for the rest, to which the factors of adapters belong) or `adamw`.
    name: str = "muon"
    #: Learning rate of the RL phase, for both (Muon's update is matched to AdamW's RMS).
    lr: float = 2e-5
    #: Muon's momentum.
    momentum: float = 0.95
    #: Nesterov momentum (Moonlight) or plain (K2's Algorithm 1).
    nesterov: bool = True
    #: Newton-Schulz iterations.
    ns_steps: int = 5
    #: Decoupled weight decay.
    weight_decay: float = 0.0
    #: AdamW's betas.
    betas: list[float] = field(default_factory=lambda: [0.9, 0.95])
    #: AdamW's epsilon.
    eps: float = 1e-8
    #: Global gradient-norm limit; 0 switches it off.
    max_grad_norm: float = 1.0
    #: Forget momentum before each RL step, as k1.5 does.
    reset_each_step: bool = False
    #: QK-Clip's tau (K2: 100): after each update, heads whose attention logits went above it are scaled down.
    #: 0: off. Not for models that normalise queries and keys.
    qk_clip: float = 0.0
    #: By how much the biases of routers move in a step, towards experts that are less busy (DeepSeek V3:
    #: 0.001); 0: they stay. For models with `e_score_correction_bias`.
    router_bias_rate: float = 0.0


@dataclass
class LoraConfig:
    """Low-rank adapters, by peft, in place of training all weights; the model's own stay as they are."""

    #: Rank of the adapters; 0: there are none, and all weights are trained.
    rank: int = 0
    #: What an adapter computes is multiplied by `alpha / rank`.
    alpha: float = 16.0
    #: Linear layers that get one, by the last part of their names: `[q_proj,v_proj]`. Empty: all linear
    #: layers of the model's decoder layers (not routed experts).
    target_modules: list[str] = field(default_factory=list)

    @property
    def scale(self) -> float:
        """What the product of an adapter's factors is multiplied by."""
        return self.alpha / self.rank


@dataclass
class PTXConfig:
    #: Weight of the auxiliary next-token loss; 0 switches it off.
    weight: float = 0.1
    #: Curated sequences per step.
    sequences_per_step: int = 4
    #: JSONL file of chats (docs/sft.md), or `curated` for the shipped set. A chat may have
    #: `train.micro_batch_tokens` at most, and nothing of an evaluation task in it.
    path: str = "curated"
    #: Different chats of it that the run never learns from. How likely they are is measured before the first
    #: step and after each one (metric `ptx/held_out_nll`), also with `weight=0`: it rises as it forgets.
    held_out: int = 0


@dataclass
class ScheduleConfig:
    #: `constant`, `linear` or `cosine`: how the learning rate falls to its end.
    name: str = "constant"
    #: Steps in which it rises from 0.
    warmup_steps: int = 0
    #: Share of the steps after which it begins to fall; until then it stays at its peak.
    decay_from: float = 0.0
    #: What the last step has of it, as a share.
    end: float = 0.1


@dataclass
class DataConfig:
    #: Of `k2rl sft`: JSONL file of chats, `{"messages": [...], "tools": [...]}` a line (docs/sft.md), or
    #: `curated` for the shipped chats. A chat may have `train.micro_batch_tokens` at most.
    path: str | None = None
    #: Another such file, of chats to evaluate on; null: a share of the first one is held out.
    held_out: str | None = None
    #: Share of the chats in `data.path` that is held out, below 1; equal chats are on the same side. 0: none.
    held_out_share: float = 0.1


@dataclass
class SFTConfig:
    #: Chats of a step.
    chats_per_step: int = 16
    #: Peak of the learning rate, for both parts of the optimizer.
    lr: float = 1e-4
    #: How it rises and falls.
    schedule: ScheduleConfig = field(default_factory=lambda: ScheduleConfig("cosine"))


@dataclass
class WarmStartConfig:
    #: Supervised steps on the environment's demonstrations before RL; 0 switches it off.
    steps: int = 0
    #: Demonstrations per step.
    demos_per_step: int = 16
    #: Different demonstrations, gone through as often as the steps need, shuffled anew each time; 0: every
    #: step has new ones.
    demonstrations: int = 0
    #: With `rubric=self_critique`: judgements per step beside the demonstrations, of two answers in these,
    #: with verdicts drawn by lot. A model that has never judged learns to tell a question to the judge from
    #: a task, and nothing of what is right; else its first judgements teach it to answer tasks with verdicts.
    judgements: int = 0
    #: Curated chats of `ptx.path` per step beside the demonstrations, as K2's SFT mixes general data.
    texts: int = 0
    #: Learning rate of the warm start, its peak.
    lr: float = 1e-4
    #: How it rises and falls.
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    #: Task kinds to demonstrate; empty means all.
    kinds: list[str] = field(default_factory=list)


@dataclass
class TrainConfig:
    #: RL steps (one rollout batch each), or those of `k2rl sft` (`sft.chats_per_step` chats each).
    steps: int = 15
    #: Optimizer updates per rollout batch.
    updates_per_step: int = 1
    #: Tokens per forward and backward pass (a group that shares a prompt counts it once).
    micro_batch_tokens: int = 4096
    #: Save a resumable checkpoint every so many steps (and always before the first and after the last, on
    #: Ctrl-C and when a run fails); 0: only then.
    checkpoint_every: int = 5
    #: How many checkpoints are kept: should the newest be damaged on disk, the one before it is resumed.
    keep_checkpoints: int = 2
    #: Evaluate on the held-out tasks, or chats, every so many steps; 0: only before and after.
    eval_every: int = 0
    #: CPU threads of the trainer; 0 means all cores of the machine.
    num_threads: int = 0
    #: Where weights and optimizer state are while the engine generates: `none` (they stay in memory), `file`
    #: (for a trainer on CPU: in files of the run's folder, which have no names and vanish with the process;
    #: the worker gives their memory back), or `host` (for one on a GPU: in the host's memory, pinned).
    offload: str = "none"
    #: What becomes of the gradients' memory after a step: `drop` (freed), `keep` (until the next step), or
    #: `offload` (kept while it trains, and then treated as `offload` says of the state).
    gradients: str = "drop"
    #: Keep each layer's input alone for the backward pass, and compute the layer again: less memory, the same
    #: numbers, about a third more work.
    activation_checkpointing: bool = False


@dataclass
class InferenceConfig:
    #: Longest sequence (prompt and response, in tokens) the engine accepts.
    max_model_len: int = 512
    #: Sequences decoded at once.
    max_num_seqs: int = 128
    #: Size of the KV cache in GiB.
    kv_cache_gib: float = 1.0
    #: Workers that share an inference replica (its tensor-parallel ranks); divides `cluster.workers`.
    tensor_parallel: int = 1
    #: Run without graph compilation (the only choice on CPU).
    enforce_eager: bool = True
    #: Cores of the engine on CPU: `all` of its workers, shared out among tensor-parallel ranks, or a list for
    #: each rank as vLLM spells it (`0-7`, `0-3|4-7`).
    cpu_threads_bind: str = "all"
    #: The start-up self-check refuses to train above this mean trainer-vs-vLLM log-prob gap (nats).
    max_logprob_gap: float = 0.1
    #: Give the memory of weights and KV cache back while the trainer works; the next push fills it again.
    sleep_while_training: bool = True
    #: What a push does with requests that are being generated: `keep` lets them go on with the new weights,
    #: each token with the version that sampled it; `abort` ends them, and their turns fail.
    running_requests: str = "keep"
    #: Record which experts computed each token, and let the trainer send it to the same ones (router replay);
    #: for routers of DeepSeek V3's and Kimi K2's kind. Without it both choose on their own, and rounding lets
    #: them choose otherwise now and then.
    return_routed_experts: bool = False
    #: Further keyword arguments for vLLM's `AsyncEngineArgs`, added with a plus sign:
    #: `+inference.engine_args.block_size=16`.
    engine_args: dict[str, Any] = field(default_factory=dict)


@dataclass
class CheckpointEngineConfig:
    #: With `lora.rank` pushes are of the adapters alone, after a first one of everything. Else `broadcast`
    #: sends all weights to every inference rank, `shard_aware` each rank only what it reads,
    #: `delta` every rank the blocks of rows that are not as they were; all weights if more than half of the
    #: bytes have changed. Dense optimizers change every weight at every step: then `delta` only adds a pass
    #: over the weights. It pays where much stays as it is: frozen parts, adapters, experts that few tokens
    #: reach.
    strategy: str = "broadcast"
    #: Most MiB in a bucket, the unit that is sent, checked and applied at once (a larger tensor has its own).
    bucket_mib: int = 64
    #: MiB of shared memory on each host for a push in flight. 0 keeps two whole versions instead, so that a
    #: restarted engine can be brought up to date without the trainer.
    memory_mib: float = 0.0
    #: Seconds after which a part of a push that owes an answer has failed.
    deadline_s: float = 30.0


@dataclass
class DeviceConfig:
    """Rates are 10^9 bytes a second in one direction, as one sees them with large transfers."""

    #: Ranks (GPUs) of a host.
    per_host: int = 1
    #: Ranks that share one uplink (PCIe switch) to the host's memory.
    per_switch: int = 1
    #: Rate of one rank from the host's memory to its transfer buffers: PCIe; on a CPU, copying and hashing.
    copy_in_gbps: float = 2.8
    #: Rate of an uplink, which its ranks share; 0: ranks share none.
    switch_gbps: float = 0.0
    #: Rate of the host's memory, which all of its copies share.
    memory_gbps: float = 6.0
    #: Rate into one rank from the others of its host: NVLink; 0: they share the host's memory.
    nvlink_gbps: float = 0.0
    #: Rate of the network into a host, all of its adapters together.
    network_gbps: float = 1.0
    #: Rate at which one rank copies what it received into the model.
    apply_gbps: float = 2.8
    #: Microseconds for each block of a tensor that is copied in or applied.
    block_us: float = 10.0
    #: Microseconds for each bucket, in each stage.
    bucket_us: float = 500.0
    #: Microseconds a message takes from host to host.
    message_us: float = 100.0
    #: Pieces in which a bucket passes from host to host, in MiB; 0: whole buckets.
    relay_mib: float = 0.0
    #: Milliseconds to begin, vote and commit a push.
    push_ms: float = 5.0


@dataclass
class ClusterConfig:
    #: Address of a running Ray cluster, or `local` to start one for this run.
    address: str = "local"
    #: Workers: each trains a shard of the model, and every `inference.tensor_parallel` of them, on one node,
    #: are an inference replica.
    workers: int = 1
    #: How Ray places them: `PACK` (few nodes), `SPREAD` (many), `STRICT_PACK` (one node), `STRICT_SPREAD` (a
    #: node for each replica).
    strategy: str = "PACK"
    #: CPUs that each worker reserves in Ray; 0 means the most that all of them can have. Workers on one node
    #: share its cores out among themselves.
    cpus_per_worker: int = 0
    #: GPUs that each worker reserves in Ray, also a part of one (0.5); 0 runs on the CPU.
    gpus_per_worker: float = 0.0
    #: Rates of the hardware, for `k2rl plan` only.
    device: DeviceConfig = field(default_factory=DeviceConfig)


@dataclass
class DeadlineConfig:
    #: Seconds for Ray and the workers (trainer and vLLM) to start, or for one vLLM to start again.
    start_s: float = 300.0
    #: Seconds in which each worker and its vLLM must answer, whatever they are busy with; above the longest
    #: batch that vLLM computes at once.
    heartbeat_s: float = 60.0
    #: Seconds for one generation request, its wait for a place in the batch included.
    generate_s: float = 180.0
    #: Seconds for one optimizer step over a rollout batch.
    train_s: float = 1800.0
    #: Seconds for publishing weights.
    publish_s: float = 120.0
    #: Seconds for saving or loading a checkpoint.
    checkpoint_s: float = 600.0
    #: Seconds in which the store of episodes must answer; a Redis that is started again has so long for it.
    store_s: float = 30.0


@dataclass
class RecoveryConfig:
    #: How often in a run what has died is started again: a vLLM alone, at the version that was published, or,
    #: if a worker died, all of them, from the last checkpoint. 0: the first death ends the run.
    max_restarts: int = 5


@dataclass
class TrackingConfig:
    #: Live terminal view: `auto` (only on a terminal), `on`, `off`.
    live: str = "auto"
    #: Write TensorBoard event files.
    tensorboard: bool = True
    #: Send metrics to Weights & Biases (needs `pip install wandb`).
    wandb: bool = False
    #: Weights & Biases project.
    wandb_project: str = "k2rl"
    #: Keep every step's trajectories, token by token: a resumed run uses those of steps that were not saved
    #: yet again, and `debug=train_only` trains on them.
    record_rollouts: bool = True
    #: Sample trajectories written as text at each step.
    samples_per_step: int = 4


@dataclass
class DebugConfig:
    #: `none`; `rollout_only`: play the steps' rollouts with the model as it is, and record them;
    #: `train_only`: train on the rollouts that another run has recorded, without an inference engine.
    mode: str = "none"
    #: Of `train_only`: the folder of the run that has recorded them.
    rollouts: str | None = None


@dataclass
class Config:
    """A whole run."""

    model: ModelConfig = field(default_factory=ModelConfig)
    env: EnvConfig = field(default_factory=EnvConfig)
    rubric: RubricConfig = field(default_factory=RubricConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    gateway: GatewayConfig = field(default_factory=GatewayConfig)
    temperature: TemperatureConfig = field(default_factory=TemperatureConfig)
    budget: BudgetConfig = field(default_factory=BudgetConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    ptx: PTXConfig = field(default_factory=PTXConfig)
    warm_start: WarmStartConfig = field(default_factory=WarmStartConfig)
    data: DataConfig = field(default_factory=DataConfig)
    sft: SFTConfig = field(default_factory=SFTConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    inference: InferenceConfig = field(default_factory=InferenceConfig)
    checkpoint_engine: CheckpointEngineConfig = field(default_factory=CheckpointEngineConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    deadlines: DeadlineConfig = field(default_factory=DeadlineConfig)
    recovery: RecoveryConfig = field(default_factory=RecoveryConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    debug: DebugConfig = field(default_factory=DebugConfig)
    #: Name of the run's folder under `outputs/`.
    name: str = "run"
    #: Seeds tasks, sampling and initialisation.
    seed: int = 0
    #: Folder of an earlier run to go on with, from its newest whole checkpoint. It keeps its overrides; new
    #: ones apply from there on. Model and optimizer.name must stay.
    resume: str | None = None
