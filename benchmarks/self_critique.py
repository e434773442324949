"""Whether the closed loop teaches the critic: agreement with the verifier on held-out pairs, trained and frozen.

A tiny random model, which a warm start has taught to say "even" or "odd" whatever the number, learns which is
right, and to judge which of two of its own answers is. Tasks of a quarter of all numbers are held out: on pairs
of its answers to those it is examined in each step, before it trains. A run with the same seed whose critic is
not trained (its policy is) is the one beside it. Both are `k2rl train`, with the real vLLM.

    make bench-critic
    make bench-critic ARGS="--seeds 1 --steps 12"

Writes outputs/benchmarks/self_critique-*/result.json; exits with 1 if agreement rose by less than 0.15 over the
frozen critic's, or over chance, for any seed.
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
LAST = 5
"""Steps at the end whose pairs count together."""
SETTINGS = (
    *("model=tiny", "env.id=parity_env:Parity", "env.max_turns=1", "env.eval_tasks=16"),
    *("rubric=self_critique", "rubric.kwargs.rubrics=[correctness]", "rubric.kwargs.brief=true"),
    *("rubric.critic_examined=64", "rubric.critic_updates=8"),
    *("rollout.tasks_per_step=96", "rollout.group_size=4", "rollout.max_tokens_per_turn=4"),
    *("budget.default=4", "budget.penalty=0", "temperature=constant", "ptx=none"),
    *("optimizer=adamw", "optimizer.lr=1e-3"),
    *("warm_start.steps=30", "warm_start.demos_per_step=32", "warm_start.lr=3e-3"),
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
    last = [row for row in rows[-LAST:] if row["critic/examined"]]
    pairs = sum(row["critic/examined"] for row in last)
    biases = sorted({name for row in rows for name in row if name.startswith("critic/bias/")})
    return {
        "agreement_first": rows[0]["critic/agreement"],
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
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--examples", type=int, default=128, help="judgements imitated in a step (128)")
    arguments = parser.parse_args()
    folder = Path("outputs/benchmarks") / f"self_critique-{datetime.now():%Y-%m-%d_%H-%M-%S}"
    found, began, reached = [], time.monotonic(), True
    for seed in range(arguments.seeds):
        sides = {
            name: run(seed, arguments.steps, examples, folder / f"seed-{seed}-{name}")
            for name, examples in (("frozen", 0), ("trained", arguments.examples))
        }
        found.append({"seed": seed, **sides})
        frozen, trained = sides["frozen"]["agreement"], sides["trained"]["agreement"]
        rise = trained - max(frozen, CHANCE)
        reached &= rise >= RISE
        print(
            f"seed {seed}: frozen {frozen:.3f} ({sides['frozen']['pairs']:.0f} pairs), trained {trained:.3f} "
            f"({sides['trained']['pairs']:.0f}), rise {rise:+.3f}; at its first step "
            f"{sides['trained']['agreement_first']:.3f}; reward {sides['trained']['reward_first']:.2f} -> "
            f"{sides['trained']['reward']:.2f}; {sides['frozen']['seconds']:.0f} and "
            f"{sides['trained']['seconds']:.0f} s",
            flush=True,
        )
    print(f"{time.monotonic() - began:.0f} s in all")
    (folder / "result.json").write_text(json.dumps(found, indent=1))
    return int(not reached)


if __name__ == "__main__":
    sys.exit(main())
