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
"""Checks of what was typed that need no torch, made before a command's own module is imported."""

import argparse
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..atomic_files import check_new_folder
from .common import UserError, error_line, user_errors

IMAGE_SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}
OUTPUT_SUFFIXES = (".overlay.png", ".labels.png")
MAX_LISTED_NAMES = 5


def check_segment(arguments: argparse.Namespace) -> None:
    """
    Check the options of `gkc segment` against each other, and find its images, which become `arguments.found`.

    Raises:
        UserError: options do not fit each other, or as `find_images`.
    """
    if arguments.task == "semantic" and arguments.threshold is not None:
        raise UserError("--threshold is for --task instance and panoptic; a semantic map has --void-threshold")
    if arguments.templates and arguments.labels is None and arguments.void_labels is None:
        raise UserError("--templates is for typed words: give --labels, or give it to `gkc embed`")
    arguments.found = find_images(arguments.images, arguments.recursive, Path(arguments.out))


def check_new_output(arguments: argparse.Namespace) -> None:
    """
    Refuse to write where something is.

    Raises:
        UserError: --out names a file, or a folder that is not empty.
    """
    with user_errors("--out"):
        check_new_folder(arguments.out)


@dataclass(frozen=True)
class FoundImage:
    """
    An image to segment.

    Args:
        path: Its file.
        name: Name of its results below the output folder, without their endings: the file's name without its ending,
            below the sub-folder that it was found in.
    """

    path: Path
    name: Path


def find_images(
    inputs: Sequence[str], recursive: bool = False, out: Path | None = None
) -> tuple[list[FoundImage], list[str]]:
    """
    List the images that the command line names, in order and each once.

    Args:
        inputs: Files, taken as they are, and folders, of which all pictures are taken in the order of their names, but
            not hidden ones and not the command's own results.
        recursive: Also take the pictures of the folders' sub-folders.
        out: Folder of the results, which is not searched.

    Returns:
        The images, and lines that say what of the folders is not looked at.

    Raises:
        UserError: a folder has no pictures, nothing that is named is there, or two images would have one name.
    """
    if not any(map(os.path.exists, inputs)):
        raise UserError(f"IMAGE: There is no file or folder {inputs[0]}")
    images: dict[Path, FoundImage] = {}
    left_out: list[str] = []
    for given in map(Path, inputs):
        found = _search(given, recursive, out, left_out) if given.is_dir() else [given]
        for path in found:
            below = path.relative_to(given) if given.is_dir() else Path(path.name)
            images.setdefault(path.resolve(), FoundImage(path, below.with_suffix("")))
    _refuse_equal_names(images.values())
    return list(images.values()), left_out


def _search(folder: Path, recursive: bool, out: Path | None, left_out: list[str]) -> list[Path]:
    """The pictures of a folder; what else is there is added to `left_out`."""
    pictures, folders, others = [], [], []
    walk = os.walk(folder, followlinks=True, onerror=_refuse_unreadable)
    for place, below, files in walk:
        below[:] = sorted(
            name for name in below if not name.startswith(".") and not (out and _is_same(Path(place, name), out))
        )
        for path in (Path(place, name) for name in sorted(files) if not name.startswith(".")):
            if path.suffix.lower() in IMAGE_SUFFIXES and not path.name.endswith(OUTPUT_SUFFIXES):
                pictures.append(path)
            elif not _is_result(path):
                others.append(path)
        if not recursive:
            folders = [Path(place, name) for name in below]
            break
    if not pictures:
        hint = "; --recursive also looks into its sub-folders" if folders else ""
        raise UserError(f"no pictures in the folder {folder}{hint}")
    left_out += _describe_left_out(folder, folders, "sub-folders (--recursive looks into them)")
    left_out += _describe_left_out(folder, others, f"files that do not end in {', '.join(sorted(IMAGE_SUFFIXES))}")
    return pictures


def _refuse_unreadable(error: OSError) -> None:
    raise UserError(f"IMAGE: {error_line(error)}") from error


def _is_same(folder: Path, other: Path) -> bool:
    return other.exists() and folder.samefile(other)


def _is_result(path: Path) -> bool:
    if path.name.endswith(OUTPUT_SUFFIXES):
        return True
    return path.suffix == ".json" and Path(f"{path.with_suffix('')}{OUTPUT_SUFFIXES[0]}").exists()


def _describe_left_out(folder: Path, paths: list[Path], kind: str) -> list[str]:
    if paths:
        names = ", ".join(str(path.relative_to(folder)) for path in paths[:MAX_LISTED_NAMES])
        more = f" and {len(paths) - MAX_LISTED_NAMES} more" if len(paths) > MAX_LISTED_NAMES else ""
        return [f"{folder}: not looked at: {len(paths)} {kind}: {names}{more}"]
    return []


def _refuse_equal_names(images: Iterable[FoundImage]) -> None:
    """Results are named by their own image alone, so two images of one name cannot share an output folder."""
    first: dict[str, FoundImage] = {}
    for image in images:
        other = first.setdefault(str(image.name).casefold(), image)
        if other is not image:
            raise UserError(
                f"IMAGE: {other.path} and {image.path} would both be written as {image.name}{OUTPUT_SUFFIXES[0]}: "
                "segment them with different --out, or name the folder above both with --recursive"
            )


__all__ = ["OUTPUT_SUFFIXES", "FoundImage", "check_new_output", "check_segment", "find_images"]
