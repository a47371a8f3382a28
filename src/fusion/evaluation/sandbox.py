"""Run a program that a model wrote so that it can harm nothing.

The program gets a process of its own that can read, compute and print, and nothing else: Landlock refuses every write,
removal and rename in the file system; a seccomp filter refuses sockets, new processes, signals to others, and changes
of modes, owners, times or mounts; limits bound its memory, time, output and open files; its environment is empty. No
privilege is needed and none is kept. Where the kernel cannot do this the program is not run (`refusal`).

This file is also the program that puts itself behind those walls and then becomes the other one, so it imports
nothing but the standard library. Landlock: landlock(7); the filter: seccomp(2), classic BPF.
"""

import ctypes
import json
import os
import platform
import resource
import signal
import struct
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

# name: (x86_64, aarch64); −1 where the machine has no such call
REFUSED = {
    "socket": (41, 198), "socketpair": (-1, -1), "fork": (57, -1), "vfork": (58, -1), "kill": (62, 129),
    "tkill": (200, 130), "pidfd_send_signal": (424, 424), "pidfd_open": (434, 434), "rt_sigqueueinfo": (129, 138),
    "ptrace": (101, 117), "process_vm_writev": (311, 271), "chmod": (90, -1), "fchmod": (91, 52),
    "fchmodat": (268, 53), "fchmodat2": (452, 452), "chown": (92, -1), "fchown": (93, 55), "lchown": (94, -1),
    "fchownat": (260, 54), "utime": (132, -1), "utimes": (235, -1), "futimesat": (261, -1), "utimensat": (280, 88),
    "setxattr": (188, 5), "lsetxattr": (189, 6), "fsetxattr": (190, 7), "removexattr": (197, 14),
    "lremovexattr": (198, 15), "fremovexattr": (199, 16), "mount": (165, 40), "umount2": (166, 39),
    "move_mount": (429, 429), "mount_setattr": (442, 442), "open_tree": (428, 428), "fsopen": (430, 430),
    "pivot_root": (155, 41), "chroot": (161, 51), "swapon": (167, 224), "swapoff": (168, 225), "reboot": (169, 142),
    "sethostname": (170, 161), "settimeofday": (164, 170), "clock_settime": (227, 112), "adjtimex": (159, 171),
    "init_module": (175, 105), "finit_module": (313, 273), "delete_module": (176, 106), "kexec_load": (246, 104),
    "bpf": (321, 280), "perf_event_open": (298, 241), "userfaultfd": (323, 282), "io_uring_setup": (425, 425),
    "io_uring_enter": (426, 426), "keyctl": (250, 219), "add_key": (248, 217), "request_key": (249, 218),
    "unshare": (272, 97), "setns": (308, 268), "setpriority": (141, 140), "sched_setaffinity": (203, 122),
    "sched_setscheduler": (144, 119), "sched_setparam": (142, 118), "sched_setattr": (314, 274),
    "shmget": (29, 194), "msgget": (68, 186), "semget": (64, 190), "mq_open": (240, 180), "memfd_create": (319, 279),
    "open_by_handle_at": (304, 265), "name_to_handle_at": (303, 264), "quotactl": (179, 60), "acct": (163, 89),
}  # fmt: skip
CLONE, CLONE3, PRLIMIT, TGKILL = (56, 220), (435, 435), (302, 261), (234, 131)
ARCH = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}
CLONE_THREAD, CLONE_NEWUSER = 0x10000, 0x10000000
LANDLOCK_WRITES = {
    1: 0x1FF2,
    2: 0x2000,
    3: 0x4000,
}  # rights by version: all but read, run
TIME, MEMORY, OUTPUT = 10.0, 1 << 30, 1 << 20


class Verdict(NamedTuple):
    """Whether the program ended with code 0, and a word on how: passed, exit N, signal N, timeout."""

    ok: bool
    how: str
    output: str


def run(
    command: list[str], program: str, suffix: str, *, seconds: float = TIME, memory: int = MEMORY, reserve: bool = True
) -> Verdict:
    """Run `command` on a file that holds `program`.

    Args:
        seconds: of processor time and of the clock; memory: bytes.
        reserve: bound the address space too; False for runtimes that reserve much more than they use (V8).
    """
    with tempfile.TemporaryDirectory(prefix="fusion-") as folder, tempfile.TemporaryFile() as output:
        source = Path(folder) / f"program{suffix}"
        source.write_text(program, encoding="utf-8", errors="replace")
        limits = json.dumps({"seconds": seconds, "memory": memory, "reserve": reserve})
        process = subprocess.Popen(
            [sys.executable, "-I", "-S", __file__, limits, *command, str(source)],
            stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, cwd=folder, start_new_session=True,
            env={"PATH": os.environ.get("PATH", os.defpath), "LANG": "C.UTF-8", "HOME": folder},
        )  # fmt: skip
        try:
            code = process.wait(seconds + 2)
            how = "passed" if code == 0 else f"exit {code}" if code > 0 else f"signal {signal.Signals(-code).name}"
        except subprocess.TimeoutExpired:
            how = "timeout"
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        output.seek(0)
        return Verdict(how == "passed", how, output.read(OUTPUT).decode(errors="replace"))


def refusal() -> str | None:
    """Why programs cannot be run safely on this machine, or None: tried, not guessed."""
    with tempfile.TemporaryDirectory() as folder:
        mark = Path(folder) / "mark"
        tries = (
            f"import os, socket, sys\n"
            f"for act in (lambda: open({str(mark)!r}, 'w'), socket.socket, os.fork, lambda: os.kill(1, 0)):\n"
            f"    try: act()\n"
            f"    except OSError: continue\n"
            f"    sys.exit(3)\n"
        )
        found = run([sys.executable, "-I", "-S"], tries, ".py")
        if found.ok and not mark.exists():
            return None
        lines = found.output.strip().splitlines()
        return lines[-1] if lines else found.how


# --- the other side: runs in the new process -------------------------------------------------------------------------


def _enter(seconds: float, memory: int, reserve: bool) -> None:
    """Put this process behind the walls, for good."""
    libc = ctypes.CDLL(None, use_errno=True)
    if platform.system() != "Linux" or platform.machine() not in ARCH:
        raise OSError(f"no walls for {platform.system()} on {platform.machine()}")
    if os.geteuid() == 0:
        libc.unshare(CLONE_NEWUSER)  # root's privileges stay behind; without them the walls below still stand
    for what, value in {
        resource.RLIMIT_CPU: int(seconds) + 1, resource.RLIMIT_DATA: memory, resource.RLIMIT_FSIZE: OUTPUT,
        resource.RLIMIT_NOFILE: 64, resource.RLIMIT_CORE: 0, resource.RLIMIT_MEMLOCK: 0,
        **({resource.RLIMIT_AS: memory} if reserve else {}),
    }.items():  # fmt: skip
        resource.setrlimit(what, (value, value))
    _check(libc.prctl(38, 1, 0, 0, 0), "no_new_privs")
    _landlock(libc)
    _seccomp(libc)


def _check(result: int, what: str) -> int:
    if result < 0:
        raise OSError(ctypes.get_errno(), f"{what}: {os.strerror(ctypes.get_errno())}")
    return result


def _landlock(libc: ctypes.CDLL) -> None:
    """No write, removal, creation or rename anywhere; no TCP; no signal outside, where the kernel knows these."""
    version = _check(libc.syscall(444, None, ctypes.c_size_t(0), 1), "landlock")
    files = sum(bits for since, bits in LANDLOCK_WRITES.items() if version >= since)
    rights = struct.pack("<QQQ", files, 3 if version >= 4 else 0, 3 if version >= 6 else 0)
    size = 24 if version >= 6 else 16 if version >= 4 else 8
    rules = _check(libc.syscall(444, rights, ctypes.c_size_t(size), 0), "landlock")
    null = os.open("/dev/null", os.O_PATH)
    _check(libc.syscall(445, rules, 1, struct.pack("<Qi", 2, null), 0), "landlock rule")
    os.close(null)
    _check(libc.syscall(446, rules, 0), "landlock")
    os.close(rules)


def _seccomp(libc: ctypes.CDLL) -> None:
    """EPERM for every refused call; threads but no processes; signals and limits for this process only."""
    column, arch = ARCH[platform.machine()]
    load, equal, at_least, some_bit, give = 0x20, 0x15, 0x35, 0x45, 0x06
    kill, allow, refuse, unknown = 0x80000000, 0x7FFF0000, 0x00050001, 0x00050026  # EPERM, ENOSYS
    code = [(load, 0, 0, 4), (equal, 1, 0, arch), (give, 0, 0, kill), (load, 0, 0, 0)]
    if column == 0:
        code += [(at_least, 0, 1, 0x40000000), (give, 0, 0, kill)]  # the x32 numbers
    for numbers in REFUSED.values():
        if numbers[column] >= 0:
            code += [(equal, 0, 1, numbers[column]), (give, 0, 0, refuse)]
    code += [(equal, 0, 1, CLONE3[column]), (give, 0, 0, unknown)]  # its flags cannot be read; libc falls back to clone
    code += [(equal, 0, 4, CLONE[column]), (load, 0, 0, 16), (some_bit, 1, 0, CLONE_THREAD), (give, 0, 0, refuse)]
    code += [(give, 0, 0, allow)]
    code += [(equal, 0, 4, TGKILL[column]), (load, 0, 0, 16), (equal, 1, 0, os.getpid()), (give, 0, 0, refuse)]
    code += [(give, 0, 0, allow)]
    code += [(equal, 0, 5, PRLIMIT[column]), (load, 0, 0, 16), (equal, 2, 0, 0), (equal, 1, 0, os.getpid())]
    code += [(give, 0, 0, refuse), (give, 0, 0, allow)]
    code += [(give, 0, 0, allow)]
    filters = ctypes.create_string_buffer(b"".join(struct.pack("<HBBI", *line) for line in code))
    program = struct.pack("<HxxxxxxQ", len(code), ctypes.addressof(filters))
    _check(libc.prctl(22, 2, program, 0, 0), "seccomp")


if __name__ == "__main__":
    try:
        _enter(**json.loads(sys.argv[1]))
    except Exception as error:
        print(f"the sandbox cannot be closed: {error}")
        sys.exit(125)
    os.execvp(sys.argv[2], sys.argv[2:])
