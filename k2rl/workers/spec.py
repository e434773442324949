"""What a worker is told: what it has to be, and its place among the others."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import msgspec

from k2rl.config import CheckpointEngineConfig, Config, InferenceConfig, LoraConfig, OptimizerConfig


class WorkerSpec(msgspec.Struct, frozen=True):
    """What all workers of a run need to start."""

    model_path: str
    #: `bfloat16`, `float32`, or `auto`: what the workers' hardware is fast at.
    dtype: str
    #: Where the trainer computes: `cpu` or `cuda`. vLLM finds its own.
    device: str
    stop_token_ids: tuple[int, ...]
    seed: int
    #: Folder of the workers' logs.
    log_folder: str
    optimizer: OptimizerConfig
    micro_batch_tokens: int
    num_threads: int
    inference: InferenceConfig
    checkpoint_engine: CheckpointEngineConfig
    #: Adapters that are trained in place of all weights.
    lora: LoraConfig | None = None
    #: Seconds that trainer ranks wait for each other.
    collective_s: float = 1800.0
    #: Without a trainer the workers serve the checkpoint as it is (evaluation alone).
    trains: bool = True
    #: Without vLLM they train on what they are given, and publish nothing (`debug=train_only`, `k2rl sft`).
    serves: bool = True
    #: Where the trainer's weights and optimizer state are while vLLM serves, see `TrainEngine`; files are
    #: beside the log.
    offload: str = "none"
    #: And its gradients.
    gradients: str = "drop"
    activation_checkpointing: bool = False

    @property
    def vllm_keeps_weights(self) -> bool:
        """Whether vLLM sleeps with its weights: pushes bring but a part of them."""
        return self.checkpoint_engine.strategy == "delta"


def worker_spec(
    config: Config,
    model_path: Path,
    stop_token_ids: tuple[int, ...],
    run_dir: Path,
    trains: bool = True,
    serves: bool = True,
) -> WorkerSpec:
    """What a configuration says of the workers of a run in this folder.

    Args:
        config: of the run.
        model_path: its model.
        stop_token_ids: that end a turn.
        run_dir: its folder.
        trains: False where it is only evaluated.
        serves: False where nothing is sampled.
    """
    trains = trains and config.debug.mode != "rollout_only"
    checkpoint_engine, lora = config.checkpoint_engine, config.lora if trains and config.lora.rank else None
    if lora is not None:
        # What changes are the adapters.
        checkpoint_engine = replace(checkpoint_engine, strategy="delta")
    return WorkerSpec(
        model_path=str(model_path),
        dtype=config.model.dtype,
        device="cuda" if config.cluster.gpus_per_worker else "cpu",
        stop_token_ids=stop_token_ids,
        seed=config.seed,
        log_folder=str((run_dir / "logs").absolute()),
        optimizer=config.optimizer,
        micro_batch_tokens=config.train.micro_batch_tokens,
        num_threads=config.train.num_threads,
        inference=config.inference,
        checkpoint_engine=checkpoint_engine,
        lora=lora,
        # Ranks that wait for one that hangs name it before the driver's own deadline has passed.
        collective_s=0.9 * config.deadlines.train_s,
        trains=trains,
        serves=serves and config.debug.mode != "train_only",
        offload=config.train.offload,
        gradients=config.train.gradients,
        activation_checkpointing=config.train.activation_checkpointing,
    )


class Site(msgspec.Struct, frozen=True):
    """Where a worker was placed."""

    node: str
    #: Under which other nodes reach it.
    address: str
    pid: int
    #: That this process may use.
    cores: tuple[int, ...]
    #: Ids of its GPUs, as its environment names them.
    gpus: tuple[str, ...]
    #: What its hardware multiplies fast.
    fast_dtype: str


class Place(msgspec.Struct, frozen=True):
    """A worker among the others."""

    rank: int
    world: int
    #: `host:port` where trainer ranks meet; empty for one alone.
    meeting_point: str
    dtype: str
    #: Number of its host, and its address if there are others.
    host: int
    listen: str
    #: The trainer's.
    cores: tuple[int, ...]
    #: Of the replica that it leads: the cores and GPUs of all its workers. Empty: it leads none.
    engine_cores: tuple[int, ...] = ()
    engine_gpus: tuple[str, ...] = ()

    @property
    def leads(self) -> bool:
        return bool(self.engine_cores)
