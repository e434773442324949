"""The process that starts the sandboxes of one driver, and ends them, however the driver ends.

bubblewrap asks the kernel to kill a sandbox when the thread that started it ends, so that thread must be
one that stays; and starting a process from one with gigabytes of weights is slow. Hence a small process
with one thread. As root it gives up root in the child, before bubblewrap starts. It makes the control
groups, and removes those of dead keepers. When the driver goes, by whatever signal, its end of the socket
closes, and everything is ended.

It speaks JSON over a socket of packets; `open` brings file descriptors: the agent's end of its socket, its
code, and where bubblewrap's errors go."""

from __future__ import annotations

import array
import fcntl
import json
import os
import select
import signal
import socket
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sandboxes.bubblewrap import cgroups

CONTROL_FD, AGENT_FD = 3, 4
#: Seconds that a sandbox gets to end by itself, once its socket is closed.
GRACE = 2.0
#: Children that wait to become sandboxes.
SPARES = 4


@dataclass
class Spare:
    """A child that waits, in a group already, to become bubblewrap. Joining a group takes a while."""

    pid: int
    socket: socket.socket
    group: cgroups.Cgroup | None


@dataclass
class Kept:
    """A sandbox: bubblewrap's process, which waits for process 1 of the sandbox."""

    number: int
    pid: int
    pidfd: int
    group: cgroups.Cgroup | None
    #: When to kill it; None as long as nobody wants it to end.
    deadline: float | None = None
    status: int | None = None


class Keeper:
    def __init__(self, driver: socket.socket, settings: dict[str, Any]) -> None:
        self.driver = driver
        self.path = settings["bwrap"]
        self.bwrap = os.open(self.path, os.O_RDONLY)
        self.uid = settings["uid"]
        self.kept: dict[int, Kept] = {}
        self.spares: list[Spare] = []
        self.children = 0
        self.can_prepare = True
        self.events = select.poll()
        self.hierarchy: cgroups.Hierarchy | None = None
        self.no_cgroups = ""
        try:
            if settings["cgroups"]:
                self.hierarchy = cgroups.detect()
                self.hierarchy.reap()
            else:
                self.no_cgroups = "switched off"
        except cgroups.NoCgroupsError as error:
            self.no_cgroups = str(error)

    def serve(self) -> None:
        """Until the driver closes its end, or has died."""
        signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(0))
        version = self.hierarchy.version if self.hierarchy else 0
        self.say(ready=True, cgroup=version, no_cgroups=self.no_cgroups)
        self.events.register(self.driver, select.POLLIN)
        try:
            while True:
                waiting = any(each.deadline is not None for each in self.kept.values())
                short = len(self.spares) < SPARES and self.can_prepare
                for descriptor, _ in self.events.poll(0 if short else 20 if waiting else None):
                    if descriptor == self.driver.fileno():
                        if not self.receive():
                            return
                    else:
                        self.ended(descriptor)
                self.press()
                if short:
                    try:
                        self.prepare()
                    except OSError:  # the next `open` tries again, and says so if it fails
                        self.can_prepare = False
        finally:
            self.end_all()

    def receive(self) -> bool:
        try:
            message, ancillary, _, _ = self.driver.recvmsg(1 << 20, socket.CMSG_SPACE(12))
        except ConnectionResetError:  # it died with answers unread
            return False
        descriptors = array.array("i")
        for _, _, data in ancillary:
            descriptors.frombytes(data)
        if not message:
            return False
        request = json.loads(message)
        kept = self.kept.get(request["id"])
        if request["op"] == "open":
            self.open(request, message, descriptors)
        elif request["op"] == "usage":
            self.say(id=request["id"], usage=self.usage(request["id"]))
        elif request["op"] == "close" and kept and kept.deadline is None:
            kept.deadline = time.monotonic() + GRACE
        elif request["op"] == "kill" and kept:
            kept.deadline = 0.0
        for descriptor in descriptors:
            os.close(descriptor)
        return True

    def open(self, request: dict[str, Any], message: bytes, descriptors: array.array[int]) -> None:
        number = request["id"]
        self.can_prepare = True
        try:
            if not self.spares:
                self.prepare()
            spare = self.spares.pop(0)
            pidfd = os.pidfd_open(spare.pid)
            if spare.group is not None:
                spare.group.limit(request["memory_bytes"], request["pids"])
            with spare.socket:
                socket.send_fds(spare.socket, [message], list(descriptors))
        except OSError as error:
            self.say(id=number, failed=f"cannot start bubblewrap: {error}")
            return
        self.kept[number] = Kept(number, spare.pid, pidfd, spare.group)
        self.events.register(pidfd, select.POLLIN)
        self.say(id=number, pid=spare.pid, events=str(spare.group.events) if spare.group else "")

    def prepare(self) -> None:
        """Make a child that joins a new group and waits.

        Raises:
            OSError: the group or the child could not be made.
        """
        self.children += 1
        group = None
        if self.hierarchy is not None:
            group = self.hierarchy.create(cgroups.group_name(self.children))
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            pid = os.fork()
        except OSError:
            if group is not None:
                group.remove()
            raise
        if pid == 0:
            try:
                self.become_bwrap(theirs, group)
            finally:
                os._exit(70)
        theirs.close()
        self.spares.append(Spare(pid, ours, group))

    def become_bwrap(self, keeper: socket.socket, group: cgroups.Cgroup | None) -> None:
        """In the child: wait for a request, then for good become what it asks for."""
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        os.setsid()
        kept = sorted((keeper.fileno(), self.bwrap))
        for low, high in zip((2, *kept), (*kept, 4096), strict=True):
            os.closerange(low + 1, high)
        problem = ""
        try:
            if group is not None:
                group.join()
        except OSError as error:
            problem = f"cannot join its control group: {error}"
        message, descriptors, _, _ = socket.recv_fds(keeper, 1 << 20, 3)
        if not message:
            os._exit(0)  # the keeper is gone
        control, agent, errors = descriptors
        if problem:
            os.write(errors, problem.encode())
            return
        # Opened anew: who shares an open file shares its position.
        agent = os.open(f"/proc/self/fd/{agent}", os.O_RDONLY)
        null = os.open("/dev/null", os.O_RDWR)
        *streams, bwrap = [_high(each) for each in (null, null, errors, control, agent, self.bwrap)]
        for target, descriptor in enumerate(streams):
            os.dup2(descriptor, target)
        os.closerange(AGENT_FD + 1, bwrap)
        os.closerange(bwrap + 1, 4096)
        os.set_inheritable(bwrap, False)
        if self.uid is not None:
            os.setgroups([])
            os.setresgid(self.uid, self.uid, self.uid)
            os.setresuid(self.uid, self.uid, self.uid)
        os.umask(0o022)
        argv = json.loads(message)["argv"]
        try:
            try:
                os.execve(self.path, argv, {})
            except PermissionError:  # in a folder that only root may enter; the open file can be run
                os.execve(bwrap, argv, {})
        except OSError as error:
            os.write(2, f"cannot start bubblewrap: {error}".encode())

    def ended(self, pidfd: int) -> None:
        for kept in self.kept.values():
            if kept.pidfd == pidfd:
                self.events.unregister(pidfd)
                os.close(pidfd)
                _, status = os.waitpid(kept.pid, 0)
                kept.status = os.waitstatus_to_exitcode(status)
                kept.pidfd = -1
                kept.deadline = 0.0
                return

    def press(self) -> None:
        """Go on ending what is to end."""
        now = time.monotonic()
        for kept in list(self.kept.values()):
            if kept.deadline is None or kept.deadline > now:
                continue
            if kept.status is None:
                end_tree(kept.pid)
            if kept.group is not None and kept.status is not None:
                kept.group.kill()
            if kept.status is not None and (kept.group is None or kept.group.remove()):
                del self.kept[kept.number]
                self.say(id=kept.number, gone=kept.status)

    def end_all(self) -> None:
        self.driver.close()
        for spare in self.spares:
            spare.socket.close()
            os.waitpid(spare.pid, 0)
            if spare.group is not None:
                spare.group.remove()
        deadline = time.monotonic() + 10
        for kept in self.kept.values():
            kept.deadline = 0.0
        while self.kept and time.monotonic() < deadline:
            self.press()
            for descriptor, _ in self.events.poll(10):
                if descriptor in [kept.pidfd for kept in self.kept.values()]:
                    self.ended(descriptor)

    def usage(self, number: int) -> int:
        """Bytes of memory that a sandbox's processes hold; what they share is counted once."""
        kept = self.kept.get(number)
        return sum(map(_share, descendants(kept.pid))) if kept else 0

    def say(self, **message: Any) -> None:
        try:
            self.driver.send(json.dumps(message).encode())
        except OSError:  # the driver is gone: its end of the socket says so to `receive`
            return


def _high(descriptor: int) -> int:
    """A copy of a descriptor above all that have a fixed place."""
    return fcntl.fcntl(descriptor, fcntl.F_DUPFD, 64)


def _share(pid: int) -> int:
    """A process's proportional share of the memory it maps, in bytes."""
    try:
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) * 1024
    except OSError:  # it has ended meanwhile
        return 0
    return 0


def descendants(root: int) -> list[int]:
    """The processes below one, nearest first."""
    found = _children(root)
    for pid in found:
        found.extend(_children(pid))
    return found


def _children(pid: int) -> list[int]:
    found: list[int] = []
    try:
        for thread in os.listdir(f"/proc/{pid}/task"):  # noqa: PTH208 - names alone
            found.extend(map(int, Path(f"/proc/{pid}/task/{thread}/children").read_text().split()))
    except OSError:  # it has ended meanwhile
        return found
    return found


def end_tree(pid: int) -> None:
    """Kill process 1 of a sandbox, with which all others in it end, or bubblewrap, if it is not that far."""
    victims = descendants(pid)[:1] or [pid]
    for victim in victims:
        try:
            os.kill(victim, signal.SIGKILL)
        except ProcessLookupError:
            continue


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    driver = socket.socket(fileno=int(sys.argv[1]))
    settings = json.loads(driver.recv(1 << 20))
    Keeper(driver, settings).serve()


if __name__ == "__main__":
    main()
