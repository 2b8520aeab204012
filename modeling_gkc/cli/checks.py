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
"""Checks of command-line arguments before a command is imported, so that errors appear without importing torch."""

import argparse
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..atomic_files import check_new_folder
from ..label_text import error_line
from .common import UserError, user_errors

IMAGE_SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}
OUTPUT_SUFFIXES = (".overlay.png", ".labels.png")
MAX_LISTED_NAMES = 5


def check_segment(arguments: argparse.Namespace) -> None:
    """Check the options of `gkc segment`, and store the result of `find_images` as `arguments.found`.

    Raises:
        UserError: If options contradict each other, or as in `find_images`.
    """
    if arguments.task == "semantic" and arguments.threshold is not None:
        raise UserError("--threshold needs --task instance or panoptic; for semantic maps use --void-threshold")
    if arguments.templates and arguments.labels is None and arguments.void_labels is None:
        raise UserError("--templates needs --labels; for encoded vocabularies give it to `gkc embed`")
    arguments.found = find_images(arguments.images, arguments.recursive, Path(arguments.out))


def check_new_output(arguments: argparse.Namespace) -> None:
    """Check that --out does not exist or is an empty folder.

    Raises:
        UserError: If --out is a file or a folder that is not empty.
    """
    with user_errors("--out"):
        check_new_folder(arguments.out)


@dataclass(frozen=True)
class FoundImage:
    """Image file to segment.

    Args:
        path: Path of the image file.
        name: Path of the result files relative to the output folder, without suffix. It is the path of the image
            relative to the folder that was searched.
    """

    path: Path
    name: Path


def find_images(
    inputs: Sequence[str], recursive: bool = False, out: Path | None = None
) -> tuple[list[FoundImage], list[str]]:
    """List the images given on the command line, in order and without duplicates.

    Args:
        inputs: Image files and folders. Folders are searched in the order of file names, without hidden files and
            results of this command.
        recursive: Whether to search sub-folders.
        out: Output folder, which is not searched.

    Returns:
        The images, and one line of text for each kind of skipped files.

    Raises:
        UserError: If a folder contains no images, an input is a URL, no input exists, or two images would have the
            same result files.
    """
    for given in inputs:
        if given.lower().startswith(("http://", "https://", "ftp://", "file://", "data:")) and not os.path.exists(
            given
        ):
            raise UserError(f"IMAGE: {given[:200]} is a URL: give a file, and download an image on the web first")
    if not any(map(os.path.exists, inputs)):
        raise UserError(f"IMAGE: {inputs[0]} does not exist")
    images: dict[Path, FoundImage] = {}
    skipped: list[str] = []
    for given in map(Path, inputs):
        found = _search_folder(given, recursive, out, skipped) if given.is_dir() else [given]
        for path in found:
            below = path.relative_to(given) if given.is_dir() else Path(path.name)
            images.setdefault(path.resolve(), FoundImage(path, below.with_suffix("")))
    _check_distinct_names(images.values())
    return list(images.values()), skipped


def _search_folder(folder: Path, recursive: bool, out: Path | None, skipped: list[str]) -> list[Path]:
    """Return the images in a folder, and append a line for each kind of other files to `skipped`."""
    images, subfolders, others = [], [], []
    for root, folder_names, file_names in os.walk(folder, followlinks=True, onerror=_raise_user_error):
        folder_names[:] = sorted(
            name for name in folder_names if not name.startswith(".") and not (out and _is_same(Path(root, name), out))
        )
        for path in (Path(root, name) for name in sorted(file_names) if not name.startswith(".")):
            if path.suffix.lower() in IMAGE_SUFFIXES and not path.name.endswith(OUTPUT_SUFFIXES):
                images.append(path)
            elif not _is_result(path):
                others.append(path)
        if not recursive:
            subfolders = [Path(root, name) for name in folder_names]
            break
    if not images:
        hint = "; use --recursive to include its sub-folders" if subfolders else ""
        raise UserError(f"{folder} contains no images{hint}")
    skipped += _describe_skipped(folder, subfolders, "sub-folders (use --recursive to include them)")
    skipped += _describe_skipped(folder, others, f"files without a suffix of {', '.join(sorted(IMAGE_SUFFIXES))}")
    return images


def _raise_user_error(error: OSError) -> None:
    """Raise an error of `os.walk` as a `UserError`."""
    raise UserError(f"IMAGE: {error_line(error)}") from error


def _is_same(folder: Path, other: Path) -> bool:
    return other.exists() and folder.samefile(other)


def _is_result(path: Path) -> bool:
    """Return whether `gkc segment` wrote a file."""
    if path.name.endswith(OUTPUT_SUFFIXES):
        return True
    return path.suffix == ".json" and Path(f"{path.with_suffix('')}{OUTPUT_SUFFIXES[0]}").exists()


def _describe_skipped(folder: Path, paths: list[Path], kind: str) -> list[str]:
    """Return one line that names the first skipped paths of a kind, or no line if there are none."""
    if paths:
        names = ", ".join(str(path.relative_to(folder)) for path in paths[:MAX_LISTED_NAMES])
        more = f" and {len(paths) - MAX_LISTED_NAMES} more" if len(paths) > MAX_LISTED_NAMES else ""
        return [f"{folder}: skipped {len(paths)} {kind}: {names}{more}"]
    return []


def _check_distinct_names(images: Iterable[FoundImage]) -> None:
    """Check that no two images have the same result files."""
    first: dict[str, FoundImage] = {}
    for image in images:
        other = first.setdefault(str(image.name).casefold(), image)
        if other is not image:
            in_one_folder = other.path.resolve().parent == image.path.resolve().parent
            advice = "rename one of them" if in_one_folder else "give their common parent folder with --recursive"
            raise UserError(
                f"IMAGE: {other.path} and {image.path} would both be written as {image.name}{OUTPUT_SUFFIXES[0]}: "
                f"segment them with different --out folders, or {advice}"
            )


__all__ = ["OUTPUT_SUFFIXES", "FoundImage", "check_new_output", "check_segment", "find_images"]
