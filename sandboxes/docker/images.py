"""Images for sandboxes: Debian's own packages, a Dockerfile, or a root file system, without a registry.

The default image is made by `mmdebstrap` from Debian's mirror. Its tag is a digest of the recipe, so that a
daemon that has it need not make it again, and a changed recipe is another image.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import tempfile
from pathlib import Path

import docker

from sandboxes.errors import SandboxError, SandboxUnavailableError

SUITE = "bookworm"
MIRROR = "http://deb.debian.org/debian"
#: What code finds: an interpreter, what runs unit tests, and what repository tasks are made with.
PACKAGES = ("git", "patch", "python3", "python3-pytest")
#: Not in the image: documentation and translations, a fifth of it.
EXCLUDED = ("doc", "info", "locale", "man")
RECIPE = [
    "mmdebstrap",
    "--variant=essential",
    f"--include={','.join(PACKAGES)}",
    *(f"--dpkgopt=path-exclude=/usr/share/{name}/*" for name in EXCLUDED),
    SUITE,
]
REPOSITORY = "k2rl-sandbox"
DEFAULT = f"{REPOSITORY}:{SUITE}-{hashlib.sha256(' '.join(RECIPE).encode()).hexdigest()[:12]}"
BUILD_SECONDS = 900


def make_default(client: docker.DockerClient, mirror: str = MIRROR) -> str:
    """Make the default image if the daemon does not have it; returns its name.

    Raises:
        SandboxUnavailableError: mmdebstrap is not installed.
        SandboxError: it failed; the message holds its last lines.
    """
    if client.images.list(DEFAULT):
        return DEFAULT
    if shutil.which("mmdebstrap") is None:
        raise SandboxUnavailableError(
            "the default image is made by mmdebstrap, not installed here (Debian and Ubuntu: apt install "
            "mmdebstrap). Or make one from a Dockerfile: k2rl sandbox image --dockerfile FOLDER --name NAME"
        )
    with tempfile.TemporaryDirectory(prefix="k2rl-image-") as folder:
        tar = Path(folder) / "root.tar"
        done = subprocess.run(
            [*RECIPE, str(tar), mirror], capture_output=True, text=True, timeout=BUILD_SECONDS, check=False
        )
        if done.returncode != 0:
            last = "\n".join(done.stderr.strip().splitlines()[-5:])
            raise SandboxError(f"mmdebstrap failed with exit code {done.returncode}:\n{last}")
        return from_root(client, tar, DEFAULT)


def from_root(client: docker.DockerClient, root: Path, name: str) -> str:
    """An image from a root file system: a folder, or a tar of one; returns its name."""
    repository, _, tag = name.partition(":")
    if not root.is_dir():
        client.api.import_image_from_file(str(root), repository=repository, tag=tag or "latest")
        return name
    with subprocess.Popen(
        ["tar", "--create", "--numeric-owner", "--one-file-system", f"--directory={root}", "."],
        stdout=subprocess.PIPE,
    ) as tar:
        client.api.import_image_from_stream(tar.stdout, repository=repository, tag=tag or "latest")
    if tar.returncode != 0:
        client.images.remove(name)
        raise SandboxError(f"tar of {root} failed with exit code {tar.returncode}")
    return name


def from_dockerfile(client: docker.DockerClient, folder: Path, name: str, network: str | None = None) -> str:
    """An image from the folder of a Dockerfile; returns its name.

    Args:
        network: of its steps, as docker names it (`none`); None: docker's default.

    Raises:
        SandboxError: a step failed; the message holds its last lines.
    """
    try:
        client.images.build(path=str(folder), tag=name, rm=True, forcerm=True, network_mode=network)
    except docker.errors.BuildError as error:
        lines = [entry["stream"].rstrip() for entry in error.build_log if entry.get("stream", "").strip()]
        raise SandboxError("\n".join([f"{folder}/Dockerfile: {error.msg}", *lines[-5:]])) from None
    return name


def relocated(client: docker.DockerClient, image: str, links: dict[str, str], kept: str, name: str) -> str:
    """An image in which some paths are links into a sandbox's writable places; returns its name.

    Args:
        links: path -> where it leads, such as {"/logs": "/tmp/logs"}.
        kept: where the working folder of `image` is kept (readable by all), to be copied to where it is
            written; without a working folder there is nothing.

    Raises:
        SandboxError: it could not be made.
        docker.errors.ImageNotFound: there is no such image.
    """
    folder = client.images.get(image).attrs["Config"].get("WorkingDir") or "/"
    steps = [f"mkdir -p {kept}"]
    if folder != "/":
        steps += [
            f"mkdir -p {folder}",
            f"cp -a {folder}/. {kept}/",
            f"rm -rf {folder}",
            f"ln -s /work {folder}",
        ]
    steps += [f"chmod -R a+rX {kept}"]
    steps += [f"rm -rf {path} && ln -s {target} {path}" for path, target in links.items() if path != folder]
    text = f"FROM {image}\nUSER 0:0\nWORKDIR /\nRUN {' && '.join(steps)}\n"
    with tempfile.TemporaryDirectory(prefix="k2rl-image-") as context:
        (Path(context) / "Dockerfile").write_text(text)
        return from_dockerfile(client, Path(context), name)
