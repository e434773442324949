"""One host of the relay's tests, a process that does what it is told: one JSON object a line, one answer
each."""

from __future__ import annotations

import itertools
import json
import sys
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import xxhash

from k2rl.checkpoint_engine.relay import HostRelay, RelayError
from k2rl.checkpoint_engine.runs import Run


def pattern(host: int, nbytes: int) -> np.ndarray:
    """What a host's memory holds before a transfer."""
    return np.random.default_rng(host).integers(0, 256, nbytes, dtype=np.uint8)


def say(answer: dict[str, object]) -> None:
    sys.stdout.write(json.dumps(answer) + "\n")
    sys.stdout.flush()


def main() -> None:
    host, address, port, deadline_s = int(sys.argv[1]), sys.argv[2], int(sys.argv[3]), float(sys.argv[4])
    torch.set_num_threads(1)
    # A trainer's rank has a default group of its own; the relay must work beside it.
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    default = dist.group.WORLD
    relay: HostRelay | None = None
    say({"ready": True})
    for line in sys.stdin:
        order = json.loads(line)
        answer: dict[str, object] = {}
        try:
            if order["do"] == "open":
                relay = HostRelay(host, order["hosts"], (address, port), order["epoch"], deadline_s)
            elif order["do"] == "close":
                if relay is not None:
                    relay.close()
            else:
                memory = torch.from_numpy(pattern(host, order["nbytes"]))
                runs = [Run(*run) for run in order["runs"]]
                for number in itertools.count() if order["do"] == "move for ever" else range(1):
                    relay.transfer(memory, runs, number)
                    if order["do"] == "move for ever" and number == 0:
                        say({"moving": True})
                answer["digest"] = xxhash.xxh3_128_hexdigest(memory.numpy())
        except RelayError as error:
            # While the error is at hand: a traceback must not keep connections open.
            answer = {"error": str(error), "host": error.host, "sockets": sockets()}
        else:
            answer["sockets"] = sockets()
        assert dist.group.WORLD is default
        say(answer)


def sockets() -> int:
    """How many sockets this process has open."""
    found = 0
    for link in Path("/proc/self/fd").iterdir():
        try:
            found += str(link.readlink()).startswith("socket:")
        except FileNotFoundError:  # the folder's own descriptor
            continue
    return found


if __name__ == "__main__":
    main()
