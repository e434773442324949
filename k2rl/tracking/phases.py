"""The names of a run's phases, as the timeline, the live view and the report spell them."""

START = "start"
LOAD = "load"
SELF_CHECK = "self-check"
WARM_START = "warm start"
EVALUATE = "evaluate"
ROLLOUT = "rollout"
TRAIN = "train"
PUBLISH = "publish"
CHECKPOINT = "checkpoint"
SAVE = "save"

ALL = (ROLLOUT, TRAIN, PUBLISH, SELF_CHECK, EVALUATE, WARM_START, START, CHECKPOINT, LOAD, SAVE)

AFTER_A_STEP = frozenset({EVALUATE, CHECKPOINT, SAVE})
"""What follows a step rather than being part of it."""
