"""The filter as a program: interpreted here as the kernel would, call by call. What it does is in
attacks.py."""

from __future__ import annotations

import errno
import re
import struct
from pathlib import Path

import pytest

from sandboxes.bubblewrap import seccomp

MACHINES = list(seccomp.ARCHITECTURES)


def verdict(machine: str, number: int, *arguments: int, arch: int | None = None) -> int:
    """What the filter says to a call: a small interpreter of the instructions it uses."""
    audit, _ = seccomp.ARCHITECTURES[machine]
    words = (*arguments, 0, 0, 0, 0, 0, 0)[:6]
    data = struct.pack("<IIQ6Q", number & 0xFFFFFFFF, audit if arch is None else arch, 0, *words)
    program = list(struct.iter_unpack("<HBBI", seccomp.program(machine)))
    at = accumulator = 0
    while True:
        instruction, yes, no, operand = program[at]
        at += 1
        if instruction == 0x20:
            (accumulator,) = struct.unpack_from("<I", data, operand)
        elif instruction == 0x06:
            return operand
        else:
            taken = {
                0x15: accumulator == operand,
                0x25: accumulator > operand,
                0x45: bool(accumulator & operand),
            }[instruction]
            at += yes if taken else no


@pytest.mark.parametrize("machine", MACHINES)
def test_every_call_is_judged(machine):
    column = seccomp.ARCHITECTURES[machine][1]
    denied = {numbers[column] for numbers in seccomp.DENIED.values()} - {None}
    judged_by_arguments = {seccomp.CLONE[column], seccomp.IOCTL[column], seccomp.SOCKET[column]}
    for number in range(1100):
        if number in judged_by_arguments:
            continue
        expected = seccomp.ALLOW
        if number > seccomp.NEWEST or number == seccomp.CLONE3[column]:
            expected = seccomp.REFUSE | errno.ENOSYS
        elif number in denied:
            expected = seccomp.REFUSE | errno.EPERM
        assert verdict(machine, number) == expected, number


@pytest.mark.parametrize("machine", MACHINES)
def test_calls_that_are_judged_by_their_arguments(machine):
    column = seccomp.ARCHITECTURES[machine][1]
    clone, ioctl, socket = (each[column] for each in (seccomp.CLONE, seccomp.IOCTL, seccomp.SOCKET))
    fork, thread = 0x01200011, 0x003D0F00
    assert verdict(machine, clone, fork) == verdict(machine, clone, thread) == seccomp.ALLOW
    for bit in (17, 25, 26, 27, 28, 29, 30):
        assert verdict(machine, clone, fork | 1 << bit) == seccomp.REFUSE | errno.EPERM
    assert verdict(machine, ioctl, 0, 0x5401) == seccomp.ALLOW
    assert verdict(machine, ioctl, 0, 0x5412) == seccomp.REFUSE | errno.EPERM
    # The kernel reads the lower half of such an argument alone, and so must the filter.
    assert verdict(machine, ioctl, 0, 0xFFFF_FFFF_0000_5412) == seccomp.REFUSE | errno.EPERM
    assert [family for family in range(50) if verdict(machine, socket, family) == seccomp.ALLOW] == [
        1,
        2,
        10,
        16,
    ]


@pytest.mark.parametrize("machine", MACHINES)
def test_other_calling_conventions(machine):
    i386, arm = 0x40000003, 0x40000028
    for arch in (i386, arm):
        assert verdict(machine, 20, arch=arch) == seccomp.KILL
    x32 = 0x40000000
    assert verdict(machine, x32 | 39) == seccomp.REFUSE | errno.ENOSYS
    assert verdict(machine, -1) == seccomp.REFUSE | errno.ENOSYS


@pytest.mark.parametrize(
    ("header", "column"),
    [("/usr/include/x86_64-linux-gnu/asm/unistd_64.h", 0), ("/usr/include/asm-generic/unistd.h", 1)],
    ids=MACHINES,
)
def test_numbers_are_those_of_the_kernels_headers(header, column):
    if not Path(header).exists():
        pytest.skip(f"{header} (linux-libc-dev) is not installed")
    lines = re.findall(r"^#define __NR(?:3264)?_(\w+)\s+(\d+)\s*$", Path(header).read_text(), re.MULTILINE)
    numbers = {name: int(number) for name, number in lines}
    table = {**seccomp.DENIED, "clone": seccomp.CLONE, "clone3": seccomp.CLONE3, "ioctl": seccomp.IOCTL}
    table["socket"] = seccomp.SOCKET
    for name, ours in table.items():
        if name in numbers:  # a header may be older than a call
            assert ours[column] == numbers[name], name
    assert sum(name in numbers for name in table) > 70
