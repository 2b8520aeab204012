"""Processes of tests: forked, as ranks of one run, killed, and waited for."""

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
    """Run something in a process of its own; its id."""
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
    """
    Run `action(number, *arguments)` in so many processes at once.

    They are forked, which spares them the import of torch and transformers, about eight seconds each.
    """
    children = [start_child(lambda number=number: action(number, *arguments)) for number in range(count)]
    ends = [exit_code(child) for child in children]
    assert ends == [0] * count, f"exit codes {ends}; see standard error"


def exit_code(pid: int) -> int:
    """Exit code of a child, or the negative number of the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def forked(action: Callable[[], object]) -> int:
    """Run something in a process of its own, and wait; 0, its exit code, or minus the signal that ended it."""

    def run() -> None:
        action()  # what it returns is no exit code

    return exit_code(start_child(run))


def as_rank(number: int, of: int, port: int, action: Callable[[], object]) -> Callable[[], object]:
    """The action as one of the processes of `accelerate launch --cpu`."""

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
    """A port that nothing listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


# What this package imports of others, or transformers for it.
IMPORTS_OF_OTHERS = """
import contextlib, importlib
for name in ("torch", "torchvision", "torchao", "timm", "peft", "transformers.trainer", "transformers.pipelines"):
    with contextlib.suppress(ImportError):
        importlib.import_module(name)
"""


def without_lines_of_others(stderr: str) -> list[str]:
    """
    Lines of standard error that other packages do not also write when they are imported without this one.

    With some versions torchao has torch log a deprecation at its import, which transformers starts.
    """
    lines = stderr.splitlines()
    if not any(line != _without_stamp(line) or "Warning: " in line for line in lines):
        return lines
    return [line for line in lines if _without_stamp(line) not in _lines_of_others()]


@functools.cache
def _lines_of_others() -> set[str]:
    done = subprocess.run([sys.executable, "-c", IMPORTS_OF_OTHERS], capture_output=True, text=True, check=True)
    return {_without_stamp(line) for line in done.stderr.splitlines()} - {""}


def _without_stamp(line: str) -> str:
    """A line without the time and process that torch's log puts before it, such as `W1127 02:37:05.104000 22398 `."""
    return re.sub(r"^[A-Z]\d{4} [\d:.]+ \d+ ", "", line)
