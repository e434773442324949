"""The driver's end of the keeper: it is started, told what to do, and its death is noticed."""

from __future__ import annotations

import asyncio
import json
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sandboxes.errors import SandboxError, SandboxUnavailableError

BOOT = "import sys; sys.path.append(sys.argv.pop(1)); from sandboxes.bubblewrap.keeper import main; main()"
#: Seconds until the keeper must have answered. It does little; a loaded machine is slow.
ANSWER_SECONDS = 60.0


class KeeperClient:
    """One keeper process.

    Args:
        bwrap: the binary.
        uid: whom sandboxes run as, if not as this process.
        cgroups: whether control groups are used where they can be.
    """

    def __init__(self, bwrap: Path, uid: int | None, cgroups: bool) -> None:
        self.uid = uid
        #: Why it is of no use any more; empty as long as it is.
        self.dead = ""
        #: Version of the control groups it uses (0: none), and why none.
        self.cgroup, self.no_cgroups = 0, ""
        self._settings = {"bwrap": str(bwrap), "uid": uid, "cgroups": cgroups}
        self._tasks: set[asyncio.Task[None]] = set()
        self._answers: dict[tuple[str, int], asyncio.Future[Any]] = {}

    async def start(self) -> None:
        """Start it.

        Raises:
            SandboxUnavailableError: it did not start.
        """
        self._connection, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        root = str(Path(__file__).parents[2])
        with theirs:
            self._process = subprocess.Popen(  # noqa: ASYNC220 - it takes a millisecond, once
                [sys.executable, "-I", "-S", "-c", BOOT, root, str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                start_new_session=True,  # Ctrl-C is for the driver, which ends it
            )
        self._connection.setblocking(False)
        await self._send(self._settings)
        loop = asyncio.get_running_loop()
        try:
            message = await asyncio.wait_for(loop.sock_recv(self._connection, 1 << 16), ANSWER_SECONDS)
        except (TimeoutError, OSError) as error:
            message, problem = b"", repr(error)
        else:
            problem = "it ended at once"
        if not message:
            self._process.kill()
            await asyncio.to_thread(self._process.wait)
            self._connection.close()
            raise SandboxUnavailableError(f"the keeper of the sandboxes did not start: {problem}")
        ready = json.loads(message)
        self.cgroup, self.no_cgroups = ready["cgroup"], ready["no_cgroups"]
        loop.add_reader(self._connection, self._receive)

    async def open(
        self, number: int, argv: Sequence[str], memory_bytes: int, pids: int, descriptors: Sequence[int]
    ) -> str:
        """Start bubblewrap; the path of the group's count of killed processes, empty without a group.

        Args:
            descriptors: the agent's end of its socket, its code, where errors are written.

        Raises:
            SandboxError: it could not be started.
        """
        opened = self._expect("open", number)
        self._expect("gone", number)
        request = {"op": "open", "id": number, "argv": list(argv), "memory_bytes": memory_bytes, "pids": pids}
        await self._send(request, descriptors)
        answer = await asyncio.wait_for(opened, ANSWER_SECONDS)
        if "failed" in answer:
            self._answers.pop(("gone", number), None)
            raise SandboxError(answer["failed"])
        return str(answer["events"])

    async def close(self, number: int) -> None:
        """Wait until a sandbox has ended and its group is gone; it is killed if it does not end by itself.

        Raises:
            SandboxError: it does not end.
        """
        gone = self._answers.get(("gone", number))
        if gone is None or self.dead:
            return
        await self._send({"op": "close", "id": number})
        try:
            await asyncio.wait_for(asyncio.shield(gone), ANSWER_SECONDS)
        except TimeoutError:
            raise SandboxError(f"sandbox {number} did not end within {ANSWER_SECONDS:.0f} s") from None

    def kill(self, number: int) -> None:
        """Kill a sandbox as a whole."""
        task = asyncio.ensure_future(self._send({"op": "kill", "id": number}))
        self._tasks.add(task)
        task.add_done_callback(self._sent)

    async def usage(self, number: int) -> int:
        """Bytes of memory its processes hold together, without what they share counted twice."""
        answer = self._expect("usage", number)
        await self._send({"op": "usage", "id": number})
        return int((await asyncio.wait_for(answer, ANSWER_SECONDS))["usage"])

    async def stop(self) -> None:
        """End it, and every sandbox with it."""
        if not self.dead:
            self.dead = "the keeper of the sandboxes was closed"
            asyncio.get_running_loop().remove_reader(self._connection)
            self._connection.close()
        try:
            await asyncio.to_thread(self._process.wait, ANSWER_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            raise SandboxError(f"the keeper {self._process.pid} of the sandboxes did not end") from None

    def _sent(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled():
            task.exception()  # a keeper that cannot be told has ended, and its sandboxes with it

    def _expect(self, what: str, number: int) -> asyncio.Future[Any]:
        if (what, number) not in self._answers:
            self._answers[what, number] = asyncio.get_running_loop().create_future()
        return self._answers[what, number]

    async def _send(self, message: dict[str, Any], descriptors: Sequence[int] = ()) -> None:
        packet = json.dumps(message).encode()
        deadline = asyncio.get_running_loop().time() + ANSWER_SECONDS
        while True:
            if self.dead:
                raise SandboxError(self.dead)
            try:
                socket.send_fds(self._connection, [packet], list(descriptors))
                return
            except BlockingIOError:
                if asyncio.get_running_loop().time() > deadline:
                    raise SandboxError("the keeper of the sandboxes takes no more requests") from None
                await asyncio.sleep(0.005)
            except OSError:
                self._died()

    def _receive(self) -> None:
        try:
            message = self._connection.recv(1 << 16)
        except BlockingIOError:
            return
        except OSError:
            message = b""
        if not message:
            self._died()
            return
        answer = json.loads(message)
        what = "gone" if "gone" in answer else "usage" if "usage" in answer else "open"
        future = self._answers.pop((what, answer["id"]), None)
        if future is not None and not future.done():
            future.set_result(answer)

    def _died(self) -> None:
        if self.dead:
            return
        asyncio.get_running_loop().remove_reader(self._connection)
        self._connection.close()
        status = self._process.poll()
        self.dead = f"the keeper of the sandboxes ended{'' if status is None else f' ({status})'}"
        answers, self._answers = self._answers, {}
        for (what, _), answer in answers.items():
            if answer.done():
                continue
            if what == "gone":
                answer.set_result({})
            else:
                answer.set_exception(SandboxError(self.dead))
