"""What `k2rl sandbox serve` and `k2rl envs serve` are asked for alike."""

from __future__ import annotations

import argparse
import asyncio
import os
from collections.abc import Coroutine
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from k2rl.errors import ConfigError

if TYPE_CHECKING:  # it needs aiohttp
    from sandboxes.lending import LendingOptions

    T = TypeVar("T", bound=LendingOptions)


def add_to(parser: argparse.ArgumentParser, things: str, *, port: int, capacity: int, body_mib: int) -> None:
    """Add the arguments of a server that lends `things` by default like this."""
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at (127.0.0.1)")
    parser.add_argument("--port", type=int, default=port, help=f"0: any that is free ({port})")
    parser.add_argument("--token-file", type=Path, help="file with the token that clients must show")
    parser.add_argument(
        f"--{things}",
        type=int,
        default=capacity,
        metavar="N",
        dest="capacity",
        help=f"most that are open at once ({capacity})",
    )
    parser.add_argument(
        "--lease",
        type=float,
        default=60.0,
        metavar="SECONDS",
        help=f"for how long a silent client keeps its {things} (60)",
    )
    parser.add_argument(
        "--body-mib", type=int, default=body_mib, metavar="MIB", help=f"largest request ({body_mib})"
    )


def options_of(arguments: argparse.Namespace, kind: type[T], **own: Any) -> T:
    """The options of a server, with those of its `own`.

    Raises:
        ConfigError: they make no sense.
    """
    from sandboxes.base import MIB

    try:
        return kind(
            host=arguments.host,
            port=arguments.port,
            token=_token_of(arguments.token_file, kind.token_variable),
            lease=arguments.lease,
            body_bytes=arguments.body_mib * MIB,
            capacity=arguments.capacity,
            **own,
        )
    except ValueError as error:
        raise ConfigError(str(error)) from None


def serve(arguments: argparse.Namespace, work: Coroutine[Any, Any, None]) -> None:
    """Run a server to its end.

    Raises:
        ConfigError: it cannot listen there.
    """
    try:
        asyncio.run(work)
    except OSError as error:
        raise ConfigError(f"--host {arguments.host} --port {arguments.port}: {error.strerror}") from None


def _token_of(file: Path | None, variable: str) -> str | None:
    """A server's token: what is in the file, or else in the variable.

    Raises:
        ConfigError: the file cannot be read.
    """
    if file is None:
        return os.environ.get(variable)
    try:
        return file.read_text().strip()
    except OSError as error:
        raise ConfigError(f"--token-file {file}: {error.strerror}") from None
