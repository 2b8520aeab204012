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
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


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
    handle, name = tempfile.mkstemp(prefix=f".{path.stem[:40]}-", suffix=f".part{path.suffix}", dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        # mkstemp creates files that only their owner may read; results get the permissions of ordinary new files.
        mask = os.umask(0)
        os.umask(mask)
        temporary.chmod(0o666 & ~mask)
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
def atomic_folder(path: str | Path) -> Iterator[Path]:
    """
    Yield a temporary folder beside `path`; it gets this name if the block succeeds and is deleted otherwise.

    Raises:
        FileExistsError: there is a file, or a folder that is not empty.
        OSError: the folder cannot be made.
    """
    check_new_folder(path)
    target = Path(path).resolve()
    unfinished = target.with_name(f".{target.name}.{os.getpid()}")
    unfinished.mkdir(parents=True)
    try:
        yield unfinished
        if target.is_dir():
            target.rmdir()
        unfinished.rename(target)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise


__all__ = ["atomic_folder", "atomic_path", "atomic_write", "atomic_write_json", "check_new_folder"]
