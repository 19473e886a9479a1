"""Locks that keep two processes from writing into one folder."""

import errno
from collections.abc import Callable
from pathlib import Path

from filelock import BaseFileLock, FileLock, SoftFileLock

NO_LOCKS = {errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP}
"""What a file system without locks answers, such as some that are mounted over a network."""


def acquire_lock(path: Path, warn: Callable[[str], None], timeout_s: float = 0) -> BaseFileLock:
    """Returns a lock that this process holds until it releases it or ends.

    Where the file system has no locks, the lock is a file that names the process. It outlives a
    process that is killed, until another on the same machine finds that process gone.

    Args:
        path: The file to lock.
        warn: Takes a line of text if the file system has no locks.
        timeout_s: Seconds to wait for another process; less than 0 waits for ever.

    Raises:
        filelock.Timeout: naming the file, if another process holds the lock.
        OSError: if the file cannot be written.
    """
    lock = FileLock(path)
    try:
        lock.acquire(timeout=timeout_s)
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        marker = path.with_name(f"{path.name}.held")
        warn(f"{path.parent}: the file system has no locks ({error.strerror}); {marker} is one")
        lock = SoftFileLock(marker)
        lock.acquire(timeout=timeout_s)
    return lock
