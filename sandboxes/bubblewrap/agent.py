"""Process 1 of a sandbox: finishes it from within, gives up every right, then starts what it is told to.

It runs in the sandbox's own Python, without the `site` module, and imports nothing that is not built in or
quick: starting it is most of what a sandbox costs. bubblewrap leaves it three capabilities over the
sandbox's user namespace; they are gone before the first request is read. From then on it can do no more
than the code it starts, which cannot touch it: it is process 1 (no signal from inside reaches it), not
dumpable, and /proc is read-only.

The driver talks to it over a socket of packets, `marshal`led tuples with file descriptors beside them. What
goes back is of fixed size and checked there (`DONE`).

A run in a lasting sandbox has a parent of its own, a "subreaper", which adopts whatever forks away. When
that ends, what is left of the run becomes a child of process 1, and all children of process 1 that it does
not know are killed. In an ephemeral sandbox everything is killed, and every writable place emptied."""

from __future__ import annotations

import _ctypes
import _signal  # type: ignore[import-not-found]
import _socket
import errno
import gc
import io
import marshal
import os
import resource
import select
import stat
import struct
import sys

TYPE_CHECKING = False  # the checkers' name for it; `typing` itself would have to be imported
if TYPE_CHECKING:
    from typing import Any, NoReturn

    from sandboxes.errors import FileProblem

#: Number of the run, exit code or minus the signal, microseconds of CPU time.
DONE = struct.Struct("<IiQ")
READY, PONG, FAULT = b"ready", b"pong", b"fault"
HOME = "/work"
WRITABLE = (HOME, "/tmp", "/dev/shm")
#: Exit codes of the file operations, in the order of sandboxes.errors.FileProblem.
PROBLEMS: tuple[FileProblem, ...] = (
    "missing",
    "symlink",
    "not_a_file",
    "too_large",
    "no_space",
    "denied",
    "io",
)
FIRST_PROBLEM = 64
CANNOT_START, NOT_FOUND = 126, 127
CHUNK = 1 << 20
#: Rounds of killing one by one; after that everything is killed in one call, which no fork outruns.
PATIENCE = 8

MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_REMOUNT, MS_BIND = 1, 2, 4, 8, 32, 4096
MNT_DETACH, CLONE_NEWUSER = 2, 0x10000000
PR_SET_DUMPABLE, PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS = 4, 22, 38
PR_CAPBSET_READ, PR_CAPBSET_DROP = 23, 24
PR_SET_CHILD_SUBREAPER, PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL = 36, 47, 4
SECCOMP_MODE_FILTER = 2
SIGKILL, SIGCHLD, SIG_DFL, SIG_IGN = _signal.SIGKILL, _signal.SIGCHLD, _signal.SIG_DFL, _signal.SIG_IGN


class _Long(_ctypes._SimpleCData):  # type: ignore[type-arg]
    _type_ = "l"


class _Function(_ctypes.CFuncPtr):
    """A function of libc. The `ctypes` module would be another third of the agent's start."""

    _flags_ = _ctypes.FUNCFLAG_CDECL | _ctypes.FUNCFLAG_USE_ERRNO
    _restype_ = _Long


class _Libc:
    _handle = _ctypes.dlopen(None, 0)  # type: ignore[arg-type]


def libc(name: str, *arguments: int | bytes | None) -> int:
    """Call a function of libc with longs and bytes. Raises OSError where it returns -1."""
    passed = [_Long(each) if isinstance(each, int) else each for each in arguments]
    result: int = _Function((name, _Libc))(*passed)  # type: ignore[arg-type]
    if result == -1:
        code = _ctypes.get_errno()
        raise OSError(code, f"{name}: {os.strerror(code)}")
    return result


def address(buffer: bytes) -> int:
    """Where a bytes object's content lies (it must be kept alive meanwhile)."""
    return id(buffer) + bytes.__basicsize__ - 1


# ---------------------------------------------------------------------------------------------- the start


def mount(source: str | None, target: str, kind: str | None, flags: int, data: str | None = None) -> None:
    words = [None if each is None else each.encode() for each in (source, target, kind, data)]
    libc("mount", *words[:3], flags, words[3])


def finish_sandbox(settings: dict[str, Any]) -> int:
    """What bubblewrap leaves to be done, with the last rights there are; returns a writable view of /proc."""
    # All writable places share one file system, so that one size and one number of files bounds them.
    os.mkdir("/run/box")
    size = f"size={settings['disk_bytes']},nr_inodes={settings['inodes']},mode=755"
    mount("tmpfs", "/run/box", "tmpfs", MS_NOSUID | MS_NODEV, size)
    for number, place in enumerate(WRITABLE):
        os.mkdir(f"/run/box/{number}")
        mount(f"/run/box/{number}", place, None, MS_BIND)
    libc("umount2", b"/run/box", MNT_DETACH)
    # Children are the first to go when memory ends, and cannot say otherwise: to them /proc is read-only.
    mount("/proc", "/run/box", None, MS_BIND)
    proc = os.open("/run/box", os.O_RDONLY | os.O_DIRECTORY)
    libc("umount2", b"/run/box", MNT_DETACH)
    os.rmdir("/run/box")
    for name, content in settings["files"].items():
        write(name, content)
    # One user namespace more, the last: it owns none of these mounts, and who asks for another gets none.
    try:
        libc("umount2", b"/proc/sys", MNT_DETACH)
    except OSError as error:
        if error.errno != errno.EINVAL:  # it was not covered
            raise
    write("/proc/sys/user/max_user_namespaces", b"1")
    for name in ("/proc", "/dev", "/"):
        mount(None, name, None, MS_REMOUNT | MS_BIND | MS_RDONLY | MS_NOSUID | (name != "/dev" and MS_NODEV))
    libc("unshare", CLONE_NEWUSER)
    write("self/setgroups", b"deny", proc)
    write("self/uid_map", settings["uid_map"], proc)
    write("self/gid_map", settings["uid_map"], proc)
    return proc


def give_up_rights(program: bytes) -> None:
    """No capability, none to be gained, and the filter of system calls; inherited by everything that
    follows."""
    with open("/proc/sys/kernel/cap_last_cap") as file:
        last = int(file.read())
    for capability in range(last + 1):
        if libc("prctl", PR_CAPBSET_READ, capability, 0, 0, 0):
            libc("prctl", PR_CAPBSET_DROP, capability, 0, 0, 0)
    libc("prctl", PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0)
    libc("capset", struct.pack("<Ii", 0x20080522, 0), bytes(24))
    libc("prctl", PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    libc("prctl", PR_SET_DUMPABLE, 0, 0, 0, 0)
    filter = struct.pack("<HxxxxxxQ", len(program) // 8, address(program))
    libc("prctl", PR_SET_SECCOMP, SECCOMP_MODE_FILTER, filter, 0, 0)


def write(path: str, content: bytes, folder: int | None = None) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT, 0o644, dir_fd=folder)
    write_all(descriptor, content)
    os.close(descriptor)


def write_all(descriptor: int, content: bytes) -> None:
    rest = memoryview(content)
    while rest:
        rest = rest[os.write(descriptor, rest) :]


# ---------------------------------------------------------------------------------------------- files


class ProblemError(Exception):
    """A file that cannot be had; its argument is one of `PROBLEMS`."""


def problem_of(error: OSError) -> str:
    return {
        errno.ENOENT: "missing",
        errno.ELOOP: "symlink",
        errno.ENOTDIR: "not_a_file",
        errno.EISDIR: "not_a_file",
        errno.ENXIO: "not_a_file",
        errno.ETXTBSY: "denied",
        errno.EACCES: "denied",
        errno.EPERM: "denied",
        errno.EROFS: "denied",
        errno.ENOSPC: "no_space",
        errno.EFBIG: "too_large",
        errno.ENAMETOOLONG: "missing",
    }.get(error.errno or 0, "io")


def walk(path: str, make: bool) -> tuple[int, str]:
    """The folder a path lies in and its last name, entered name by name: no symlink is followed anywhere."""
    path = os.path.normpath(os.path.join(HOME, path))
    *folders, name = path.split("/")[1:]
    here = os.open("/", os.O_RDONLY | os.O_DIRECTORY)
    for folder in folders:
        if make:
            try:
                os.mkdir(folder, 0o755, dir_fd=here)
            except FileExistsError:
                pass
        try:
            inner = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=here)
        except NotADirectoryError:
            if stat.S_ISLNK(os.stat(folder, dir_fd=here, follow_symlinks=False).st_mode):
                raise ProblemError("symlink") from None
            raise
        os.close(here)
        here = inner
    if not name:
        raise ProblemError("not_a_file")
    return here, name


def read_file(path: str, limit: int) -> None:
    """A regular file's content on stdout. One that grows under us is cut off by the reader."""
    here, name = walk(path, make=False)
    descriptor = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=here)
    about = os.fstat(descriptor)
    if not stat.S_ISREG(about.st_mode):
        raise ProblemError("not_a_file")
    if about.st_size > limit:
        raise ProblemError("too_large")
    left = limit + 1
    while left and (chunk := os.read(descriptor, min(left, CHUNK))):
        write_all(1, chunk)
        left -= len(chunk)
    if not left:
        raise ProblemError("too_large")


def write_file(path: str, executable: bool) -> None:
    """Stdin into a new file, which then takes the place of what was there."""
    here, name = walk(path, make=True)
    try:
        mode = os.stat(name, dir_fd=here, follow_symlinks=False).st_mode
    except FileNotFoundError:
        pass
    else:
        if not stat.S_ISREG(mode):
            raise ProblemError("symlink" if stat.S_ISLNK(mode) else "not_a_file")
    beside = f".{name[:200]}.{os.getpid()}.new"
    new = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
    descriptor = os.open(beside, new, 0o755 if executable else 0o644, dir_fd=here)
    try:
        while chunk := os.read(0, CHUNK):
            write_all(descriptor, chunk)
        os.rename(beside, name, src_dir_fd=here, dst_dir_fd=here)
    except OSError:
        os.unlink(beside, dir_fd=here)
        raise


def snapshot() -> None:
    import tarfile

    with tarfile.open(fileobj=open(1, "wb", closefd=False), mode="w|", format=tarfile.PAX_FORMAT) as archive:
        for place in WRITABLE:
            archive.add(
                place, filter=lambda entry: entry if not entry.ischr() and not entry.isfifo() else None
            )


def restore() -> None:
    import tarfile

    try:
        with tarfile.open(fileobj=open(0, "rb", closefd=False), mode="r|") as archive:
            for place in WRITABLE:
                empty(place)
            archive.extraction_filter = lambda entry, path: entry  # it can reach no further than this process
            archive.extractall("/")
    except tarfile.TarError:
        raise ProblemError("io") from None


def empty(place: str) -> None:
    """Remove all in a folder, however deep, with two folders open: what lies deeper is moved up first."""
    for attribute in os.listxattr(place):
        os.removexattr(place, attribute)
    os.chmod(place, 0o755)
    names = os.listdir(place)
    count = 0
    while names:
        path = f"{place}/{names.pop()}"
        try:
            os.unlink(path)
            continue
        except IsADirectoryError:
            os.chmod(path, 0o700)
        for inner in os.listdir(path):
            inner = f"{path}/{inner}"
            try:
                os.unlink(inner)
            except IsADirectoryError:
                os.chmod(inner, 0o700)
                count += 1
                while os.path.lexists(f"{place}/.{count}"):
                    count += 1
                os.rename(inner, f"{place}/.{count}")
                names.append(f".{count}")
        os.rmdir(path)
    os.utime(place, (0, 0))


FILES = {"read": read_file, "write": write_file, "snapshot": snapshot, "restore": restore}


# ---------------------------------------------------------------------------------------------- children


def run_python(code: str, arguments: list[str]) -> None:
    """Run source as `python3 -I -c` does, in this process, and end it."""
    sys.argv = ["-c", *arguments]
    main = type(sys)("__main__")
    main.__dict__["__builtins__"] = __builtins__
    sys.modules["__main__"] = main
    status = 0
    try:
        exec(compile(code, "<string>", "exec", dont_inherit=True), main.__dict__)
    except SystemExit as error:
        status = exit_status(error.code)
    except BaseException as error:
        status = 1
        show(error, code)
    if "threading" in sys.modules:
        sys.modules["threading"]._shutdown()
    if "atexit" in sys.modules:
        sys.modules["atexit"]._run_exitfuncs()
    try:
        sys.stdout.flush()
    except (OSError, ValueError):
        status = status or 120  # as Python's own end does
    os._exit(status)


def exit_status(code: object) -> int:
    if code is None:
        return 0
    if isinstance(code, int):
        return code & 0xFF
    print(code, file=sys.stderr)
    return 1


def show(error: BaseException, code: str) -> None:
    """The traceback, without the agent's own frame and with the source's lines."""
    import linecache
    import traceback

    linecache.cache["<string>"] = (len(code), None, code.splitlines(True), "<string>")
    trace = error.__traceback__.tb_next if error.__traceback__ else None
    if sys.excepthook is sys.__excepthook__:
        traceback.print_exception(type(error), error, trace)
    else:
        sys.excepthook(type(error), error, trace)


def prepare_child(proc: int, request: dict[str, Any]) -> None:
    """What holds for every run: standard streams, limits, a session of its own, default signals."""
    os.setsid()
    for number, descriptor in enumerate(request["streams"]):
        os.dup2(descriptor, number)
    libc("prctl", PR_SET_DUMPABLE, 1, 0, 0, 0)
    own = os.open("self/oom_score_adj", os.O_WRONLY, dir_fd=proc)
    os.write(own, b"1000")
    for limit, value in request["rlimits"]:
        hard = resource.getrlimit(limit)[1]
        if hard != resource.RLIM_INFINITY:
            value = min(value, hard)
        # A second passes from the signal that can be caught to the one that cannot.
        grace = limit == resource.RLIMIT_CPU and hard == resource.RLIM_INFINITY
        resource.setrlimit(limit, (value, value + grace))
    for number in (_signal.SIGINT, SIGCHLD):
        _signal.signal(number, SIG_DFL)
    _signal.set_wakeup_fd(-1)
    os.closerange(3, max(proc, own, *request["streams"], 64) + 1)


def start(request: dict[str, Any]) -> NoReturn:
    """Become what was asked for; never returns."""
    kind = request["kind"]
    try:
        os.chdir(request["cwd"])
        if kind == "python":
            for name, value in request["env"].items():
                os.environ[name] = value
            _signal.signal(_signal.SIGINT, _signal.default_int_handler)
            run_python(request["code"], request["argv"])
        elif kind == "exec":
            for number in (_signal.SIGPIPE, _signal.SIGXFSZ):
                _signal.signal(number, SIG_DFL)
            os.execvpe(request["argv"][0], request["argv"], request["env"])
        else:
            operation: Any = FILES[kind]
            operation(*request["argv"])
            os._exit(0)
    except ProblemError as problem:
        os._exit(FIRST_PROBLEM + PROBLEMS.index(problem.args[0]))
    except OSError as error:
        if kind in FILES:
            write_all(2, f"{error}"[:500].encode())
            os._exit(FIRST_PROBLEM + PROBLEMS.index(problem_of(error)))
        lost = error.filename == request["cwd"]
        name = request["cwd"] if lost else request["argv"][0]
        write_all(2, f"cannot start {name}: {error.strerror}\n".encode("utf-8", "replace"))
        os._exit(NOT_FOUND if isinstance(error, FileNotFoundError) and not lost else CANNOT_START)
    finally:
        os._exit(1)


def adopt(request: dict[str, Any]) -> NoReturn:
    """Be the parent of a run and of all that forks away from it, and end as the run ends."""
    libc("prctl", PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    try:
        child = os.fork()
    except OSError as error:
        write_all(2, f"cannot start {request['argv'][0]}: {error.strerror}\n".encode())
        os._exit(CANNOT_START)
    if child == 0:
        start(request)
    os.closerange(0, 3)
    while True:
        pid, status = os.waitpid(-1, 0)
        if pid == child:
            code = os.waitstatus_to_exitcode(status)
            if code >= 0:
                os._exit(code)
            if -code != SIGKILL:
                _signal.signal(-code, SIG_DFL)
            os.kill(os.getpid(), -code)
            os._exit(1)


# ---------------------------------------------------------------------------------------------- process 1


def processes() -> list[tuple[int, int, int]]:
    """(pid, parent, ticks at its start) of every process in the sandbox."""
    found = []
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                with open(f"/proc/{name}/stat", "rb") as file:
                    fields = file.read().rpartition(b")")[2].split()
            except (FileNotFoundError, ProcessLookupError):
                continue
            found.append((int(name), int(fields[1]), int(fields[19])))
    return found


class Agent:
    def __init__(self, connection: _socket.socket, proc: int, settings: dict[str, Any]) -> None:
        self.connection = connection
        self.proc = proc
        self.ephemeral = settings["ephemeral"]
        self.rlimits = settings["rlimits"]
        self.proxy_port = settings["proxy_port"]
        self.runs: dict[int, tuple[int, str]] = {}  # pid -> the run's number, its kind

    def serve(self) -> NoReturn:
        wake, self.wake = os.pipe()
        os.set_blocking(wake, False)
        os.set_blocking(self.wake, False)
        _signal.signal(SIGCHLD, lambda number, frame: None)
        _signal.set_wakeup_fd(self.wake, warn_on_full_buffer=False)
        events = select.poll()
        events.register(self.connection, select.POLLIN)
        events.register(wake, select.POLLIN)
        self.greet()
        if "site" not in sys.modules:  # after the word: the driver has something to do as well
            add_site()
        idle: int | None = 20
        while True:
            ready = events.poll(idle)
            if not ready:
                warm_up()
                idle = None
            for descriptor, _ in ready:
                if descriptor == wake:
                    try:
                        os.read(wake, 4096)
                    except BlockingIOError:
                        pass
                    self.reap()
                else:
                    self.receive()

    def greet(self) -> None:
        """Say that all is ready; where there is a proxy, with a socket that listens here and is served out
        there."""
        if not self.proxy_port:
            self.connection.send(READY)
            return
        listener = _socket.socket(_socket.AF_INET, _socket.SOCK_STREAM)
        listener.bind(("127.0.0.1", self.proxy_port))
        listener.listen(16)
        handed = struct.pack("i", listener.fileno())
        self.connection.sendmsg([READY], [(_socket.SOL_SOCKET, _socket.SCM_RIGHTS, handed)])
        listener.close()

    def receive(self) -> None:
        message, ancillary, _, _ = self.connection.recvmsg(1 << 17, _socket.CMSG_SPACE(16))
        if not message:
            os._exit(0)  # the driver is gone, and everything here goes with process 1
        descriptors = [each for _, _, data in ancillary for each in struct.unpack(f"{len(data) // 4}i", data)]
        kind, number, request = marshal.loads(message)
        if kind == "large":  # the request itself lies in a file
            with open(descriptors.pop(), "rb") as file:
                file.seek(0)
                kind, number, request = marshal.loads(file.read())
        if kind == "ping":
            self.connection.send(PONG)
        elif kind == "kill":
            self.kill(number)
        elif kind == "interrupt":
            self.interrupt(number, request)
        else:
            self.run(kind, number, request, descriptors)
        for descriptor in descriptors:
            os.close(descriptor)

    def run(self, kind: str, number: int, request: dict[str, Any], descriptors: list[int]) -> None:
        if len(descriptors) == 2:  # nothing to read
            descriptors.insert(0, os.open("/dev/null", os.O_RDONLY))
        request.update(kind=kind, streams=descriptors, rlimits=self.rlimits)
        try:
            pid = os.fork()
        except OSError as error:  # background processes of the sandbox use up its limit
            write_all(descriptors[2], f"cannot start another process: {error.strerror}\n".encode())
            self.connection.send(DONE.pack(number, CANNOT_START, 0))
            return
        if pid == 0:
            try:
                prepare_child(self.proc, request)
            except BaseException as error:
                self.connection.send(FAULT + struct.pack("<I", number) + repr(error)[:200].encode())
                os._exit(1)
            try:
                if self.ephemeral or kind in FILES:
                    start(request)
                adopt(request)
            finally:
                os._exit(1)
        self.runs[pid] = (number, kind)

    def kill(self, number: int) -> None:
        for pid, (candidate, _) in self.runs.items():
            if candidate == number:
                if self.ephemeral:
                    os.kill(-1, SIGKILL)
                else:
                    os.kill(pid, SIGKILL)

    def interrupt(self, number: int, since: float) -> None:
        """Kill what a shell has started since then (seconds of CLOCK_BOOTTIME), and leave the shell."""
        parent = next((pid for pid, (candidate, _) in self.runs.items() if candidate == number), None)
        table = processes()
        tree = [each for each in table if each[1] == parent]
        if parent is None or not tree:
            return
        shell = min(tree, key=lambda each: each[2])[0]
        for pid, _, _ in tree:
            tree.extend(each for each in table if each[1] == pid)
        first = int(since * os.sysconf("SC_CLK_TCK"))
        for pid, _, started in tree:
            if pid != shell and started >= first:
                os.kill(pid, SIGKILL)

    def reap(self) -> None:
        """Take note of every child that has ended."""
        while True:
            try:
                pid, status, usage = os.wait4(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            self.ended(pid, status, usage)

    def ended(self, pid: int, status: int, usage: resource.struct_rusage) -> None:
        if pid not in self.runs:
            return
        number, kind = self.runs.pop(pid)
        if kind not in FILES:
            self.clear()
            if self.ephemeral:
                for place in WRITABLE:
                    empty(place)
        cpu = int((usage.ru_utime + usage.ru_stime) * 1e6)
        self.connection.send(DONE.pack(number, os.waitstatus_to_exitcode(status), cpu))

    def clear(self) -> None:
        """End every process that belongs to no run, among them all that the last one left."""
        for _ in range(0 if self.ephemeral else PATIENCE):
            strangers = [pid for pid, above, _ in processes() if above == 1 and pid not in self.runs]
            if not strangers:
                return
            for pid in strangers:
                os.kill(pid, SIGKILL)
            for pid in strangers:
                os.waitpid(pid, 0)
        # In one call, which no fork outruns; in a lasting sandbox it ends the other runs, too.
        while True:
            try:
                pid, status, usage = os.wait4(-1, os.WNOHANG)
                if pid == 0:
                    os.kill(-1, SIGKILL)
                    pid, status, usage = os.wait4(-1, 0)
            except ChildProcessError:
                return
            self.ended(pid, status, usage)


def warm_up() -> None:
    """What runs of Python code need sooner or later, imported while there is nothing else to do."""
    import linecache  # noqa: F401
    import traceback  # noqa: F401

    gc.freeze()


def add_site() -> None:
    """What the interpreter left out at its start: the folders of packages, and `exit`."""
    import site

    site.main()
    gc.freeze()


def open_streams() -> None:
    """Python's standard streams as every run will have them, made once; the descriptors below are
    exchanged."""
    ends = (*os.pipe(), os.open("/dev/null", os.O_RDWR))
    for number, descriptor in enumerate(
        (ends[0], ends[1], ends[1])
    ):  # made on pipes, since nobody can seek in one
        os.dup2(descriptor, number)
    sys.stdin = io.TextIOWrapper(open(0, "rb"), "utf-8", "surrogateescape")
    sys.stdout = io.TextIOWrapper(open(1, "wb"), "utf-8", "surrogateescape")
    sys.stderr = io.TextIOWrapper(open(2, "wb", 0), "utf-8", "backslashreplace", write_through=True)
    for name in ("stdin", "stdout", "stderr"):
        setattr(sys, f"__{name}__", getattr(sys, name))
    for number in range(3):
        os.dup2(ends[2], number)
    for descriptor in ends:
        os.close(descriptor)


def compiled() -> bytes:
    """This file as bytecode of the Python that runs it."""
    with open(__file__, "rb") as file:
        code = compile(file.read(), "<agent>", "exec")
    from _frozen_importlib_external import MAGIC_NUMBER

    return MAGIC_NUMBER + bytes(12) + marshal.dumps(code)


def main() -> None:
    connection = _socket.socket(fileno=int(sys.argv[1]))
    settings = marshal.loads(connection.recv(1 << 17))
    if settings["compile"]:
        connection.send(compiled())
        return
    _signal.signal(_signal.SIGINT, SIG_IGN)
    if settings["finished"]:  # docker did
        proc = os.open("/proc", os.O_RDONLY | os.O_DIRECTORY)
    else:
        proc = finish_sandbox(settings)
    give_up_rights(settings["filter"])
    os.chdir(HOME)
    if settings["preload"]:
        add_site()
    for name in settings["preload"]:
        __import__(name)
    open_streams()
    gc.freeze()
    Agent(connection, proc, settings).serve()


if __name__ == "__main__":
    main()
