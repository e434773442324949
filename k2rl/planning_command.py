"""What `k2rl plan` and `k2rl plan calibrate` do with their words."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from k2rl import planning
from k2rl.errors import ConfigError, RunError

#: Largest push of a calibration, in MiB: it is in memory three times.
MOST_MIB = 4096
#: Where a calibration puts its sheet.
SHEET = Path("outputs/plan/this-machine.yaml")


def run(words: Sequence[str]) -> str:
    """What to print.

    Raises:
        ConfigError: one line; nothing was written.
    """
    if "calibrate" in words:
        return _calibrate([word for word in words if word != "calibrate"])
    request = planning.parse(words)
    planned = planning.plan(request)
    wants_picture = request.output == "text" or request.picture
    path = planning.picture_path(request)
    if wants_picture:
        from k2rl.planning_report import as_svg

        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(as_svg(planned), encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"picture={path}: {error.strerror}; name another file") from error
    if request.output == "json":
        return planning.as_json(planned)
    from k2rl.planning_report import as_text

    return f"{as_text(planned)}\n  picture: {path}"


def _calibrate(words: Sequence[str]) -> str:
    """Measure pushes between two processes, fit a sheet to some and say how well it predicts the others."""
    from k2rl.checkpoint_engine import calibrate
    from k2rl.checkpoint_engine.local_push import LocalPushes, micro_measurements
    from k2rl.checkpoint_engine.messages import TransferError
    from k2rl.checkpoint_engine.sheets import write_sheet
    from k2rl.checkpoint_engine.topology import Topology

    path, mib, output = _calibration_options(words)
    guess = micro_measurements()
    fitted_to, others = calibrate.plans_to_measure(mib * 2**20)
    try:
        # Measured together: what else the machine does meanwhile falls on all of them.
        with LocalPushes() as local:
            records = calibrate.measure_pushes([*fitted_to, *others], Topology(guess, 1), local.push)
    except TransferError as error:
        raise RunError(f"calibration: {error}") from error
    held_out = records[len(fitted_to) :]
    fitted = calibrate.fit(records[: len(fitted_to)], guess)
    missed = calibrate.errors(held_out, fitted.device)
    note = (
        "Measured by `k2rl plan calibrate` on this machine, one rank; it predicts other pushes "
        f"within {max(map(abs, missed)):.0%}."
    )
    try:
        write_sheet(fitted.device, path, note)
    except OSError as error:
        raise ConfigError(f"sheet={path}: {error.strerror}; name another file") from error
    device = fitted.device
    if output == "json":
        result = {"sheet": str(path), "device": asdict(device), "fitted_worst_error": round(fitted.worst, 4)}
        return json.dumps({**result, "held_out_errors": [round(error, 4) for error in missed]})
    rows = [
        f"  {record.plan.nbytes / 2**20:>5.0f} MiB, {len(record.plan.tensors):>4} tensors, "
        f"{len(record.plan.buckets):>3} buckets: measured {record.seconds * 1e3:>6.1f} ms, "
        f"simulated {calibrate.predict(record, device) * 1e3:>6.1f} ms, {error:+.0%}"
        for record, error in zip(held_out, missed, strict=True)
    ]
    return "\n".join(
        [
            f"Fitted to {len(fitted_to)} measured pushes of two processes (worst {fitted.worst:.0%} off):",
            f"  copy in {device.copy_in_gbps:.2f} GB/s, apply {device.apply_gbps:.2f} GB/s, "
            f"memory {device.memory_gbps:.2f} GB/s, {device.block_us:.1f} us a block, "
            f"{device.bucket_us:.0f} us a bucket",
            "Pushes held out of the fit:",
            *rows,
            f"  sheet: {path}; use it: k2rl plan cluster={path} gpus=1 model=glm_4_5_air",
        ]
    )


def _calibration_options(words: Sequence[str]) -> tuple[Path, int, str]:
    """The sheet's file, MiB of the largest push, and the output.

    Raises:
        ConfigError: one line with what there is.
    """
    takes = "`k2rl plan calibrate` takes sheet=FILE.yaml, mib=SIZE of the largest push, output=text or json"
    options = {"sheet": str(SHEET), "output": "text", "mib": "256"}
    for word in words:
        key, equals, value = word.partition("=")
        if key not in options or not equals or not value:
            raise ConfigError(f"{word}: {takes}")
        options[key] = value
    path = Path(options["sheet"])
    mib = int(options["mib"]) if options["mib"].isdecimal() else 0
    if path.suffix != ".yaml" or options["output"] not in planning.OUTPUTS or not 1 <= mib <= MOST_MIB:
        raise ConfigError(f"{' '.join(words)}: {takes} (1 to {MOST_MIB})")
    return path, mib, options["output"]
