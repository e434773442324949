"""Two trainer ranks with a core each beside one with both, and state that is offloaded beside memory copies.

SmolLM2-135M's shapes. In each round both take the same policy step (groups that share a prompt, an optimizer
update included), one after the other; the first round is not counted. Then one trainer's state goes to files,
or to the host's memory as on a GPU (here plain copies), and comes back; a plain copy of as many bytes takes
turns with it.

    make bench-ranks                              both
    make bench-ranks ARGS="--rounds 5 --optimizer adamw --dtype bfloat16"
"""

from __future__ import annotations

import argparse
import multiprocessing
import random
import socket
import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from typing import Any

import torch

from k2rl.config import ObjectiveConfig, OptimizerConfig
from k2rl.hardware import fast_dtype
from k2rl.models.hub import resolve_model
from k2rl.training.batch import TrainSequence
from k2rl.training.engine import TrainEngine
from k2rl.training.ranks import ALONE, Ranks
from k2rl.workers.memory import GIB, resident

GROUPS = 4
GROUP_SIZE = 8
PROMPT = 64
RESPONSE = 48


def batch(seed: int) -> list[list[TrainSequence]]:
    rng = random.Random(seed)

    def tokens(count: int) -> tuple[int, ...]:
        return tuple(rng.randrange(5, 5000) for _ in range(count))

    groups = []
    for _ in range(GROUPS):
        prompt = tokens(PROMPT)
        responses = [tokens(rng.randint(RESPONSE // 2, RESPONSE * 3 // 2)) for _ in range(GROUP_SIZE)]
        groups.append(
            [
                TrainSequence(
                    prompt + response,
                    (False,) * PROMPT + (True,) * len(response),
                    (-9.0,) * len(response),
                    rng.uniform(-1, 1),
                )
                for response in responses
            ]
        )
    return groups


def serve(ranks: Ranks, threads: int, settings: dict[str, Any], pipe: Connection) -> None:
    """A rank: a seed comes, what the step says goes back."""
    base = resident()
    engine = TrainEngine(**settings, num_threads=threads, ranks=ranks)
    pipe.send((resident() - base) / GIB)
    while (seed := pipe.recv()) is not None:
        began = time.perf_counter()
        learned = engine.policy_step(batch(seed), objective=ObjectiveConfig(), temperature=1.0)
        learned["seconds"] = time.perf_counter() - began
        learned["resident_gib"] = resident() / GIB
        pipe.send(learned)
    engine.close()


def compare_ranks(settings: dict[str, Any], rounds: int) -> None:
    context = multiprocessing.get_context("spawn")
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = f"127.0.0.1:{free.getsockname()[1]}"
    sides: dict[int, list[Connection]] = {1: [], 2: []}
    processes = []
    for ranks, threads in ((ALONE, 2), (Ranks(0, 2, address), 1), (Ranks(1, 2, address), 1)):
        ours, theirs = context.Pipe()
        process = context.Process(target=serve, args=(ranks, threads, settings, theirs), daemon=True)
        process.start()
        theirs.close()
        processes.append(process)
        sides[ranks.world].append(ours)
    for world, pipes in sides.items():
        loaded = ", ".join(f"{pipe.recv():.2f}" for pipe in pipes)
        print(f"N={world}: GiB that loading the model took: {loaded}", flush=True)
    rates: dict[int, list[float]] = {1: [], 2: []}
    losses: dict[int, list[float]] = {1: [], 2: []}
    samples = GROUPS * GROUP_SIZE
    for number in range(rounds + 1):
        for world, pipes in sides.items():
            for pipe in pipes:
                pipe.send(number)
            learned = [pipe.recv() for pipe in pipes]
            seconds = max(part["seconds"] for part in learned)
            rates[world].append(samples / seconds)
            losses[world].append(learned[0]["loss"])
            print(
                f"round {number}, N={world}: {seconds:.2f} s ({learned[0]['forward_backward_s']:.2f} forward "
                f"and backward, {learned[0]['optimizer_s']:.2f} optimizer), loss {learned[0]['loss']:.6f}, "
                f"resident {', '.join(format(part['resident_gib'], '.2f') for part in learned)} GiB",
                flush=True,
            )
    ratios = [two / one for one, two in zip(rates[1][1:], rates[2][1:], strict=True)]
    gap = max(abs(one - two) / abs(one) for one, two in zip(losses[1], losses[2], strict=True))
    print(
        f"samples/s: N=1 {median(rates[1][1:]):.2f}, N=2 {median(rates[2][1:]):.2f}; "
        f"N=2 beside N=1: median {median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
    )
    print(f"losses differ by {gap:.1e} at most, relative")
    for pipe in (*sides[1], *sides[2]):
        pipe.send(None)
    for process in processes:
        process.join()


def compare_offload(settings: dict[str, Any], rounds: int, folder: Path) -> None:
    torch.set_num_threads(2)
    for level in ("file", "host"):
        engine = TrainEngine(**settings, num_threads=2, offload=level, offload_folder=folder)
        engine.policy_step(batch(0)[:1], objective=ObjectiveConfig(), temperature=1.0)
        state = engine.state_bytes()
        nbytes = state["parameters"] + state["optimizer"]
        source, target = torch.ones(nbytes, dtype=torch.uint8), torch.zeros(nbytes, dtype=torch.uint8)
        moved, copied, freed = [], [], []
        for _ in range(rounds):
            before = resident()
            began = time.perf_counter()
            engine.offload()
            gone = time.perf_counter()
            freed.append(before - resident())
            again = time.perf_counter()
            engine.reload()
            moved.append(gone - began + time.perf_counter() - again)
            began = time.perf_counter()
            target.copy_(source)
            copied.append(time.perf_counter() - began)
        rate, copying = 2 * nbytes / median(moved) / 1e9, nbytes / median(copied) / 1e9
        print(
            f"offload={level}: {nbytes / GIB:.2f} GiB there and back at {rate:.1f} GB/s, "
            f"{rate / copying:.2f} of a copy in memory ({copying:.1f} GB/s); "
            f"resident memory falls by {median(freed) / GIB:.2f} GiB",
            flush=True,
        )
        engine.close()
        del engine


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--optimizer", choices=["muon", "adamw"], default="muon")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default=fast_dtype(gpu=False))
    parser.add_argument("--only", choices=["ranks", "offload"])
    arguments = parser.parse_args()
    settings = {
        "model_path": resolve_model(arguments.model),
        "dtype": arguments.dtype,
        "optimizer": OptimizerConfig(name=arguments.optimizer, lr=1e-5),
    }
    print(f"{arguments.model}, {arguments.dtype}, {arguments.optimizer}", flush=True)
    if arguments.only != "offload":
        compare_ranks(settings, arguments.rounds)
    if arguments.only != "ranks":
        # Beside the other outputs: a temporary folder may be memory.
        with tempfile.TemporaryDirectory(dir=Path.cwd()) as folder:
            compare_offload(settings, 2 * arguments.rounds + 1, Path(folder))


if __name__ == "__main__":
    main()
