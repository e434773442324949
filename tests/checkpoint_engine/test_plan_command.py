"""`k2rl plan` as people and programs use it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from k2rl.checkpoint_engine.sheets import cluster_names, load_sheet
from k2rl.cli import main
from k2rl.composition import compose

#: A model and a cluster that are planned in a moment.
SMALL = ["model=glm_4_5_air", "cluster=h800", "gpus=8"]


@pytest.mark.parametrize("strategy", ["broadcast", "shard_aware", "delta", "moonshot"])
def test_json_is_one_line_that_says_simulated(strategy: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", *SMALL, f"strategy={strategy}", "output=json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["simulated"] is True
    assert 0 < result["floor_seconds"] <= result["seconds"] < 60
    assert set(result["stages"]) >= {"copy_in", "transfer", "apply"}
    assert all(0 <= seconds <= result["seconds"] for seconds in result["stages"].values())
    assert result["buckets"] > 0
    assert result["binds"]


def test_a_delta_looks_at_everything_and_pushes_what_changed(capsys: pytest.CaptureFixture[str]) -> None:
    def planned(*words: str) -> dict[str, Any]:
        assert main(["plan", *SMALL, *words, "output=json"]) == 0
        found: dict[str, Any] = json.loads(capsys.readouterr().out)
        return found

    full = planned("strategy=broadcast")
    deltas = {share: planned("strategy=delta", f"changed={share}") for share in (0.02, 0.2, 1)}
    for share, delta in deltas.items():
        assert delta["stages"]["scan"] == pytest.approx(full["stages"]["copy_in"], rel=0.05)
        assert delta["pushed_bytes"] == pytest.approx(share * full["bytes"], rel=0.1)
        assert delta["seconds"] > delta["stages"]["scan"]
    assert deltas[0.02]["seconds"] < full["seconds"] < deltas[1]["seconds"]


def test_text_says_simulated_what_binds_and_where_the_picture_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    picture = tmp_path / "new" / "push.svg"
    assert main(["plan", *SMALL, f"picture={picture}"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("Simulated push")
    assert all(word in out for word in ("floor", "binds", "timeline (simulated", str(picture)))
    svg = ElementTree.parse(picture).getroot()
    titles = [element.text or "" for element in svg.iter("{http://www.w3.org/2000/svg}title")]
    assert titles
    assert all("simulated" in title for title in titles)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["model=gpt5"], "model=gpt5 is not one of: kimi_k2, deepseek_v31, qwen3_235b_a22b, glm_4_5_air"),
        (["cluster=b200"], "cluster=b200 is not one of: cpu, h100, h20, h200, h800"),
        (["strategy=magic"], "strategy=magic is not one of: broadcast, shard_aware, delta, moonshot"),
        (["dtype=fp4"], "dtype=fp4 is not one of: fp8, bf16"),
        (["gpus=12"], "gpus=12 must be a multiple of 8, the GPUs of a host of h20"),
        (["gpus=many"], "gpus=many: gpus is a number"),
        (["tp=7"], "tp=7 must divide gpus=256"),
        (["ep=3"], "ep=3 must divide tp=16"),
        (["bucket_gib=0.1"], "needs a bucket of"),
        (["bucket_gib=nan"], "bucket_gib=nan must be"),
        (["slots=1"], "use at least 2"),
        (["strategy=delta", "changed=0"], "changed=0 must be above 0 and at most 1"),
        (["strategy=delta", "changed=1.5"], "changed=1.5 must be above 0 and at most 1"),
        (["strategy=delta", "changed=nan"], "changed=nan must be above 0 and at most 1"),
        (["strategy=delta", "changed=few"], "changed=few: changed is a number"),
        (["colour=red"], "colour=red: `k2rl plan` takes KEY=VALUE with KEY one of: model,"),
        (["device.speed=1"], "Key 'speed' not in 'DeviceConfig'; it has: per_host,"),
        (["device.network_gbps=-1"], "device.network_gbps=-1.0 must be a finite number, above 0"),
        (["cluster=cpu", "gpus=1", "strategy=moonshot"], "take one of h100, h20, h200, h800"),
        (["calibrate", "sheet=rates.txt"], "takes sheet=FILE.yaml"),
        (["calibrate", "mib=0"], "mib=SIZE of the largest push"),
        (["calibrate", "model=kimi_k2"], "model=kimi_k2: `k2rl plan calibrate` takes"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(
    words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", "output=json", *words] if words[0] != "calibrate" else ["plan", *words]) == 2
    captured = capsys.readouterr()
    assert said in captured.err
    assert captured.err.count("\n") == 1
    assert not captured.out


def test_a_calibration_writes_a_sheet_that_plan_takes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sheet = tmp_path / "here.yaml"
    assert main(["plan", "calibrate", "mib=8", f"sheet={sheet}"]) == 0
    assert "Pushes held out of the fit" in capsys.readouterr().out
    assert main(["plan", "model=glm_4_5_air", f"cluster={sheet}", "gpus=1", "output=json"]) == 0
    assert json.loads(capsys.readouterr().out)["simulated"] is True


@pytest.mark.parametrize("name", cluster_names())
def test_a_cluster_has_one_name_for_training_and_planning(name: str) -> None:
    assert compose([f"cluster={name}"]).cluster.device == load_sheet(name, {})


def test_planning_imports_no_torch() -> None:
    code = "import sys, k2rl.planning, k2rl.planning_report; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60, check=False).returncode == 0
