"""What `k2rl sandbox doctor` says of docker on this machine."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import docker

from sandboxes.base import Finding

State = Literal["good", "limited", "missing"]
#: What the daemon says it can bound, and what is not bounded where it cannot.
LIMITS = {
    "MemoryLimit": "memory",
    "SwapLimit": "swap",
    "PidsLimit": "processes",
    "CpuCfsQuota": "cores",
}
NEEDED = ("MemoryLimit", "PidsLimit")
MORE_CGROUPS = "turn on the kernel's control groups (boot with cgroup_enable=memory swapaccount=1)"


def look(client: docker.DockerClient, image: str, runtime: str | None) -> list[Finding]:
    """Ask the daemon what it can do; in a thread.

    Args:
        image: what sandboxes are made of by default.
        runtime: what containers are run with, None for the daemon's default.
    """
    about = client.info()
    return [_daemon(about), *_limits(about), *_walls(about, runtime), _image(client, image)]


def _daemon(about: dict[str, Any]) -> Finding:
    detail = f"{about['ServerVersion']}, {about['Driver']}, cgroup v{about.get('CgroupVersion', 1)}"
    return Finding(what="daemon", state="good", detail=detail)


def _limits(about: dict[str, Any]) -> Iterator[Finding]:
    for key, what in LIMITS.items():
        if about.get(key):
            yield Finding(what=what, state="good", detail="of all processes together, by the kernel")
        else:
            state: State = "missing" if key in NEEDED else "limited"
            yield Finding(what=what, state=state, detail="not bounded", mend=MORE_CGROUPS)


def _walls(about: dict[str, Any], runtime: str | None) -> Iterator[Finding]:
    name = runtime or about["DefaultRuntime"]
    if name not in about["Runtimes"]:
        known = ", ".join(sorted(about["Runtimes"]))
        yield Finding(what="runtime", state="missing", detail=f"the daemon has no {name}, but {known}")
    elif "runsc" in name:
        yield Finding(what="runtime", state="good", detail=f"{name}: a kernel of its own")
    else:
        mend = "for a kernel of its own install gVisor and take runtime=runsc"
        yield Finding(what="runtime", state="limited", detail=f"{name}: the host's kernel", mend=mend)
    options = ",".join(about["SecurityOptions"])
    state: State = "good" if "name=seccomp" in options else "limited"
    yield Finding(
        what="calls",
        state=state,
        detail="refused: the list that bubblewrap's sandboxes have, and docker's if it has one",
    )
    if "name=rootless" in options or "name=userns" in options:
        yield Finding(what="root", state="good", detail="in a container is not root outside")
    else:
        mend = "userns-remap in /etc/docker/daemon.json, or a rootless daemon"
        yield Finding(what="root", state="limited", detail="in a container is root outside", mend=mend)


def _image(client: docker.DockerClient, image: str) -> Finding:
    if client.images.list(image):
        return Finding(what="image", state="good", detail=image)
    return Finding(what="image", state="missing", detail=f"no {image}", mend="k2rl sandbox image")
