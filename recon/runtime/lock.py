"""Lets one process at a time write to an output folder."""

import contextlib
import json
import os
import socket
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

from filelock import FileLock, Timeout

from recon.errors import ReconError
from recon.runtime.storage import check_writable

NAME = ".lock"  # of the lock file in the folder that it protects


@contextlib.contextmanager
def locked(path: Path, what: str) -> Iterator[None]:
    """Context in which no other process holds the lock file `path`, which is made, and removed at the end.

    The operating system releases the lock when the process ends, however it ends: a lock file that is left over blocks nobody.

    what: what is protected, for messages, such as "record folder 'results'".

    Raises `ReconError` naming the process and host that hold the lock, or a folder that cannot be written.
    """
    check_writable(path.parent, what)
    lock, note = FileLock(path), path.with_name(f"{path.name}.holder")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise ReconError(f"{what} is in use by {_holder(note)}; wait until it is done, or choose another place") from None
    try:
        with contextlib.suppress(OSError):  # on a full disk, there is a lock without a note of who holds it
            who = {"pid": os.getpid(), "host": socket.gethostname(), "since": datetime.now().isoformat(" ", "seconds")}
            note.write_text(json.dumps(who), encoding="utf-8")
        yield
    finally:
        # Removed while the lock is held: a process that opened the file before sees that it is gone, and opens a new one.
        try:
            for file in (note, path):
                with contextlib.suppress(OSError):
                    file.unlink()
        finally:  # also if Ctrl-C interrupts
            lock.release()


def _holder(note: Path) -> str:
    try:
        who = json.loads(note.read_text(encoding="utf-8"))
        return f"process {who['pid']} on host {who['host']}, since {who['since']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"
