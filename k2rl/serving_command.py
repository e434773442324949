"""`k2rl envs serve`."""

from __future__ import annotations

import argparse
import asyncio
import functools
import sys
from importlib.util import find_spec

from k2rl import lending_arguments
from k2rl.authoring.commands import keywords_of
from k2rl.errors import ConfigError

SERVE = """\
Serve an environment to runs on this machine or others, until a signal ends it.
A run plays it with env=remote and env.kwargs.urls=[http://host:port]. Beyond
loopback a token is asked for: --token-file, or the variable K2RL_ENVS_TOKEN,
on both sides. HTTP is not encrypted: across networks that you do not trust,
put a TLS proxy in front. With --processes there are several services at
consecutive ports; one that dies is started again.
"""


def add_to(actions: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add it to the actions of `k2rl envs`."""
    serve = actions.add_parser(
        "serve",
        help="serve an environment over HTTP",
        description=SERVE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    serve.add_argument("id", metavar="ID", help="of the environment, or module:Class")
    serve.add_argument("arguments", nargs="*", metavar="KEY=VALUE", help="of its constructor, in JSON")
    lending_arguments.add_to(serve, "episodes", port=8030, capacity=256, body_mib=64)
    serve.add_argument("--processes", type=int, default=1, help="services to start (1)")
    serve.add_argument(
        "--call-seconds", type=float, default=300.0, help="what a call of the environment may take (300)"
    )
    serve.add_argument("--ends-with-stdin", action="store_true", help=argparse.SUPPRESS)
    serve.set_defaults(run=_serve)


def _serve(arguments: argparse.Namespace) -> int:
    if find_spec("aiohttp") is None:
        raise ConfigError("`k2rl envs serve` needs aiohttp, not installed here: pip install 'k2rl[sandbox]'")
    import envs.registry
    from envs.agents import AgentEnv
    from k2rl.serving.processes import serve, serve_in_processes
    from k2rl.serving.server import ServiceOptions

    if arguments.processes < 1 or (arguments.processes > 1 and arguments.port == 0):
        raise ConfigError("--processes is at least 1, and several need a --port to count from")
    if arguments.call_seconds <= 0:
        raise ConfigError("--call-seconds must be above 0")
    make = functools.partial(envs.registry.make, arguments.id, **keywords_of(arguments.arguments))
    env = make()
    if isinstance(env, AgentEnv):
        raise ConfigError(f"{arguments.id} is played by an agent, which a run starts itself")
    env.close()
    options = lending_arguments.options_of(arguments, ServiceOptions, call_seconds=arguments.call_seconds)
    if arguments.processes > 1:
        ports = range(arguments.port, arguments.port + arguments.processes)
        commands = [_command(arguments, port) for port in ports]
        asyncio.run(serve_in_processes(commands, _say))
        return 0
    lending_arguments.serve(arguments, serve(arguments.id, make, options, _say, arguments.ends_with_stdin))
    return 0


def _command(arguments: argparse.Namespace, port: int) -> list[str]:
    """What starts one of several services."""
    words = [sys.executable, "-m", "k2rl.cli", "envs", "serve", arguments.id, *arguments.arguments]
    if arguments.token_file is not None:
        words += ["--token-file", str(arguments.token_file)]
    for name in ("host", "lease", "call_seconds", "body_mib"):
        words += [f"--{name.replace('_', '-')}", str(getattr(arguments, name))]
    words += ["--episodes", str(arguments.capacity)]
    return [*words, "--port", str(port), "--ends-with-stdin"]


def _say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()
