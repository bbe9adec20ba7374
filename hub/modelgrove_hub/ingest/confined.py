"""Take a process's rights away, for good: what it may do afterwards is compute, and use the files it has open.

Linux on x86-64 and arm64 only. Three things are enforced, by the kernel: limits of address space, processor time and
size of written files (setrlimit); a list of system calls (seccomp), in which there is none that opens, makes, renames
or removes a file, none for sockets, and none that starts a process or a program; and death with the parent.
"""

from __future__ import annotations

import ctypes
import os
import platform
import resource
import signal
import struct
import sys

_PR_SET_PDEATHSIG, _PR_SET_NO_NEW_PRIVS = 1, 38
_SET_MODE_FILTER, _ALL_THREADS = 1, 1
_ALLOW, _DENY = 0x7FFF0000, 0x00050001  # SECCOMP_RET_ALLOW; SECCOMP_RET_ERRNO with EPERM
_KILL = 0x80000000
_LOAD, _EQUAL, _AT_LEAST, _RETURN = 0x20, 0x15, 0x35, 0x06
_X32 = 0x40000000
"""Numbers from here on are those of x86-64's second interface: none is allowed."""

_CALLS = {
    # name: number on x86-64 (None: not there), on arm64. After linux/arch/x86/entry/syscalls/syscall_64.tbl and
    # include/uapi/asm-generic/unistd.h.
    "read": (0, 63), "write": (1, 64), "close": (3, 57), "fstat": (5, 80), "newfstatat": (262, 79), "lseek": (8, 62),
    "mmap": (9, 222), "mprotect": (10, 226), "munmap": (11, 215), "brk": (12, 214), "mremap": (25, 216),
    "madvise": (28, 233), "rt_sigaction": (13, 134), "rt_sigprocmask": (14, 135), "rt_sigreturn": (15, 139),
    "sigaltstack": (131, 132), "pread64": (17, 67), "readv": (19, 65), "writev": (20, 66), "sched_yield": (24, 124),
    "getpid": (39, 172), "gettid": (186, 178), "exit": (60, 93), "exit_group": (231, 94), "futex": (202, 98),
    "clock_gettime": (228, 113), "gettimeofday": (96, 169), "getrandom": (318, 278), "restart_syscall": (219, 128),
}  # fmt: skip
_MACHINES = {"x86_64": (0, 0xC000003E, 317), "aarch64": (1, 0xC00000B7, 277)}
"""machine → its column above, AUDIT_ARCH, the number of seccomp(2)."""


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.c_char_p))


def can_confine() -> bool:
    """Whether this machine has what `confine` needs."""
    return sys.platform == "linux" and platform.machine() in _MACHINES


def die_with_parent() -> None:
    """Be killed when the process that started this one ends, however it ends."""
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() == 1:
        sys.exit("the parent is gone already")


def confine(memory: int, seconds: int, written: int) -> None:
    """Limit this process to `memory` more bytes, `seconds` of processor time and files of `written` bytes, and lock it.

    Raises:
        OSError: the kernel refuses one of it; then nothing must be read.
    """
    used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()  # noqa: PTH123, SIM115
    spent = int(sum(resource.getrusage(resource.RUSAGE_SELF)[:2]))
    _limit(resource.RLIMIT_AS, used + memory)
    _limit(resource.RLIMIT_CPU, spent + seconds)
    _limit(resource.RLIMIT_FSIZE, written)
    _limit(resource.RLIMIT_CORE, 0)
    _prctl(_PR_SET_NO_NEW_PRIVS, 1)
    column, architecture, seccomp = _MACHINES[platform.machine()]
    numbers = sorted(call[column] for call in _CALLS.values())
    code = _program(numbers, architecture)
    program = _Program(len(code) // 8, code)
    # For all threads, those of libraries too.
    if ctypes.CDLL(None, use_errno=True).syscall(seccomp, _SET_MODE_FILTER, _ALL_THREADS, ctypes.byref(program)):
        raise OSError(ctypes.get_errno(), "seccomp was refused")


def _limit(what: int, value: int) -> None:
    resource.setrlimit(what, (value, value))


def _program(numbers: list[int], architecture: int) -> bytes:
    """The filter as BPF: the listed calls are allowed, others fail with EPERM; another architecture's kill."""
    steps = [(_LOAD, 0, 0, 4), (_EQUAL, 1, 0, architecture), (_RETURN, 0, 0, _KILL), (_LOAD, 0, 0, 0)]
    steps += [(_AT_LEAST, len(numbers), 0, _X32)]
    for place, number in enumerate(numbers):
        steps += [(_EQUAL, len(numbers) - place, 0, number)]
    steps += [(_RETURN, 0, 0, _DENY), (_RETURN, 0, 0, _ALLOW)]
    return b"".join(struct.pack("=HBBI", *step) for step in steps)


def _prctl(option: int, value: int) -> None:
    if ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0):
        raise OSError(ctypes.get_errno(), f"prctl {option} was refused")
