"""Owns how programs are started that must not outlive this process: as whom, where, and tied to its life."""

import os
import sys
from dataclasses import dataclass
from pathlib import Path

NOBODY = 65534
# With these the launcher ends when it could not become whom, or go where, it should.
NO_IDENTITY, NO_DIRECTORY = 81, 82

# Runs between us and the program, in place of preexec_fn, which would run Python (and gRPC's fork handlers) in a copy
# of a process with threads. The order matters: a change of credentials clears the death signal, so the signal comes
# after it; and an owner that died before that is noticed by the changed parent.
_LAUNCHER = f"""
import ctypes, os, signal, sys
mode, owner, uid, gid, directory, *command = sys.argv[1:]
libc = ctypes.CDLL(None, use_errno=True)
signal.pthread_sigmask(signal.SIG_SETMASK, [])
signal.signal(signal.SIGINT, signal.SIG_DFL)
try:
    if mode == "drop":
        os.setgroups([])
        os.setgid(int(gid))
        os.setuid(int(uid))
    elif mode == "map":
        uid_map, gid_map = f"{{uid}} {{os.geteuid()}} 1", f"{{gid}} {{os.getegid()}} 1"
        if libc.unshare(0x10000000):  # CLONE_NEWUSER
            raise OSError(ctypes.get_errno(), "no user namespace: " + os.strerror(ctypes.get_errno()))
        for name, text in ("setgroups", "deny"), ("uid_map", uid_map), ("gid_map", gid_map):
            with open("/proc/self/" + name, "w") as file:
                file.write(text)
except OSError as error:
    print(error, file=sys.stderr)
    sys.exit({NO_IDENTITY})
if sys.platform == "linux":
    libc.prctl(1, int(signal.SIGINT))  # PR_SET_PDEATHSIG
    if os.getppid() != int(owner):
        sys.exit("the owner is gone")
try:
    os.chdir(directory)
except OSError as error:
    print(error, file=sys.stderr)
    sys.exit({NO_DIRECTORY})
try:
    os.execv(command[0], command)
except OSError as error:
    sys.exit(f"{{command[0]}}: {{error}}")
"""


@dataclass(frozen=True)
class Identity:
    """Who a program runs as: ourselves (`keep`), another uid (`drop`), or ourselves in a namespace as a uid (`map`)."""

    mode: str
    uid: int = NOBODY
    gid: int = NOBODY

    def command(self, directory: Path, *command: str | Path) -> list[str]:
        """The command line that runs `command` in `directory` as this identity, tied to the forking thread's life."""
        place = [self.mode, str(os.getpid()), str(self.uid), str(self.gid), str(directory)]
        return [sys.executable, "-I", "-S", "-c", _LAUNCHER, *place, *map(str, command)]

    def own(self, path: Path) -> Path:
        """Hand over a path that we have just made; other paths are nobody's business."""
        if self.mode == "drop":
            os.chown(path, self.uid, self.gid)
        return path
