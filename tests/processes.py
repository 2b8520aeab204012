"""Processes of tests: forked, as ranks of one run, killed, and waited for."""

import os
import socket
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


def exit_code(pid: int) -> int:
    """Exit code of a child, or the negative number of the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


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
