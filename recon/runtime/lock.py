"""Lets one process at a time write to an output folder."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from recon.errors import ReconError
from recon.runtime.storage import check_writable


@contextlib.contextmanager
def locked(path: Path, what: str, wait: bool = False) -> Iterator[None]:
    """Context in which no other process holds the lock file `path`, which is made, and removed at the end.

    The operating system releases the lock when the process ends, however it ends: a lock file that is left over blocks nobody.

    what: what is protected, for messages, such as "record folder 'results'". wait: until no other process holds the lock.

    Raises `ReconError` where another process holds the lock, and for a folder that cannot be written.
    """
    check_writable(path.parent, what)
    lock = FileLock(path)
    try:
        lock.acquire(timeout=-1 if wait else 0)
    except Timeout:
        raise ReconError(f"{what} is in use by another process; wait until it is done, or choose another place") from None
    try:
        yield
    finally:
        # Removed while the lock is held: a process that opened the file before sees that it is gone, and opens a new one.
        path.unlink(missing_ok=True)
        lock.release()
