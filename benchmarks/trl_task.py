"""What both sides of the TRL comparison work on: sizes, prompts and reward. Imports nothing heavy."""

from __future__ import annotations

import json
import random
import re
import sys
from collections.abc import Iterator, Mapping
from typing import TextIO

PROMPTS_PER_STEP = 8
GROUP_SIZE = 8
SAMPLES_PER_STEP = PROMPTS_PER_STEP * GROUP_SIZE
MAX_TOKENS = 48
TEMPERATURE = 1.0
SYSTEM = "Work out the answer, step by step, and end with the number."
# So small that neither policy moves away from what both start from: their answers stay alike in length.
LEARNING_RATE = 1e-7
# What a worker is told: a step over every group, or (k2rl's default) without those whose rewards are equal.
EVERY_GROUP = "step"
DROP_UNIFORM = "step without uniform groups"


def problems(seed: int = 0) -> Iterator[tuple[str, int]]:
    """Word problems and their answers, without end; a function of the seed."""
    rng = random.Random(seed)
    while True:
        boxes, each, loose = rng.randint(3, 30), rng.randint(3, 30), rng.randint(1, 99)
        question = (
            f"A shop has {boxes} boxes of {each} apples each, and {loose} loose apples. How many apples?"
        )
        yield question, boxes * each + loose


def reward(text: str, answer: int) -> float:
    """1 if the last number is right, 0.1 for any number, 0 for none."""
    numbers = re.findall(r"\d+", text)
    if not numbers:
        return 0.0
    return 1.0 if int(numbers[-1]) == answer else 0.1


def protocol_stream() -> TextIO:
    """The worker's line to its driver: its stdout, to which libraries no longer print."""
    stream, sys.stdout = sys.stdout, sys.stderr
    return stream


def say(stream: TextIO, record: Mapping[str, object]) -> None:
    """Send one record to the driver, as a line of JSON."""
    print(json.dumps(record), file=stream, flush=True)
