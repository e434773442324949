"""Which system calls code in a sandbox may make, as a BPF program for the kernel.

A list of what is refused: whatever reaches other processes, the kernel's insides, mounts, namespaces, devices
or memory that no limit counts. Calls newer than the list are refused as if the kernel did not know them, and
so is the other calling convention of the same processor (x32; i386 kills).
"""

from __future__ import annotations

import errno
import platform
import struct

from sandboxes.errors import SandboxUnavailableError

#: name -> (x86_64, aarch64); None where the architecture has no such call.
DENIED: dict[str, tuple[int | None, int | None]] = {
    # other processes
    "ptrace": (101, 117),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "process_madvise": (440, 440),
    "kcmp": (312, 272),
    "pidfd_getfd": (438, 438),
    # keys, programs and queues of the kernel
    "add_key": (248, 217),
    "request_key": (249, 218),
    "keyctl": (250, 219),
    "bpf": (321, 280),
    "io_uring_setup": (425, 425),
    "io_uring_enter": (426, 426),
    "io_uring_register": (427, 427),
    "userfaultfd": (323, 282),
    "perf_event_open": (298, 241),
    "lsm_set_self_attr": (460, 460),
    # mounts and namespaces
    "mount": (165, 40),
    "umount2": (166, 39),
    "pivot_root": (155, 41),
    "chroot": (161, 51),
    "setns": (308, 268),
    "unshare": (272, 97),
    "open_tree": (428, 428),
    "move_mount": (429, 429),
    "fsopen": (430, 430),
    "fsconfig": (431, 431),
    "fsmount": (432, 432),
    "fspick": (433, 433),
    "mount_setattr": (442, 442),
    "statmount": (457, 457),
    "listmount": (458, 458),
    # files behind the back of paths
    "open_by_handle_at": (304, 265),
    "name_to_handle_at": (303, 264),
    "fanotify_init": (300, 262),
    "fanotify_mark": (301, 263),
    # the machine
    "kexec_load": (246, 104),
    "kexec_file_load": (320, 294),
    "init_module": (175, 105),
    "finit_module": (313, 273),
    "delete_module": (176, 106),
    "reboot": (169, 142),
    "acct": (163, 89),
    "syslog": (103, 116),
    "settimeofday": (164, 170),
    "clock_settime": (227, 112),
    "clock_adjtime": (305, 266),
    "adjtimex": (159, 171),
    "sethostname": (170, 161),
    "setdomainname": (171, 162),
    "swapon": (167, 224),
    "swapoff": (168, 225),
    "quotactl": (179, 60),
    "quotactl_fd": (443, 443),
    "vhangup": (153, 58),
    "iopl": (172, None),
    "ioperm": (173, None),
    "modify_ldt": (154, None),
    "uselib": (134, None),
    "nfsservctl": (180, 42),
    "lookup_dcookie": (212, 18),
    "personality": (135, 92),
    # placement of memory, and memory that belongs to no process and no mounted file system
    "mbind": (237, 235),
    "set_mempolicy": (238, 237),
    "set_mempolicy_home_node": (450, 450),
    "migrate_pages": (256, 238),
    "move_pages": (279, 239),
    "vmsplice": (278, 75),
    "memfd_create": (319, 279),
    "memfd_secret": (447, 447),
    "shmget": (29, 194),
    "shmat": (30, 196),
    "shmctl": (31, 195),
    "shmdt": (67, 197),
    "semget": (64, 190),
    "semop": (65, 193),
    "semtimedop": (220, 192),
    "semctl": (66, 191),
    "msgget": (68, 186),
    "msgsnd": (69, 189),
    "msgrcv": (70, 188),
    "msgctl": (71, 187),
    "mq_open": (240, 180),
    "mq_unlink": (241, 181),
    "mq_timedsend": (242, 182),
    "mq_timedreceive": (243, 183),
    "mq_notify": (244, 184),
    "mq_getsetattr": (245, 185),
}
#: The last call this list has judged (mseal). glibc falls back where the kernel says ENOSYS.
NEWEST = 462
#: clone3 keeps its flags in memory, out of a filter's sight; with ENOSYS glibc takes clone.
CLONE3 = (435, 435)
CLONE = (56, 220)
IOCTL = (16, 29)
SOCKET = (41, 198)
#: CLONE_NEWNS, NEWCGROUP, NEWUTS, NEWIPC, NEWUSER, NEWPID, NEWNET.
NEW_NAMESPACES = 0x00020000 | 0x02000000 | 0x04000000 | 0x08000000 | 0x10000000 | 0x20000000 | 0x40000000
#: TIOCSTI types into a terminal, TIOCLINUX pastes into one.
TERMINAL_INPUT = (0x5412, 0x541C)
#: AF_UNIX, AF_INET, AF_INET6, AF_NETLINK. Others reach out of the network namespace (AF_VSOCK) or into the
#: kernel.
SOCKET_FAMILIES = (1, 2, 10, 16)

#: AUDIT_ARCH_*, and the column of the tables above.
ARCHITECTURES = {"x86_64": (0xC000003E, 0), "aarch64": (0xC00000B7, 1)}

_LOAD, _EQUAL, _GREATER, _ANY_BIT, _RETURN = 0x20, 0x15, 0x25, 0x45, 0x06
_NR, _ARCH, _ARG0, _ARG1 = 0, 4, 16, 24  # offsets in struct seccomp_data; arguments: their low words
ALLOW = 0x7FFF0000
KILL = 0x80000000
REFUSE = 0x00050000  # | errno


def program(machine: str | None = None) -> bytes:
    """The filter, as an array of `struct sock_filter`, for a machine as `platform.machine()` names it.

    Raises:
        SandboxUnavailableError: there are no tables for this machine.
    """
    machine = machine or platform.machine()
    if machine not in ARCHITECTURES:
        raise SandboxUnavailableError(
            f"no list of system calls for {machine}: bubblewrap sandboxes run on {', '.join(ARCHITECTURES)}"
        )
    audit, column = ARCHITECTURES[machine]
    code: list[
        tuple[int, int, str | None, str | None]
    ] = []  # instruction, operand, where to if true, if false
    labels: dict[str, int] = {}

    def emit(instruction: int, operand: int, yes: str | None = None, no: str | None = None) -> None:
        code.append((instruction, operand, yes, no))

    def routine(label: str, offset: int, tests: list[tuple[int, int, str]], otherwise: int) -> None:
        labels[label] = len(code)
        emit(_LOAD, offset)
        for test in tests:
            emit(*test)
        emit(_RETURN, otherwise)

    emit(_LOAD, _ARCH)
    emit(_EQUAL, audit, None, "foreign")
    emit(_LOAD, _NR)
    emit(_GREATER, NEWEST, "unknown")
    emit(_EQUAL, CLONE3[column], "unknown")
    for label, call in (("clone", CLONE), ("ioctl", IOCTL), ("socket", SOCKET)):
        emit(_EQUAL, call[column], label)
    for numbers in DENIED.values():
        if (number := numbers[column]) is not None:
            emit(_EQUAL, number, "denied")
    emit(_RETURN, ALLOW)
    routine("clone", _ARG0, [(_ANY_BIT, NEW_NAMESPACES, "denied")], ALLOW)
    routine("ioctl", _ARG1, [(_EQUAL, request, "denied") for request in TERMINAL_INPUT], ALLOW)
    families = [(_EQUAL, family, "allowed") for family in SOCKET_FAMILIES]
    routine("socket", _ARG0, families, REFUSE | errno.EAFNOSUPPORT)
    for label, action in (  # at the end: jumps go forward
        ("allowed", ALLOW),
        ("denied", REFUSE | errno.EPERM),
        ("unknown", REFUSE | errno.ENOSYS),
        ("foreign", KILL),
    ):
        labels[label] = len(code)
        emit(_RETURN, action)
    return b"".join(
        struct.pack(
            "<HBBI",
            instruction,
            labels[yes] - at - 1 if yes else 0,
            labels[no] - at - 1 if no else 0,
            operand,
        )
        for at, (instruction, operand, yes, no) in enumerate(code)
    )
