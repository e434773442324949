"""What this machine can do, backend by backend."""

from __future__ import annotations

import asyncio

from sandboxes.base import Finding
from sandboxes.errors import SandboxUnavailableError
from sandboxes.registry import BACKENDS, create

MARKS = {"good": "ok", "limited": "limited", "missing": "MISSING"}


async def examine(name: str) -> list[Finding]:
    """What a backend of this name can and cannot do here, found out by doing it."""
    try:
        backend = create(name)
    except SandboxUnavailableError as error:
        return [Finding(what="backend", state="missing", detail=str(error))]
    try:
        return await backend.findings()
    finally:
        await backend.close()


def works(findings: list[Finding]) -> bool:
    return all(finding.state != "missing" for finding in findings)


def report() -> tuple[str, bool]:
    """The findings of all backends as text, and whether sandboxes can be had at all."""
    lines, any_works = [], False
    for name in BACKENDS:
        findings = asyncio.run(examine(name))
        any_works |= works(findings)
        lines.append(f"{name}: {'works' if works(findings) else 'does not work here'}")
        for finding in findings:
            lines.append(f"  {MARKS[finding.state]:<8} {finding.what:<12} {finding.detail}")
            if finding.mend:
                lines.append(f"{'':24}{finding.mend}")
    return "\n".join(lines), any_works
