"""The backends by name."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from sandboxes.base import Backend
from sandboxes.errors import SandboxUnavailableError

#: name -> module:class. A backend is imported when it is asked for: docker's SDK need not be there for the
#: others.
BACKENDS = {
    "bubblewrap": "sandboxes.bubblewrap.backend:BubblewrapBackend",
    "docker": "sandboxes.docker:DockerBackend",
    "remote": "sandboxes.remote:RemoteBackend",
}


def create(name: str, **options: Any) -> Backend:
    """The backend of this name; nothing is started before its first `open`.

    Raises:
        ValueError: there is none of that name.
        SandboxUnavailableError: what it needs is not installed.
    """
    if name not in BACKENDS:
        raise ValueError(f"no sandbox backend {name!r}; there are {', '.join(BACKENDS)}")
    path, _, kind = BACKENDS[name].partition(":")
    try:
        module = import_module(path)
    except ModuleNotFoundError as error:
        raise SandboxUnavailableError(f"the {name} backend needs {error.name}, not installed here") from error
    backend: Backend = getattr(module, kind)(**options)
    return backend
