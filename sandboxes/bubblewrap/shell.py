"""A shell that stays, with commands going in one after the other."""

from __future__ import annotations

import asyncio
import os
import secrets
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import TYPE_CHECKING

from sandboxes.base import Ended, ExecResult
from sandboxes.bubblewrap.runs import Run
from sandboxes.errors import SandboxClosedError, SandboxError, SandboxUnsupportedError

if TYPE_CHECKING:
    from sandboxes.bubblewrap.sandbox import BubblewrapSandbox

#: The loop in the shell: lines of `token command`, the command as printf's %b takes it; what was stderr tells
#: the token and the status. Commands see neither descriptor, and run in the shell itself.
LOOP = r"""
exec 3>&2 2>&1 4<&0 </dev/null
while IFS=' ' read -r _k2rl_token _k2rl_line <&4; do
    { eval "$(printf '%b' "$_k2rl_line")"; } 3>&- 4<&-
    printf '%s %d\n' "$_k2rl_token" "$?" >&3
done
"""
CHOOSE = 'if command -v bash >/dev/null; then exec bash -c "$0"; else exec sh -c "$0"; fi'
#: Seconds that a shell has to answer once its command was killed, before it is killed itself.
GRACE = 2.0


class ShellRun(Run):
    """The shell as a run: stdout is the output of the command at hand, stderr brings `token status` lines."""

    def __init__(self, number: int, limit: int, kill: Callable[[int], None]) -> None:
        super().__init__(number, limit, kill)
        self.answer: asyncio.Future[int] | None = None
        self.token = ""
        self.too_much = asyncio.Event()

    def expect(self) -> asyncio.Future[int]:
        """The status of the next command, which is to be sent with `token`."""
        self.token = secrets.token_hex(8)
        self.answer = asyncio.get_running_loop().create_future()
        self.too_much.clear()
        self.output[0].clear()
        return self.answer

    def _take(self, buffer: bytearray, data: bytes) -> bool:
        if buffer is self.output[0]:
            room = self.limit - len(buffer)
            buffer += data[:room]
            if len(data) > room:
                self.too_much.set()
        else:
            buffer += data
            self._take_answers(buffer)
        return True

    def _take_answers(self, buffer: bytearray) -> None:
        *lines, rest = bytes(buffer).split(b"\n")
        buffer[:] = rest[-1000:]
        for line in lines:
            token, _, status = line.partition(b" ")
            if token == self.token.encode() and self.answer is not None and not self.answer.done():
                self._drain()
                self.answer.set_result(int(status))

    def _drain(self) -> None:
        """What the command has written is in the pipe by now."""
        for descriptor, buffer in list(self._readers.items()):
            while buffer is self.output[0] and descriptor in self._readers and self._read(descriptor):
                pass


class BubblewrapShell:
    """See `sandboxes.base.Shell`. Made by `BubblewrapSandbox.shell`."""

    def __init__(self, sandbox: BubblewrapSandbox, run: ShellRun, commands: int) -> None:
        self._sandbox = sandbox
        self._run = run
        self._commands = commands
        self._turn = asyncio.Lock()
        self._watch: asyncio.Future[None] | None = None

    @classmethod
    async def start(
        cls, sandbox: BubblewrapSandbox, cwd: str | None, env: Mapping[str, str] | None
    ) -> BubblewrapShell:
        theirs, commands = os.pipe()
        os.set_blocking(commands, False)
        request = sandbox.program(["sh", "-c", CHOOSE, LOOP], cwd, env)
        try:
            run = sandbox.start("exec", request, theirs, sandbox.spec.limits.output_bytes, ShellRun)
        except BaseException:
            os.close(commands)
            raise
        shell = cls(sandbox, run, commands)
        if not sandbox.has_cgroup:
            shell._watch = asyncio.ensure_future(sandbox.watch(run))
        first = await shell.run(":", timeout=sandbox.AGENT_SECONDS)
        if not shell.is_alive():
            await shell.close()
            raise SandboxUnsupportedError(f"no shell starts in the sandbox: {first.text.strip() or first}")
        return shell

    def is_alive(self) -> bool:
        return not self._run.done.done() and self._commands >= 0

    async def run(self, command: str, *, timeout: float | None = None) -> ExecResult:
        if "\0" in command:
            raise ValueError("a command cannot hold a NUL character")
        seconds = self._sandbox.spec.limits.wall_seconds if timeout is None else timeout
        async with self._turn:
            if not self.is_alive():
                raise SandboxClosedError(f"the shell in sandbox {self._sandbox.id} has ended")
            return await self._command(command, seconds)

    async def _command(self, command: str, timeout: float) -> ExecResult:
        began, boot = time.monotonic(), time.clock_gettime(time.CLOCK_BOOTTIME)
        kills = self._sandbox.oom_kills()
        answer = self._run.expect()
        line = command.replace("\\", "\\\\").replace("\n", "\\n")
        sending = asyncio.ensure_future(self._send(f"{self._run.token} {line}\n".encode("utf-8", "replace")))
        too_much = asyncio.ensure_future(self._run.too_much.wait())
        ended: Ended = "exited"
        try:
            waits = (answer, self._run.done, too_much)
            done, _ = await asyncio.wait(waits, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
            if answer not in done and self._run.done not in done:
                ended = "output_limit" if too_much in done else "timed_out"
                await self._interrupt(answer, boot, ended)
        except asyncio.CancelledError:
            self._run.end("killed")
            raise
        finally:
            for each in (sending, too_much):
                each.cancel()
            with suppress(asyncio.CancelledError, OSError):
                await sending
        return self._result(answer, ended, kills, time.monotonic() - began)

    def _result(self, answer: asyncio.Future[int], ended: Ended, kills: int, seconds: float) -> ExecResult:
        output = bytes(self._run.output[0])
        if answer.done():
            code = answer.result()
            code = 128 - code if 128 < code < 192 else code  # a shell says 128 + the number of the signal
        else:
            code = self._run.done.result()[0]
            if ended == "exited":
                ended = self._run.ended or ("killed" if code == -9 else "exited")
        if self._run.too_much.is_set():
            ended = "output_limit"
        elif ended in ("exited", "killed") and code != 0 and self._sandbox.oom_kills() > kills:
            ended = "out_of_memory"
        elif ended == "exited" and code == -9:
            ended = "killed"
        return ExecResult(exit_code=code, stdout=output, stderr=b"", duration=seconds, ended=ended)

    async def _interrupt(self, answer: asyncio.Future[int], since: float, ended: Ended) -> None:
        """End the command at hand, and the shell only if the command is the shell itself."""
        self._sandbox.interrupt(self._run.number, since)
        await asyncio.wait((answer, self._run.done), timeout=GRACE, return_when=asyncio.FIRST_COMPLETED)
        if not answer.done():
            self._run.end(ended)
            await asyncio.wait((self._run.done,))

    async def _send(self, data: bytes) -> None:
        loop = asyncio.get_running_loop()
        while data:
            try:
                data = data[os.write(self._commands, data) :]
            except BlockingIOError:
                writable = asyncio.Event()
                loop.add_writer(self._commands, writable.set)
                try:
                    await writable.wait()
                finally:
                    loop.remove_writer(self._commands)

    async def close(self) -> None:
        if self._commands >= 0:
            commands, self._commands = self._commands, -1
            os.close(commands)
        if self._watch is not None:
            self._watch.cancel()
        self._run.end("killed")
        with suppress(SandboxError):  # a sandbox that failed has ended its shell, too
            await self._run.done
