"""Processes of a distributed command that share one output folder."""

from collections.abc import Callable
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from modeling_gkc.label_text import error_line

if TYPE_CHECKING:
    from accelerate import PartialState

LONGEST_WAIT = timedelta(days=2)  # timeout of a finished process that waits for the others


def processes(cpu: bool = False) -> "PartialState":
    """Initialize the processes of `accelerate launch` or `torchrun`, or this process alone, each with its device."""
    from accelerate import PartialState  # needs torch, which --help must not need
    from accelerate.utils import parse_flag_from_env

    return PartialState(cpu=cpu or parse_flag_from_env("ACCELERATE_USE_CPU"), timeout=LONGEST_WAIT)


def from_main(state: "PartialState", make: Callable[[], Any]) -> Any:
    """Call a function in the main process and broadcast its result to all processes.

    Raises:
        ValueError: The function raised ValueError or OSError; all processes raise the same message.
    """
    from accelerate.utils import broadcast_object_list

    made, error = None, None
    if state.is_main_process:
        try:
            made = make()
        except OSError as problem:
            error = error_line(problem)
        except ValueError as problem:
            error = str(problem)
    made, error = broadcast_object_list([made, error])
    if error is not None:
        raise ValueError(error)
    return made
