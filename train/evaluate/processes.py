"""Processes of a distributed evaluation."""

from collections.abc import Callable
from datetime import timedelta
from typing import Any

from accelerate import PartialState
from accelerate.utils import broadcast_object_list, parse_flag_from_env

LONGEST_WAIT = timedelta(days=2)  # timeout of a finished process that waits for the others


def processes(cpu: bool = False) -> PartialState:
    """Initialize the processes of `accelerate launch` or `torchrun`, or this process alone, each with its device."""
    return PartialState(cpu=cpu or parse_flag_from_env("ACCELERATE_USE_CPU"), timeout=LONGEST_WAIT)


def from_main(state: PartialState, make: Callable[[], Any]) -> Any:
    """Call a function in the main process and broadcast its result to all processes.

    Raises:
        ValueError: The function raised ValueError or OSError; all processes raise the same message.
    """
    made, error = None, None
    if state.is_main_process:
        try:
            made = make()
        except (ValueError, OSError) as problem:
            error = str(problem)
    made, error = broadcast_object_list([made, error])
    if error is not None:
        raise ValueError(error)
    return made
