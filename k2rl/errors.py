"""The ways a command ends early, each with its exit code."""


class ConfigError(Exception):
    """The user's input is wrong: one line that says what and how to mend it. Exit code 2."""

    exit_code = 2


class RunError(Exception):
    """The run itself cannot go on (a dead engine, a NaN loss, too many failed rollouts). Exit code 1."""

    exit_code = 1


class StoppedError(RunError):
    """The user (Ctrl-C) or the machine (SIGTERM) wants it to end. Exit code 130."""

    exit_code = 130
