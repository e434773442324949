"""`k2rl sandbox doctor`, `k2rl sandbox serve` and `k2rl sandbox image`."""

from __future__ import annotations

import argparse
import sys
from importlib.util import find_spec
from pathlib import Path

from k2rl import lending_arguments
from k2rl.errors import ConfigError, RunError

SERVE = """\
Lend sandboxes of this machine to others over HTTP, until a signal ends it.
Clients are backends of their own: `remote`, with the server's address. Beyond
loopback a token is asked for: --token-file, or the variable
K2RL_SANDBOX_TOKEN, on both sides. HTTP is not encrypted: across networks that
you do not trust, put a TLS proxy in front.
"""

IMAGE = """\
Make an image for the docker backend: by default Debian's python3, pytest and
git, from Debian's packages (mmdebstrap; no registry of images is asked), or
one from a Dockerfile or a root file system. What the daemon has already is
not made again. Any image with Python 3.9 or newer will do.
"""


def add_to(actions: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add them to the actions of `k2rl sandbox`."""
    doctor = actions.add_parser("doctor", help="what this machine can do, and how to get more")
    doctor.set_defaults(run=_doctor)

    plain = argparse.RawDescriptionHelpFormatter
    serve = actions.add_parser(
        "serve", help="lend sandboxes to other machines", description=SERVE, formatter_class=plain
    )
    serve.add_argument("--backend", default="bubblewrap", choices=("bubblewrap", "docker"))
    lending_arguments.add_to(serve, "sandboxes", port=8020, capacity=64, body_mib=320)
    serve.add_argument("--memory-mib", type=int, default=4096, help="most memory, and files, of one (4096)")
    lend = "may appear in sandboxes, with all that is in it; repeatable"
    serve.add_argument(
        "--lend-path", type=Path, action="append", default=[], help=f"path of this machine that {lend}"
    )
    serve.add_argument(
        "--lend-image", action="append", default=[], help="image that may be asked for; repeatable"
    )
    serve.add_argument(
        "--lend-host",
        action="append",
        default=[],
        metavar="ENTRY",
        help="host that may be reached, as clients spell it in allow_hosts; repeatable",
    )
    serve.set_defaults(run=_serve)

    image = actions.add_parser(
        "image", help="make an image for the docker backend", description=IMAGE, formatter_class=plain
    )
    source = image.add_mutually_exclusive_group()
    source.add_argument("--dockerfile", type=Path, metavar="FOLDER", help="folder with a Dockerfile")
    source.add_argument(
        "--root", type=Path, metavar="PATH", help="root file system: a folder, or a tar of one"
    )
    image.add_argument("--name", help="what to call it (needed with --dockerfile and --root)")
    image.add_argument("--mirror", help="Debian's mirror for the default image")
    image.set_defaults(run=_image)


def _doctor(arguments: argparse.Namespace) -> int:
    from sandboxes.doctor import report

    text, works = report()
    _say(text)
    return 0 if works else 1


def _require(command: str, module: str) -> None:
    if find_spec(module) is None:
        raise ConfigError(
            f"`k2rl sandbox {command}` needs {module}, not installed here: pip install 'k2rl[sandbox]'"
        )


def _serve(arguments: argparse.Namespace) -> int:
    _require("serve", "aiohttp")
    from sandboxes.base import MIB
    from sandboxes.errors import SandboxUnavailableError
    from sandboxes.server import ServerOptions
    from sandboxes.serving import serve

    options = lending_arguments.options_of(
        arguments,
        ServerOptions,
        memory_bytes=arguments.memory_mib * MIB,
        paths=tuple(arguments.lend_path),
        images=tuple(arguments.lend_image),
        hosts=tuple(arguments.lend_host),
    )
    try:
        lending_arguments.serve(arguments, serve(arguments.backend, options, _say))
    except SandboxUnavailableError as error:
        raise ConfigError(str(error)) from None
    return 0


def _image(arguments: argparse.Namespace) -> int:
    _require("image", "docker")
    from docker.errors import DockerException

    from sandboxes.docker import images
    from sandboxes.docker.daemon import connect
    from sandboxes.errors import SandboxError, SandboxUnavailableError

    made_of = arguments.dockerfile or arguments.root
    if (made_of is None) != (arguments.name is None):
        raise ConfigError("--name goes with --dockerfile or --root; the default image has a name of its own")
    if made_of is not None and not made_of.exists():
        raise ConfigError(f"there is no {made_of}")
    try:
        client = connect(images.BUILD_SECONDS)
        if arguments.dockerfile is not None:
            name = images.from_dockerfile(client, arguments.dockerfile, arguments.name)
        elif arguments.root is not None:
            name = images.from_root(client, arguments.root, arguments.name)
        else:
            name = images.make_default(client, arguments.mirror or images.MIRROR)
    except SandboxUnavailableError as error:
        raise ConfigError(str(error)) from None
    except (SandboxError, DockerException) as error:
        raise RunError(str(error)) from None
    _say(name)
    return 0


def _say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()
