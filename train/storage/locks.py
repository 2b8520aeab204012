"""A lock on an output folder or file, so that two runs never write into one place."""

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
except ImportError:  # Windows, where the workshop runs without this lock
    fcntl = None


class OutputInUseError(ValueError):
    """Another process is writing into the same output."""


@contextmanager
def lock_output(path: str | Path) -> Iterator[None]:
    """
    Hold an output folder or file for this process while the block runs.

    The lock is a file `.NAME.lock` beside the output. The operating system releases it when the process ends, however
    it ends, so that a killed run never blocks the next one.

    Args:
        path: Output folder or file; its parent folders are made.

    Raises:
        OutputInUseError: another process holds it; the message names that process, its computer and its command.
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
        # Removed before it is released: whoever waits for the old file finds that it is gone and takes a new one.
        with suppress(OSError):
            lock.unlink()
        os.close(descriptor)


def _acquire(lock: Path, path: Path) -> int:
    """Descriptor of the lock file, locked."""
    while True:
        descriptor = os.open(lock, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            # Not `flock`: its locks go on in forked workers, which may outlive a killed run.
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
