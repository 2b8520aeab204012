"""The processes of an `accelerate launch`, or the one that is there."""

from collections.abc import Callable
from datetime import timedelta
from typing import Any

from accelerate import PartialState
from accelerate.utils import broadcast_object_list, parse_flag_from_env

LONGEST_WAIT = timedelta(days=2)  # of a process that is done for those that are not


def processes(cpu: bool = False) -> PartialState:
    """Those of an `accelerate launch` or `torchrun`, or this one alone; a device for each."""
    return PartialState(cpu=cpu or parse_flag_from_env("ACCELERATE_USE_CPU"), timeout=LONGEST_WAIT)


def from_main(state: PartialState, make: Callable[[], Any]) -> Any:
    """
    What the main process makes, in all processes.

    Raises:
        ValueError: in all processes, where the main process could not make it.
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
