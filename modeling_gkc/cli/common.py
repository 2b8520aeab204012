# Copyright 2026 The GKC Authors.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""Functions shared by the `gkc` commands: one-line errors, loading of checkpoints, choice of the device."""

import argparse
import functools
import os
import signal
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..label_text import error_line
from ..prompt_templates import PROMPT_TEMPLATES

if TYPE_CHECKING:
    import torch

    from ..processing_gkc import GKCProcessor
    from ..vocabulary import Vocabulary

MODEL_VARIABLE = "GKC_MODEL"
SHIPPED_MODEL = "gkc-mini"


WORDS_HELP = """\
WORDS are typed, separated by ";" between classes and "," between synonyms; or a packaged vocabulary
(`gkc vocab list`); or a .json, .csv or .txt file.
"""


class UserError(Exception):
    """Error that the user can fix, shown in one line without a traceback."""


def default_model_path() -> Path:
    """Return the folder of the default checkpoint, without network access.

    It is the folder in the environment variable GKC_MODEL; otherwise `hub_card/gkc-mini` beside this package, as in a
    clone; otherwise `share/gkc/gkc-mini` of the Python environment, where the wheel installs it.

    Raises:
        UserError: If GKC_MODEL is not a directory, or no checkpoint was found.
    """
    named = os.environ.get(MODEL_VARIABLE)
    if named:
        if not Path(named).is_dir():
            raise UserError(f"the environment variable {MODEL_VARIABLE} is not a directory: {named}")
        return Path(named)
    package = Path(__file__).resolve().parent.parent
    for folder in (package.parent / "hub_card" / SHIPPED_MODEL, Path(sys.prefix) / "share" / "gkc" / SHIPPED_MODEL):
        if (folder / "config.json").is_file():
            return folder
    raise UserError(f"no checkpoint is installed with this package: give one with --model or {MODEL_VARIABLE}")


def interruptible(program: str, hint: str = "") -> Callable[[Callable[..., int]], Callable[..., int]]:
    """Return a decorator of `main` functions, with which Ctrl-C prints one line and returns exit code 130.

    Args:
        program: Name of the command, which starts the line.
        hint: Sentence on how to continue, which ends the line.

    Returns:
        The decorator.
    """

    def decorate(main: Callable[..., int]) -> Callable[..., int]:
        @functools.wraps(main)
        def interruptible_main(*arguments: Any, **options: Any) -> int:
            try:
                return main(*arguments, **options)
            except KeyboardInterrupt:
                print(f"\n{program}: stopped. {hint}".rstrip(), file=sys.stderr)
                return 128 + signal.SIGINT

        return interruptible_main

    return decorate


def add_parser(
    commands: argparse._SubParsersAction, name: str, summary: str, description: str, examples: str
) -> argparse.ArgumentParser:
    """Add a command whose `--help` ends with the given examples, and return its parser."""
    return commands.add_parser(
        name,
        help=summary,
        description=description,
        epilog=examples,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def positive(text: str) -> int:
    """Parse an integer of at least 1, as the type of a command-line argument."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {text}")
    return value


def non_negative(text: str) -> int:
    """Parse an integer of at least 0, as the type of a command-line argument."""
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"must not be negative, got {text}")
    return value


def output_folder(text: str) -> Path:
    """Parse the path of an output folder, which must not be a file or lie below one, as the type of an argument."""
    path = Path(text)
    for parent in (path, *path.parents):
        if parent.exists() and not parent.is_dir():
            raise argparse.ArgumentTypeError(f"{parent} is not a directory")
    return path


def add_templates_option(parser: argparse.ArgumentParser) -> None:
    """Add the option --templates, whose value `resolve_templates` reads."""
    sets = ", ".join(PROMPT_TEMPLATES)
    templates_help = f"prompt templates for the words: {sets} (default: those of the checkpoint)"
    parser.add_argument("--templates", metavar="SET", help=templates_help)


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """Add the options --model and --device, whose values `load_checkpoint` and `pick_device` read."""
    model_help = f"folder or Hub repository of the checkpoint (default: ${MODEL_VARIABLE}, or the shipped checkpoint)"
    parser.add_argument("--model", metavar="DIR", help=model_help)
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, mps or auto (default: %(default)s)")


def load_checkpoint(path: str | Path) -> tuple[Any, "GKCProcessor"]:
    """Load the model, in evaluation mode, and the processor from a folder or a Hub repository `owner/name`.

    Raises:
        UserError: If the path does not exist or is not a GKC checkpoint.
    """
    from ..checkpoint_loading import load_checkpoint_parts

    is_folder = Path(path).is_dir()
    if not is_folder and (Path(path).is_absolute() or str(path).count("/") != 1 or str(path).startswith(".")):
        raise UserError(f"--model: {path} is not a directory")
    try:
        with without_progress_bars():
            return load_checkpoint_parts(path)
    except ValueError as error:
        raise UserError(f"--model: {path} is not a GKC checkpoint: {error}") from error


def pick_device(name: str) -> "torch.device":
    """Return the device with a name such as cpu, cuda:1 or mps; "auto" is the first GPU, or the CPU without a GPU.

    Raises:
        ValueError: If this machine does not have the device.
        RuntimeError: If torch does not know the name.
    """
    import torch

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"this machine has no device {name}")
    return device


@contextmanager
def without_progress_bars() -> Iterator[None]:
    """Hide transformers' progress bars within the block."""
    from transformers.utils import logging as transformers_logging

    shows_bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shows_bars:
            transformers_logging.enable_progress_bar()


@contextmanager
def user_errors(option: str) -> Iterator[None]:
    """Convert errors within the block to a `UserError` that names the option."""
    try:
        yield
    except (ValueError, TypeError, RuntimeError, OSError) as error:
        raise UserError(f"{option}: {error_line(error)}") from error


def parse_vocabulary(option: str, text: str | None) -> "Vocabulary | None":
    """Parse the vocabulary of an option, if it is given; warnings and errors name the option."""
    from ..vocabulary import Vocabulary

    if text is None:
        return None
    with user_errors(option), warnings_as_lines():
        return Vocabulary.parse(text)


@contextmanager
def warnings_as_lines(program: str = "gkc") -> Iterator[None]:
    """Collect user warnings within the block, and print each as one line to the error stream after it."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        yield
    for warning in caught:
        print(f"{program}: warning: {warning.message}", file=sys.stderr)


__all__ = [
    "MODEL_VARIABLE",
    "WORDS_HELP",
    "UserError",
    "add_model_options",
    "add_parser",
    "add_templates_option",
    "default_model_path",
    "interruptible",
    "load_checkpoint",
    "non_negative",
    "output_folder",
    "parse_vocabulary",
    "pick_device",
    "positive",
    "user_errors",
    "warnings_as_lines",
    "without_progress_bars",
]
