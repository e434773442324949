"""Whether the closed loop teaches the critic: its agreement with the verifier on held-out pairs.

A tiny random model, which a warm start has taught to answer a guest with one of eight words, learns which of
them are polite, and to judge which of two of its own answers is. A quarter of the guests are held out: on
pairs of its answers to those it is examined in each step, before it trains. The frozen critic is the one that
the first step examines. Each seed is a `k2rl train`, with the real vLLM.

    make bench-critic
    make bench-critic ARGS="--seeds 0 --steps 12"
    make bench-critic ARGS="--control"    beside each, the same run with a critic that is not trained

Writes outputs/benchmarks/self_critique-*/result.json; exits with 1 if agreement rose by less than 0.15 over
the frozen critic's, or over chance, for any seed.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from datetime import datetime
from pathlib import Path

from k2rl.tracking.metrics import read_metrics

RISE = 0.15
CHANCE = 0.5
LAST = 3
"""Steps at the end whose pairs count together."""
SETTINGS = (
    *("model=tiny", "env.id=polite_env:Polite", "env.max_turns=1", "env.eval_tasks=8"),
    *("rubric=self_critique", "rubric.kwargs.rubrics=[correctness]", "rubric.kwargs.brief=true"),
    *("rubric.critic_examined=32", "rubric.critic_updates=9"),
    *("rollout.tasks_per_step=120", "rollout.group_size=3", "rollout.max_tokens_per_turn=4"),
    *("budget.default=4", "budget.penalty=0", "temperature=constant", "ptx=none"),
    *("optimizer=adamw", "optimizer.lr=3e-3", "train.num_threads=1"),
    *("warm_start.steps=50", "warm_start.demos_per_step=16", "warm_start.lr=3e-3"),
    *("inference.max_model_len=256", "inference.kv_cache_gib=0.25", "train.checkpoint_every=0"),
    *("tracking.live=off", "tracking.tensorboard=false", "tracking.record_rollouts=false"),
)


def run(seed: int, steps: int, examples: int, folder: Path) -> dict[str, float]:
    """One run; what its first step and its last ones have found out."""
    command = [sys.executable, "-m", "k2rl.cli", "train", *SETTINGS, f"seed={seed}", f"train.steps={steps}"]
    command += [f"rubric.critic_examples={examples}", f"hydra.run.dir={folder}"]
    path = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    began = time.monotonic()
    done = subprocess.run(
        command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, check=False
    )
    if done.returncode:
        sys.exit(f"{' '.join(command)}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}")
    rows = read_metrics(folder)
    # Once the policy is right in all of its answers, there are no pairs any more.
    last = [row for row in rows[1:] if row["critic/examined"]][-LAST:]
    pairs = sum(row["critic/examined"] for row in last)
    biases = sorted({name for row in rows for name in row if name.startswith("critic/bias/")})
    return {
        "agreement_first": rows[0]["critic/agreement"],
        "pairs_first": rows[0]["critic/examined"],
        "agreement": sum(row["critic/agreement"] * row["critic/examined"] for row in last) / max(1, pairs),
        "pairs": pairs,
        "reward_first": rows[0]["reward/mean"],
        "reward": sum(row["reward/mean"] for row in rows[-LAST:]) / len(rows[-LAST:]),
        **{name: [row[name] for row in rows if name in row][-1] for name in biases},
        "seconds": time.monotonic() - began,
    }


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=9)
    parser.add_argument("--examples", type=int, default=160, help="judgements imitated in a step (160)")
    parser.add_argument("--control", action="store_true", help="also run with a critic that is not trained")
    arguments = parser.parse_args()
    folder = Path("outputs/benchmarks") / f"self_critique-{datetime.now():%Y-%m-%d_%H-%M-%S}"
    found, began, reached = [], time.monotonic(), True
    for seed in arguments.seeds:
        trained = run(seed, arguments.steps, arguments.examples, folder / f"seed-{seed}")
        found.append({"seed": seed, **trained})
        rise = trained["agreement"] - max(trained["agreement_first"], CHANCE)
        reached &= rise >= RISE
        print(f"seed {seed}: {_told(trained)}; rise {rise:+.3f}", flush=True)
        if arguments.control:
            control = run(seed, arguments.steps, 0, folder / f"seed-{seed}-control")
            found.append({"seed": seed, "control": 1, **control})
            print(f"  not trained: {_told(control)}", flush=True)
        (folder / "result.json").write_text(json.dumps(found, indent=1))
    print(f"{time.monotonic() - began:.0f} s in all")
    return int(not reached)


def _told(side: dict[str, float]) -> str:
    first, last = (f"{side[f'agreement{at}']:.3f} ({side[f'pairs{at}']:.0f} pairs)" for at in ("_first", ""))
    reward = f"{side['reward_first']:.2f} -> {side['reward']:.2f}"
    return f"agreement {first} -> {last}, reward {reward}, {side['seconds']:.0f} s"


if __name__ == "__main__":
    sys.exit(main())
