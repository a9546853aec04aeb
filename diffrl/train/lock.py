"""One writer per folder: a lock that the kernel releases when its process dies, however it dies."""

import fcntl
import os
import socket

LOCK = ".lock"


def claim(folder):
    """The open file that holds the lock on `folder` until it is closed.

    A file system that knows no locks, or cannot be written, counts as free: what else it refuses will say so.

    Raises:
        BlockingIOError: another run has it; its text says which.
    """
    try:
        file = open(folder / LOCK, "a+")  # noqa: SIM115 - it stays open
    except OSError:
        return None
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
    except BlockingIOError:
        file.seek(0)
        with file:
            raise BlockingIOError(file.read() or "another process") from None
    except OSError:  # no locks here, or no room for the name
        pass
    return file
