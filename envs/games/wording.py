"""A short sentence with given words in it: free text whose truth is easy to look up."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from itertools import count
from typing import Any

from gymnasium.error import ResetNeeded

from envs.answers import split_of
from envs.base import ResetResult, StepResult, TextEnv
from k2rl.types import Message, Split, Task

EVAL_ONE_IN = 8
SHORTEST = 4
WORDS = (
    *(
        "anchor",
        "apple",
        "apron",
        "arrow",
        "bakery",
        "balcony",
        "banana",
        "barrel",
        "basket",
        "beach",
        "bell",
    ),
    *("bicycle", "blanket", "boat", "bottle", "bread", "bridge", "broom", "bucket", "butter", "button"),
    *(
        "camera",
        "candle",
        "carpet",
        "castle",
        "cheese",
        "cherry",
        "clock",
        "cloud",
        "coffee",
        "coin",
        "copper",
    ),
    *("cotton", "curtain", "desert", "dragon", "drum", "eagle", "engine", "farmer", "feather", "fence"),
    *("flute", "forest", "fountain", "garden", "garlic", "ginger", "glove", "guitar", "hammer", "harbor"),
    *("honey", "horse", "island", "jacket", "kettle", "kitten", "ladder", "lantern", "lemon", "letter"),
    *("library", "magnet", "marble", "market", "meadow", "mirror", "monkey", "mountain", "museum", "needle"),
    *(
        "olive",
        "onion",
        "orange",
        "paper",
        "parrot",
        "pencil",
        "pepper",
        "piano",
        "pillow",
        "planet",
        "pocket",
    ),
    *("potato", "rabbit", "ribbon", "river", "rocket", "saddle", "salt", "school", "shadow", "silver"),
    *(
        "spider",
        "spoon",
        "station",
        "statue",
        "storm",
        "sugar",
        "table",
        "temple",
        "ticket",
        "tiger",
        "tower",
    ),
    *("train", "tunnel", "umbrella", "valley", "village", "violin", "wagon", "walnut", "whale", "window"),
    *("winter", "wolf", "yellow", "zebra"),
)
_SENTENCE = re.compile(r"[^.!?]*[^.!?\s][.!?][\"']?")


class WordingEnv(TextEnv):
    """A word, or two, and one sentence in reply that has them in it.

    The reward is 1 for one sentence of four words or more, ended by a full stop or its like, with every
    word as it was given, else 0. Components: `words` (the share that is there) and `sentence`.
    """

    kinds = ("one", "two")

    def __init__(self) -> None:
        super().__init__()
        self._words: list[str] | None = None

    def tasks(self, split: Split, seed: int) -> Iterator[Task]:
        """Kinds in turn; a word is for one split alone."""
        rng = random.Random(f"wording/{split}/{seed}")
        words = [word for word in WORDS if split_of(f"wording {word}", EVAL_ONE_IN) == split]
        for index in count():
            kind = self.kinds[index % len(self.kinds)]
            data = {"words": rng.sample(words, self.kinds.index(kind) + 1)}
            yield Task(f"wording/{split}/{seed}/{index}", "wording", kind, split, index, data)

    def demonstration(self, task: Task) -> list[str]:
        found = " and the ".join(task.data["words"])
        places = (
            "in the picture",
            "near the door",
            "at the end of the road",
            "in her new book",
            "by the sea",
        )
        return [f"We saw the {found} {random.Random(f'{task.id}').choice(places)}."]

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> ResetResult:
        task = self.start_episode(seed, options)
        words = self._words = list(task.data["words"])
        named = " and ".join(f'"{word}"' for word in words)
        of = "words" if len(words) > 1 else "word"
        question = f"Write one short sentence with the {of} {named}."
        return (Message("user", question),), {"task": task}

    def step(self, action: str) -> StepResult:
        """Look for the words.

        Raises:
            gymnasium.error.ResetNeeded: if no episode is running.
        """
        if self._words is None:
            raise ResetNeeded("the episode is over or was never begun: call reset()")
        said = re.findall(r"\w+", action.lower())
        share = sum(word in said for word in self._words) / len(self._words)
        sentence = len(said) >= SHORTEST and _SENTENCE.fullmatch(action.strip()) is not None
        self._words = None
        components = {"words": share, "sentence": float(sentence)}
        return (), float(sentence and share == 1), True, False, {"reward_components": components}
