"""Helpers for tests with several processes: forking, distributed ranks, exit codes and standard error."""

import functools
import os
import re
import socket
import subprocess
import sys
import traceback
from collections.abc import Callable

from accelerate import PartialState


def start_child(action: Callable[[], object]) -> int:
    """Run an action in a forked process and return its process id."""
    pid = os.fork()
    if pid:
        return pid
    try:
        PartialState._reset_state()
        os._exit(int(action() or 0))
    except BaseException:
        traceback.print_exc()
        os._exit(99)


def run_forked(action: Callable[..., object], *arguments, count: int) -> None:
    """Run `action(number, *arguments)` in `count` forked processes at once.

    Forking avoids importing torch and transformers again, which takes about eight seconds per process.
    """
    children = [start_child(lambda number=number: action(number, *arguments)) for number in range(count)]
    ends = [exit_code(child) for child in children]
    assert ends == [0] * count, f"exit codes {ends}; see standard error"


def exit_code(pid: int) -> int:
    """Wait for a child and return its exit code, or the negative number of the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def forked(action: Callable[[], object]) -> int:
    """Run an action in a forked process, wait for it, and return its exit code or the negative signal number."""

    def run() -> None:
        action()  # its return value is not an exit code

    return exit_code(start_child(run))


def as_rank(number: int, of: int, port: int, action: Callable[[], object]) -> Callable[[], object]:
    """Wrap an action so that it runs as one rank of `accelerate launch --cpu`."""

    def run():
        os.environ.update(
            RANK=str(number),
            WORLD_SIZE=str(of),
            LOCAL_RANK=str(number),
            LOCAL_WORLD_SIZE=str(of),
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=str(port),
            ACCELERATE_USE_CPU="true",
        )
        return action()

    return run


def free_port() -> int:
    """Return an unused port of the local host."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


# Third-party packages that this library or transformers imports.
THIRD_PARTY_IMPORTS = """
import contextlib, importlib
for name in ("torch", "torchvision", "torchao", "timm", "peft", "transformers.trainer", "transformers.pipelines"):
    with contextlib.suppress(ImportError):
        importlib.import_module(name)
"""


def without_third_party_lines(stderr: str) -> list[str]:
    """Return the lines of standard error without those that third-party packages write when imported on their own.

    Importing transformers imports torchao, for which torch logs a deprecation in some versions.
    """
    lines = stderr.splitlines()
    if not any(line != _without_timestamp(line) or "Warning: " in line for line in lines):
        return lines
    return [line for line in lines if _without_timestamp(line) not in _third_party_lines()]


@functools.cache
def _third_party_lines() -> set[str]:
    done = subprocess.run([sys.executable, "-c", THIRD_PARTY_IMPORTS], capture_output=True, text=True, check=True)
    return {_without_timestamp(line) for line in done.stderr.splitlines()} - {""}


def _without_timestamp(line: str) -> str:
    """Remove the time and process id that torch's log puts before a line, such as `W1127 02:37:05.104000 22398 `."""
    return re.sub(r"^[A-Z]\d{4} [\d:.]+ \d+ ", "", line)
