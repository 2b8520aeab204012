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
"""Write result files atomically: a kill or a full disk never leaves a truncated file under its final name."""

import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_TEMPORARY_NAME = re.compile(r"\.(?P<stem>.*)-[a-z0-9_]{8}\.part(?P<suffix>\.[^.]*)?")


def _affixes(path: Path) -> tuple[str, str]:
    """Prefix and suffix of the temporary name of `path`, between which `tempfile` puts eight random characters."""
    return f".{path.stem[:40]}-", f".part{path.suffix}"


def _default_mode(mode: int) -> int:
    """Permissions that ordinary new files (0o666) or folders (0o777) get; tempfile's are for their owner alone."""
    mask = os.umask(0)
    os.umask(mask)
    return mode & ~mask


@contextmanager
def atomic_path(path: str | Path, sync: bool = False) -> Iterator[Path]:
    """
    Yield a temporary path in the folder of `path`; it replaces `path` if the block succeeds and is deleted otherwise.

    The temporary file keeps the suffix of `path`, because image writers choose their format by it, and its name starts
    with a dot and ends in `.part` before that suffix, so that a leftover of a killed process is recognized.

    Args:
        path: File to write. Its folder must exist.
        sync: Whether the contents reach the disk before the file is replaced, which survives a power cut too.

    Raises:
        OSError: the folder is missing or not writable, or the disk is full; `path` is then as it was.
    """
    path = Path(path)
    prefix, suffix = _affixes(path)
    handle, name = tempfile.mkstemp(suffix, prefix, path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        temporary.chmod(_default_mode(0o666))
        if sync:
            with temporary.open("rb+") as file:
                os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def atomic_write(path: str | Path, content: str | bytes, sync: bool = False) -> None:
    """
    Write a whole file atomically; text is encoded as UTF-8.

    Args:
        path: File to write. Its folder must exist.
        content: The file's contents.
        sync: As in `atomic_path`.

    Raises:
        OSError: as in `atomic_path`.
    """
    with atomic_path(path, sync=sync) as temporary:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)


def atomic_write_json(path: str | Path, value: Any, indent: int | None = 2) -> None:
    """
    Write a value as a JSON file atomically.

    Args:
        path: File to write. Its folder must exist.
        value: What JSON can hold; NaN and Infinity are refused, since they are not JSON.
        indent: Indentation; None writes one line.

    Raises:
        ValueError: the value holds NaN or Infinity.
        OSError: as in `atomic_path`.
    """
    atomic_write(path, json.dumps(value, indent=indent, ensure_ascii=False, allow_nan=False) + "\n")


def check_new_folder(path: str | Path) -> None:
    """
    Refuse to write where something is.

    Raises:
        FileExistsError: there is a file, or a folder that is not empty.
    """
    path = Path(path)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise FileExistsError(f"{path} is there already: name a new folder")


@contextmanager
def atomic_folder(path: str | Path, overwrite: bool = False) -> Iterator[Path]:
    """
    Yield a temporary folder beside `path`; it gets this name if the block succeeds and is deleted otherwise.

    Args:
        path: Folder to make; the folders above it are made too.
        overwrite: Whether a folder that is there already is replaced. A kill between the removal of the old folder
            and the renaming of the new one leaves no folder of this name, never a mixture.

    Raises:
        FileExistsError: there is a file, or a folder that is not empty and `overwrite` is false.
        OSError: the folder cannot be made.
    """
    target = Path(path).resolve()
    if not overwrite or target.is_file():
        check_new_folder(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    prefix, suffix = _affixes(target)
    unfinished = Path(tempfile.mkdtemp(suffix, prefix, target.parent))
    try:
        unfinished.chmod(_default_mode(0o777))
        yield unfinished
        if target.is_dir():
            shutil.rmtree(target) if overwrite else target.rmdir()
        unfinished.rename(target)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise


def remove_leftovers(folder: str | Path, target: str | Path | None = None) -> None:
    """
    Delete temporary files and folders of `atomic_path` and `atomic_folder` that killed processes left in a folder.

    The caller must know that no other process is writing there.

    Args:
        folder: Where to look, not in its sub-folders. Nothing happens where it does not exist.
        target: Name of a file or folder; only leftovers of its writing are deleted. None deletes all.
    """
    wanted = None if target is None else _affixes(Path(target))
    for path in Path(folder).glob(".*"):
        found = _TEMPORARY_NAME.fullmatch(path.name)
        if found is None or wanted not in (None, (f".{found['stem']}-", f".part{found['suffix'] or ''}")):
            continue
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


__all__ = ["atomic_folder", "atomic_path", "atomic_write", "atomic_write_json", "check_new_folder", "remove_leftovers"]
