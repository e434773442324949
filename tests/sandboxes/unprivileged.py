"""Run a program of the tests as a user without rights, wherever the checkout and its Python lie."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

from sandboxes.bubblewrap.command import readable_by_all
from tests.conftest import ROOT

NOBODY = 65534


def staged(folder: Path) -> tuple[str, dict[str, str]]:
    """A Python and an environment with which nobody can import `sandboxes` and `tests.sandboxes`."""
    folder.chmod(0o755)
    spec = find_spec("msgspec")
    assert spec is not None
    assert spec.origin is not None
    ignore = shutil.ignore_patterns("__pycache__")
    shutil.copytree(Path(spec.origin).parent, folder / "msgspec", ignore=ignore)
    shutil.copytree(ROOT / "sandboxes", folder / "sandboxes", ignore=ignore)
    shutil.copytree(ROOT / "tests" / "sandboxes", folder / "tests" / "sandboxes", ignore=ignore)
    for path in folder.rglob("*"):
        path.chmod(path.stat().st_mode | 0o444 | (0o111 if path.is_dir() else 0))
    own = Path(sys.executable).resolve()
    name = f"python3.{sys.version_info.minor}"
    candidates = [str(own)] if readable_by_all(own) else [f"/usr/bin/{name}", f"/usr/local/bin/{name}"]
    for candidate in candidates:
        if Path(candidate).exists():
            return candidate, {"PYTHONPATH": str(folder), "PATH": os.environ["PATH"]}
    raise AssertionError(f"no {name} that every user can run: install the system's (apt-get install {name})")


def run_as_nobody(folder: Path, *words: str, timeout: float = 300) -> subprocess.CompletedProcess[str]:
    """Run `python WORDS` as a user without rights; this process must be root."""
    python, environment = staged(folder)
    return subprocess.run(
        [python, *words],
        env=environment,
        user=NOBODY,
        group=NOBODY,
        extra_groups=[],
        cwd="/",
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
