"""Entry point of `python -m train` with its messages, signals and exit codes."""

import shlex
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext

from modeling_gkc.cli.common import without_progress_bars
from modeling_gkc.file_checksums import DamagedFileError
from modeling_gkc.label_text import error_line, shortened

from ..storage.locks import lock_output
from . import distil
from .command import Command, format_recipe, is_main_process, parse, print_rank0

FAILED, MISUSED = 1, 2  # exit codes; 128 + the signal's number for a run that was stopped


class _Terminated(KeyboardInterrupt):
    """SIGTERM, handled like Ctrl-C."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run `python -m train`.

    Args:
        argv: Arguments without the program's name; None uses those of the process.

    Returns:
        The exit code: 0 after training, 1 if training had to stop, 2 for a usage error, and 128 plus the number of
        the signal that stopped it.

    Raises:
        SystemExit: The arguments cannot be parsed (code 2), or `--help` was given (code 0).
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    try:
        command = distil.parse_distillation(argv[1:]) if argv[:1] == [distil.NAME] else parse(argv)
        if command.show:
            print_rank0(format_recipe(command))
            return 0
        with _sigterm_as_interrupt(), without_progress_bars():
            return _train(command, argv)
    except KeyboardInterrupt as stop:
        print_rank0("train: stopped.")
        return 128 + (signal.SIGTERM if isinstance(stop, _Terminated) else signal.SIGINT)
    except ValueError as error:
        return print_error(error, MISUSED)


def _train(command: Command, argv: Sequence[str]) -> int:
    """Train while the output folder is locked against other runs."""
    with lock_output(command.out) if is_main_process() else nullcontext():
        return _train_locked(command, argv)


def _train_locked(command: Command, argv: Sequence[str]) -> int:
    """Train and return the exit code; the output folder must be locked."""
    from .checkpoints import is_disk_full
    from .logging import TrainingStopped
    from .run import build_trainer, check_folder, train

    checkpoint = check_folder(command.out, command.recipe, command.resume)
    command.prepare()
    trainer = build_trainer(command.recipe, command.out, report_to=command.report_to)
    try:
        train(trainer, checkpoint)
    except (TrainingStopped, DamagedFileError) as error:
        return print_error(f"{error}\n{resume_hint(command, argv)}", FAILED)
    except ValueError as error:  # not caused by the command line, so the traceback is needed
        raise RuntimeError(str(error)) from error
    except KeyboardInterrupt as stop:
        print_rank0(f"Stopped in step {trainer.state.global_step + 1}. {resume_hint(command, argv)}")
        return 128 + (signal.SIGTERM if isinstance(stop, _Terminated) else signal.SIGINT)
    except Exception as error:
        if not is_disk_full(error):
            raise
        place = f"in step {trainer.state.global_step}: {error_line(error)}"
        return print_error(
            f"The disk is full, nothing more can be written to {command.out} {place}. Free some space first.\n"
            f"{resume_hint(command, argv)}",
            FAILED,
        )
    if summary := command.summarize():
        print_rank0(summary)
    print_rank0(f"The model is in {command.out}:\n  gkc segment photo.jpg --model {shlex.quote(str(command.out))}")
    return 0


@contextmanager
def _sigterm_as_interrupt() -> Iterator[None]:
    """Raise `_Terminated` at SIGTERM within the context."""

    def stop(number: int, frame: object) -> None:
        raise _Terminated

    previous = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def resume_hint(command: Command, argv: Sequence[str]) -> str:
    """Return a message with the command that resumes a stopped run."""
    from .checkpoints import last_complete_checkpoint

    try:
        checkpoint = last_complete_checkpoint(command.out)
    except ValueError:
        return "There is no checkpoint yet: run the same command again to start from the beginning."
    again = shlex.join(["python", "-m", "train", *(part for part in argv if part != "--resume"), "--resume"])
    return f"The last checkpoint is {checkpoint}. Resume with:\n  {again}"


def print_error(error: object, code: int) -> int:
    """Print an error in the main process, and return the exit code."""
    if is_main_process():
        sys.stderr.write(f"python -m train: error: {shortened(str(error))}\n")
    return code
