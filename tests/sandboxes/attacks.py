"""The attack table: what hostile code tries, as Python that prints `reached: …` or `held: …`.

Every probe is run twice: in a sandbox, where it must be held, and outside of any as root, where it must
reach what it is after. So a probe that cannot fail is noticed. What a kernel does not have at all it
reports as `absent`.

Run as a program, it plays the table with a backend and prints JSON: name -> what the probe said. It needs
nothing but the standard library, msgspec and `sandboxes`, and so can be run as any user:

    python -m tests.sandboxes.attacks bubblewrap
    python -m tests.sandboxes.attacks outside
"""

from __future__ import annotations

import asyncio
import json
import os
import platform
import signal
import socket
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from sandboxes.base import MIB, Limits, SandboxSpec
from sandboxes.bubblewrap import seccomp
from sandboxes.registry import create

LIMITS = Limits(
    wall_seconds=60,
    memory_bytes=128 * MIB,
    pids=40,
    disk_bytes=32 * MIB,
    inodes=1000,
    file_bytes=16 * MIB,
    output_bytes=MIB,
    open_files=100,
)
#: Names that the probes look for.
SECRET = "k2rl-probe-secret"
MARKER = "k2rl-probe-victim"

PRELUDE = """
import ctypes, errno, glob, json, os, resource, select, signal, socket, stat, struct, sys, time
T = json.loads(sys.argv[1])
libc = ctypes.CDLL(None, use_errno=True)
def call(number, *arguments):
    result = libc.syscall(number, *arguments)
    return result if result >= 0 else -ctypes.get_errno()
def say(reached, detail=""):
    print(("reached: " if reached else "held: ") + str(detail), flush=True)
    os._exit(0)
def text(path):
    with open(path, "rb") as file:
        return file.read(1 << 20)
"""

#: Reading and writing what is not the sandbox's.
FILES = {
    "a file of the host": "say(T['secret'] in text(T['file']).decode())",
    "the host's temporary files": "say(os.path.basename(T['file']) in os.listdir(os.path.dirname(T['file'])))",
    "the host's shared memory": "say(T['secret'] in text(T['shm']).decode())",
    "the host through some process's root": (
        "say(any(os.path.exists(f'{root}/{T[\"file\"]}') for root in glob.glob('/proc/[0-9]*/root')))"
    ),
    "the host through some process's folder": (
        "say(any(os.path.exists(f'{cwd}/../../../../../../..{T[\"file\"]}') for cwd in glob.glob('/proc/[0-9]*/cwd')))"
    ),
    "the judge's own code": "say(b'class Limits' in text(T['code']))",
    "accounts of the host": "say(b'shadow' in os.listdir('/etc') or 'shadow' in os.listdir('/etc'))",
    "a home folder": "say(bool(os.listdir('/root')))",
    "writing to /usr": "p = '/usr/lib/k2rl-probe'; open(p, 'w').close(); os.unlink(p); say(True)",
    "writing to /": "p = '/k2rl-probe'; open(p, 'w').close(); os.unlink(p); say(True)",
    "changing /etc/passwd": "os.close(os.open('/etc/passwd', os.O_WRONLY)); say(True)",
    "changing ld.so.cache": "os.close(os.open('/etc/ld.so.cache', os.O_WRONLY)); say(True)",
    "writing to /dev": "p = '/dev/k2rl-probe'; open(p, 'w').close(); os.unlink(p); say(True)",
    "writing anywhere but in three places": """
        found = []
        for line in open('/proc/self/mountinfo'):
            point = line.split()[4].replace('\\\\040', ' ')
            if not os.path.isdir(point) or point in ('/work', '/tmp', '/dev/shm', T['scratch']): continue
            try: open(point + '/k2rl-probe', 'w').close(); os.unlink(point + '/k2rl-probe')
            except OSError: continue
            found.append(point)
        say(found, found)
    """,
    "making a device": "p = T['scratch'] + '/d'; os.mknod(p, stat.S_IFCHR | 0o600, os.makedev(1, 1)); os.unlink(p); say(True)",
    "a disk": "disks = [p for p in glob.glob('/dev/vd?') + glob.glob('/dev/sd?') + glob.glob('/dev/nvme?n?') + glob.glob('/dev/loop?')]; os.close(os.open(disks[0] if disks else '/dev/vda', os.O_RDONLY)); say(True)",
    "the kernel's messages": "os.close(os.open('/dev/kmsg', os.O_RDONLY)); say(True)",
    "the kernel's settings": "os.close(os.open('/proc/sys/kernel/core_pattern', os.O_WRONLY)); say(True)",
    "sysrq": "os.close(os.open('/proc/sysrq-trigger', os.O_WRONLY)); say(True)",
    "/sys": "say(os.path.isdir('/sys/kernel'))",
    "control groups": "say(os.path.isdir('/sys/fs/cgroup') and os.listdir('/sys/fs/cgroup'))",
    "descriptors left open": "say([n for n in os.listdir('/proc/self/fd') if int(n) > 3], os.listdir('/proc/self/fd'))",
}
#: Becoming more than one is.
RIGHTS = {
    "capabilities": "say(any(int(l.split()[1], 16) for l in open('/proc/self/status') if l.startswith('Cap')))",
    "gaining rights by exec": "say(libc.prctl(39, 0, 0, 0, 0) == 0)",
    "setuid programs": (
        "say(not os.statvfs('/usr').f_flag & os.ST_NOSUID and b'NoNewPrivs:\\t1' not in text('/proc/self/status'))"
    ),
    "becoming root": "os.setuid(0); say(os.getuid() == 0)",
    "other groups": "os.setgroups([0, 4]); say(True)",
    "chroot": "os.chroot('/usr'); say(True)",
    "real-time scheduling": "os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1)); say(True)",
    "higher priority": "os.setpriority(os.PRIO_PROCESS, 0, -5); say(True)",
    # Not RLIMIT_NPROC, which is not set where a control group counts processes.
    "raising a limit": "resource.setrlimit(resource.RLIMIT_NOFILE, (1000, 1000)); say(True)",
    "a user namespace by unshare": "say(libc.unshare(0x10000000) == 0, ctypes.get_errno())",
    "a user namespace by clone": """
        pid = call(T['clone'], 0x10000000 | signal.SIGCHLD, 0, 0, 0, 0)
        if pid == 0: os._exit(0)
        say(pid > 0, pid)
    """,
    "a user namespace by clone3": """
        arguments = struct.pack('<QQQQQQQQ', 0x10000000, 0, 0, 0, signal.SIGCHLD, 0, 0, 0)
        pid = call(435, arguments, len(arguments))
        if pid == 0: os._exit(0)
        say(pid > 0, pid)
    """,
    "entering a namespace": "f = os.open('/proc/self/ns/uts', os.O_RDONLY); say(libc.setns(f, 0) == 0, ctypes.get_errno())",
    "the 32-bit calls of the processor": """
        if os.uname().machine != 'x86_64': print('absent'); os._exit(0)
        import mmap
        area = mmap.mmap(-1, 4096, prot=7)
        area.write(bytes.fromhex('b814000000cd80c3'))  # getpid by int 0x80
        get = ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(area)))
        child = os.fork()
        if child == 0: os._exit(0 if get() == os.getpid() else 1)
        say(os.waitpid(child, 0)[1] == 0)
    """,
}
#: Other processes.
PROCESSES = {
    "seeing a process of the host": "say(any(T['marker'].encode() in text(p) for p in glob.glob('/proc/[0-9]*/cmdline')))",
    "signalling a process of the host": """
        os.kill(T['pid'], 0)
        say(T['marker'].encode() in text(f"/proc/{T['pid']}/cmdline"))
    """,
    "the environment of another process": """
        for path in glob.glob('/proc/[0-9]*/environ'):
            try: content = text(path)
            except OSError: continue
            if T['secret'].encode() in content: say(True, path)
        say(False)
    """,
    "the environment of its own": "say(T['secret'] in str(dict(os.environ)))",
    "memory of the parent": "os.close(os.open(f'/proc/{os.getppid()}/mem', os.O_RDONLY)); say(True)",
    "changing memory of the parent": "os.close(os.open(f'/proc/{os.getppid()}/mem', os.O_RDWR)); say(True)",
    "descriptors of the parent": "say([os.readlink(p) for p in glob.glob(f'/proc/{os.getppid()}/fd/*')])",
    "tracing another process": """
        child = os.fork()
        if child == 0: time.sleep(60)
        result = libc.ptrace(16, child, 0, 0)
        error = ctypes.get_errno()
        os.kill(child, 9)
        say(result == 0, error)
    """,
    "reading another process's memory": """
        child = os.fork()
        if child == 0: time.sleep(60)
        buffer = ctypes.create_string_buffer(b'x' * 8)
        local = struct.pack('<QQ', ctypes.addressof(buffer), 8)
        result = libc.process_vm_readv(child, local, 1, local, 1, 0)
        error = ctypes.get_errno()
        os.kill(child, 9)
        say(result == 8, error)
    """,
    "SysV shared memory of the host": "say(libc.shmget(T['key'], 0, 0) >= 0, ctypes.get_errno())",
}
#: Leaving by wire.
NETWORK = {
    "a server on the host's loopback": "socket.create_connection(('127.0.0.1', T['port']), 5).close(); say(True)",
    "a server on the host's own address": "socket.create_connection((T['address'], T['port']), 5).close(); say(True)",
    "an abstract socket of the host": "s = socket.socket(socket.AF_UNIX); s.connect('\\0' + T['abstract']); say(True)",
    "a socket in the host's files": "s = socket.socket(socket.AF_UNIX); s.connect(T['path']); say(True)",
    "docker.sock and other sockets in /run": """
        found = []
        for folder in ('/run', '/var/run'):
            for where, _, names in os.walk(folder):
                found += [n for n in names if stat.S_ISSOCK(os.lstat(os.path.join(where, n)).st_mode)]
        say(found, found[:3])
    """,
    "packets as they are": "socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0); say(True)",
    "ICMP": "socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP); say(True)",
    "the hypervisor's sockets": "socket.socket(40, socket.SOCK_STREAM, 0); say(True)",
    "the kernel's ciphers": "socket.socket(38, socket.SOCK_SEQPACKET, 0); say(True)",
    "network interfaces": "say([n for _, n in socket.if_nameindex() if n != 'lo'], socket.if_nameindex())",
}
#: Using up what others need.
RESOURCES = {
    "300 processes": """
        children = []
        try:
            for _ in range(300):
                child = os.fork()
                if child == 0: time.sleep(30); os._exit(0)
                children.append(child)
        except OSError as error: detail = (len(children), error.errno)
        else: detail = (300, 0)
        for child in children: os.kill(child, 9)
        say(len(children) > 60, detail)
    """,
    "300 threads": """
        import threading
        stop = threading.Event()
        count = 0
        try:
            for _ in range(300): threading.Thread(target=stop.wait, daemon=True).start(); count += 1
        except RuntimeError: pass
        say(count > 60, count)
    """,
    "400 MB of memory": "x = bytearray(400 << 20); say(len(set(x[::4096])) == 1)",
    "400 MB in eight processes": """
        ready, done = os.pipe()
        for _ in range(8):
            if os.fork() == 0:
                x = bytearray(50 << 20); os.write(done, b'x'); time.sleep(30); os._exit(0)
        got = 0
        while got < 8 and os.waitpid(-1, os.WNOHANG)[0] == 0:
            if select.select([ready], [], [], 0.05)[0]: got += len(os.read(ready, 1))
        say(got == 8, got)
    """,
    "400 MB that no process maps": """
        files = [os.fdopen(libc.memfd_create(b'x', 0), 'wb') for _ in range(1)]
        for f in files: f.write(bytes(400 << 20))
        say(True)
    """,
    "64 MB of files": """
        for n in range(8): open(f"{T['scratch']}/{n}", 'wb').write(bytes(8 << 20))
        say(True)
    """,
    "64 MB of files in /dev/shm": """
        for n in range(8): open(f"/dev/shm/k2rl-probe-{n}", 'wb').write(bytes(8 << 20))
        for n in range(8): os.unlink(f"/dev/shm/k2rl-probe-{n}")
        say(True)
    """,
    "one file of 24 MB": "open(T['scratch'] + '/big', 'wb').write(bytes(24 << 20)); say(True)",
    "3000 files": """
        for n in range(3000): open(f"{T['scratch']}/f{n}", 'w').close()
        say(True)
    """,
    "500 open files": "say(len([os.dup(0) for _ in range(500)]) == 500)",
    "32 MB of locked memory": "m = ctypes.create_string_buffer(32 << 20); say(libc.mlock(m, 32 << 20) == 0, ctypes.get_errno())",
    "core dumps": "say(resource.getrlimit(resource.RLIMIT_CORE)[1] != 0)",
    "8 MB of output": "os.write(2, b'flood'); [os.write(1, bytes(1 << 16)) for _ in range(128)]; print(); say(True)",
}
#: Terminals and clocks.
MACHINE = {
    "typing into a terminal": """
        import fcntl, pty, termios
        a, b = pty.openpty()
        fcntl.ioctl(b, termios.TIOCSTI, b'x')
        say(True)
    """,
    "pasting into a console": "say(libc.ioctl(os.open('/dev/null', os.O_RDWR), 0x541C, b'\\3') != 0 and ctypes.get_errno() != errno.EPERM, ctypes.get_errno())",
    "a console": "os.close(os.open('/dev/tty0', os.O_RDONLY)) if os.path.exists('/dev/tty0') else os.close(os.open('/dev/console', os.O_WRONLY)); say(True)",
    "a name of its own for the host": "say(socket.gethostname() == T['hostname'])",
}
#: Calls that are refused whatever they ask: outside, the kernel looks at these senseless arguments. reboot
#: and the like are judged by their arguments, too, and refuse these.
REFUSED = sorted(
    set(seccomp.DENIED) - {"uselib", "nfsservctl", "lookup_dcookie", "vhangup", "semop", "swapoff", "acct"}
)

#: What not every machine has, or lets root have.
ABSENT = {
    "the hypervisor's sockets",
    "the kernel's ciphers",
    "a disk",
    "a console",
    "sysrq",
}


def probes() -> dict[str, str]:
    """Name -> source."""
    column = seccomp.ARCHITECTURES[platform.machine()][1]
    table = {**FILES, **RIGHTS, **PROCESSES, **NETWORK, **RESOURCES, **MACHINE}
    sources = {}
    for name, code in table.items():
        body = textwrap.indent(textwrap.dedent(code).strip(), "    ")
        sources[name] = (
            f"{PRELUDE}try:\n{body}\n"
            "except (OSError, MemoryError, RuntimeError, IndexError, AttributeError, ValueError) as problem:\n"
            f"    absent = {name in ABSENT} and getattr(problem, 'errno', 0) in (errno.ENOENT, errno.EAFNOSUPPORT, errno.EPERM)\n"
            "    print('absent' if absent and T['outside'] else f'held: {problem!r}'[:300], flush=True)\n"
            "    os._exit(0)\n"
        )
    for name in REFUSED:
        number = seccomp.DENIED[name][column]
        if number is not None:
            sources[f"call {name}"] = (
                f"{PRELUDE}result = call({number}, -1, -1, -1, -1, -1, -1)\n"
                "if result == -errno.ENOSYS and T['outside']: print('absent'); os._exit(0)\n"
                "say(result not in (-errno.EPERM, -errno.ENOSYS), errno.errorcode.get(-result, result))\n"
            )
    return sources


@contextmanager
def targets(outside: bool) -> Iterator[dict[str, Any]]:
    """What the probes are after, set up on the host, and where it is."""
    import ctypes

    libc = ctypes.CDLL(None)
    with (
        tempfile.TemporaryDirectory() as folder,
        socket.create_server(("0.0.0.0", 0)) as server,
        socket.socket(socket.AF_UNIX) as abstract,
        socket.socket(socket.AF_UNIX) as path,
        tempfile.NamedTemporaryFile(dir="/dev/shm") as shm,
    ):
        Path(folder).chmod(0o755)
        file = Path(folder, "secret")
        file.write_text(SECRET)
        file.chmod(0o644)
        shm.write(SECRET.encode())
        shm.flush()
        Path(shm.name).chmod(0o644)
        server.listen(64)
        abstract.bind(f"\0k2rl-probe-{os.getpid()}")
        abstract.listen(64)
        path.bind(f"{folder}/socket")
        Path(folder, "socket").chmod(0o777)
        path.listen(64)
        in_run = f"/run/k2rl-probe-{os.getpid()}"
        if os.geteuid() == 0:
            run = socket.socket(socket.AF_UNIX)
            run.bind(in_run)
        scratch = Path(folder, "scratch")
        scratch.mkdir()
        os.environ["K2RL_SECRET"] = SECRET
        key = 0x6B32726C
        segment = libc.shmget(key, 4096, 0o1666)
        victim = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)", MARKER])
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            try:
                probe.connect(("192.0.2.1", 9))
                address = probe.getsockname()[0]
            except OSError:
                address = "127.0.0.2"
        try:
            yield {
                "outside": outside,
                "secret": SECRET,
                "marker": MARKER,
                "file": str(file),
                "shm": shm.name,
                "code": str(Path(seccomp.__file__).parents[1] / "base.py"),
                "scratch": str(scratch) if outside else "/work",
                "pid": victim.pid,
                "key": key,
                "clone": seccomp.CLONE[seccomp.ARCHITECTURES[platform.machine()][1]],
                "port": server.getsockname()[1],
                "address": address,
                "abstract": f"k2rl-probe-{os.getpid()}",
                "path": f"{folder}/socket",
                "hostname": socket.gethostname(),
            }
        finally:
            victim.kill()
            victim.wait()
            libc.shmctl(segment, 0, None)
            Path(in_run).unlink(missing_ok=True)


def outside(target: dict[str, Any]) -> dict[str, str]:
    """What the probes say without a sandbox, each in a child of this process."""
    said = {}
    with open(target["file"]):  # a descriptor that is left open
        for name, source in probes().items():
            with tempfile.TemporaryFile() as output:
                pid = os.fork()
                if pid == 0:
                    try:
                        os.setsid()
                        os.dup2(output.fileno(), 1)
                        os.chdir(target["scratch"])
                        signal.alarm(60)
                        sys.argv = ["-c", json.dumps(target)]
                        exec(source, {"__name__": "__main__"})
                    finally:
                        os._exit(1)
                code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
                with suppress(ProcessLookupError):
                    os.killpg(pid, signal.SIGKILL)
                output.seek(0)
                text = output.read().strip(b"\0\n").decode(errors="replace")
            said[name] = text or f"nothing: {code}"
    return said


async def inside(target: dict[str, Any], backend: str, options: dict[str, Any]) -> dict[str, str]:
    """What the probes say in a sandbox."""
    said = {}
    door = create(backend, **options)
    spec = SandboxSpec(limits=LIMITS, ephemeral=True)
    sandbox = await door.open(spec)
    for name, source in probes().items():
        result = await sandbox.run_python(source, argv=[json.dumps(target)])
        output = result.stdout.strip(b"\0\n").decode(errors="replace")
        if result.ended != "exited":
            output = f"held: {result.ended}"
        said[name] = output or f"nothing: {result.exit_code} {result.error_text[-300:]}"
        if not await sandbox.is_alive():
            said[name] += " (and the sandbox died)"
            await sandbox.close()
            sandbox = await door.open(spec)
    await sandbox.close()
    await door.close()
    return said


def main() -> None:
    backend, options = sys.argv[1], json.loads(sys.argv[2]) if len(sys.argv) > 2 else {}
    with targets(backend == "outside") as target:
        said = outside(target) if backend == "outside" else asyncio.run(inside(target, backend, options))
    print(json.dumps(said))


if __name__ == "__main__":
    main()
