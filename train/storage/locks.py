"""Lock on an output folder or file that prevents two runs from writing to the same place."""

import os
import shlex
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows, where training runs without this lock
    fcntl = None


class OutputInUseError(ValueError):
    """Error raised when another process is writing to the same output."""


@contextmanager
def lock_output(path: str | Path) -> Iterator[None]:
    """Lock an output folder or file for this process within a `with` block.

    The lock is a file `.NAME.lock` next to the output. The operating system releases it when the process ends, so that
    a killed run does not block the next one.

    Args:
        path: Output folder or file. Its parent folders are created.

    Raises:
        OutputInUseError: If another process holds the lock. The message names the process, its host and its command.
    """
    if fcntl is None:
        yield
        return
    path = Path(path).absolute()
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = path.with_name(f".{path.name}.lock")
    descriptor = _acquire(lock, path)
    try:
        os.ftruncate(descriptor, 0)
        command = shlex.join(["python", *sys.argv])
        started = datetime.now().astimezone().isoformat(sep=" ", timespec="seconds")
        holder = f"process {os.getpid()} on {socket.gethostname()}, since {started}: {command}"
        os.pwrite(descriptor, holder.encode(), 0)
        yield
    finally:
        # Removed before the release, so that a process that opened the old file notices and opens a new one.
        with suppress(OSError):
            lock.unlink()
        os.close(descriptor)


def _acquire(lock: Path, path: Path) -> int:
    """Open and lock the lock file, and return its descriptor."""
    while True:
        descriptor = os.open(lock, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            # `flock` locks would be inherited by forked workers, which may outlive a killed run.
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            holder = os.pread(descriptor, 4096, 0).decode(errors="replace") or "another process"
            os.close(descriptor)
            raise OutputInUseError(
                f"{path} is being written by {holder}. Wait until it is done, or name another output."
            ) from None
        with suppress(FileNotFoundError):
            if os.fstat(descriptor).st_ino == os.stat(lock).st_ino:
                return descriptor
        os.close(descriptor)


__all__ = ["OutputInUseError", "lock_output"]
