"""One process at a time on an output folder, so that what two of them write cannot mix."""

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

NAME = ".lock"  # of the lock's file in a folder that it protects


@contextlib.contextmanager
def held(path: Path, what: str) -> Iterator[None]:
    """While active, no other process can hold the lock file `path`; it is made, and removed at the end.

    The operating system gives the lock up when its process ends, however that happens: a lock file that was left behind
    stops nobody.

    what: what is protected, for messages, such as "record folder 'results'".

    Raises `ReconError` naming process and host of the holder, or a place that cannot be written.
    """
    check_writable(path.parent, what)
    lock, note = FileLock(path), path.with_name(f"{path.name}.holder")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise ReconError(f"{what} is in use by {_holder(note)}; wait until it is done, or choose another place") from None
    try:
        with contextlib.suppress(OSError):  # a full disk: the lock holds without a note of who has it
            who = {"pid": os.getpid(), "host": socket.gethostname(), "since": datetime.now().isoformat(" ", "seconds")}
            note.write_text(json.dumps(who), encoding="utf-8")
        yield
    finally:
        # Removed while the lock is held. Whoever opened the file before finds that it is gone, and opens a new one.
        try:
            for file in (note, path):
                with contextlib.suppress(OSError):
                    file.unlink()
        finally:  # also where Ctrl-C comes in between
            lock.release()


def _holder(note: Path) -> str:
    try:
        who = json.loads(note.read_text(encoding="utf-8"))
        return f"process {who['pid']} on host {who['host']}, since {who['since']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"
