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
"""Atomic writing of files and folders: a killed process or a full disk never leaves a truncated file in place."""

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
    """Return prefix and suffix of the temporary name of `path`; `tempfile` inserts eight random characters."""
    return f".{path.stem[:40]}-", f".part{path.suffix}"


def _default_mode(mode: int) -> int:
    """Apply the umask to the permissions of new files (0o666) or folders (0o777), which `tempfile` restricts."""
    mask = os.umask(0)
    os.umask(mask)
    return mode & ~mask


@contextmanager
def atomic_path(path: str | Path, sync: bool = False) -> Iterator[Path]:
    """Yield a temporary path that replaces `path` if the block succeeds and is deleted otherwise.

    The temporary file is in the folder of `path` and keeps its suffix, because image writers choose their format by
    it. Its name starts with a dot and has `.part` before that suffix, so that leftovers of killed processes are
    recognized.

    Args:
        path: File to write. Its folder must exist.
        sync: Whether to flush the content to disk before the file is replaced, so that it survives a power failure.

    Yields:
        The temporary path.

    Raises:
        OSError: If the folder is missing or not writable, or the disk is full; `path` is unchanged then.
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
    """Write a file atomically.

    Args:
        path: File to write. Its folder must exist.
        content: Content of the file; text is encoded as UTF-8.
        sync: As in `atomic_path`.

    Raises:
        OSError: As in `atomic_path`.
    """
    with atomic_path(path, sync=sync) as temporary:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)


def atomic_write_json(path: str | Path, value: Any, indent: int | None = 2) -> None:
    """Write a value to a JSON file atomically.

    Args:
        path: File to write. Its folder must exist.
        value: JSON-serializable value without NaN and Infinity, which are not valid JSON.
        indent: Number of spaces of indentation; None writes a single line.

    Raises:
        ValueError: If the value contains NaN or Infinity.
        OSError: As in `atomic_path`.
    """
    atomic_write(path, json.dumps(value, indent=indent, ensure_ascii=False, allow_nan=False) + "\n")


def check_new_folder(path: str | Path) -> None:
    """Check that a path does not exist or is an empty folder.

    Raises:
        FileExistsError: If it is a file, or a folder that is not empty.
    """
    path = Path(path)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise FileExistsError(f"{path} already exists: name a new folder")


@contextmanager
def atomic_folder(path: str | Path, overwrite: bool = False) -> Iterator[Path]:
    """Yield a temporary folder that is renamed to `path` if the block succeeds and is deleted otherwise.

    Args:
        path: Folder to create; its parent folders are created too.
        overwrite: Whether to replace an existing folder. If the process is killed between the removal of the old
            folder and the renaming of the new one, neither is at `path`, but never a mixture of both.

    Yields:
        The temporary folder, which is beside `path`.

    Raises:
        FileExistsError: If `path` is a file, or a folder that is not empty and `overwrite` is false.
        OSError: If the folder cannot be created.
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


@contextmanager
def replaced_files(folder: str | Path) -> Iterator[Path]:
    """Yield a temporary folder whose files replace those of `folder` if the block succeeds and are deleted otherwise.

    Other files of `folder` are not changed. Each file is replaced atomically, in the order of the names; a process
    that is killed during the replacements leaves complete files, some of which are new.

    Args:
        folder: Folder to write to, which is created if it does not exist.

    Yields:
        The temporary folder, which is inside `folder`.

    Raises:
        OSError: If the folder cannot be written.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    prefix, suffix = _affixes(folder / "files")
    unfinished = Path(tempfile.mkdtemp(suffix, prefix, folder))
    try:
        yield unfinished
        for path in sorted(unfinished.iterdir()):
            os.replace(path, folder / path.name)
        unfinished.rmdir()
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise


def remove_leftovers(folder: str | Path, target: str | Path | None = None) -> None:
    """Delete temporary files and folders of `atomic_path` and `atomic_folder` left by killed processes.

    The caller must ensure that no other process is writing to the folder.

    Args:
        folder: Folder to search, without its sub-folders. Nothing happens if it does not exist.
        target: Name of a file or folder whose temporary files are deleted. Default: those of all files.
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


__all__ = [
    "atomic_folder",
    "atomic_path",
    "atomic_write",
    "atomic_write_json",
    "check_new_folder",
    "remove_leftovers",
    "replaced_files",
]
