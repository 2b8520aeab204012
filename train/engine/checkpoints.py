"""Crash-safe checkpoints: a checkpoint counts from the moment its manifest is written.

A checkpoint is a folder `checkpoint-<step>` as transformers' Trainer writes it. `write_manifest` writes, last and
atomically, a manifest of its files with their sizes and checksums. A folder whose manifest is missing or does not fit
is half written or half deleted, and is skipped when a run is resumed. A checkpoint whose files have the right sizes
but wrong checksums was damaged later: an error names it before anything is read from it. `crash_safe_checkpoint` keeps
the order: the manifest of a new checkpoint is written before an old checkpoint is deleted.
"""

import errno
import os
import shlex
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from modeling_gkc.file_checksums import DamagedFileError

from ..storage.checksums import (
    FILES,
    describe_files,
    read_checksummed_json,
    read_json,
    require_files,
    write_checksummed_json,
)

MANIFEST_NAME = "checkpoint_manifest.json"
_SHAPE = {"files": FILES}


def _restore_to_indexed_cpu(storage: torch.UntypedStorage, location: str) -> torch.UntypedStorage | None:
    """Restore a storage whose location is an indexed CPU ("cpu:0") as if it were plain "cpu"."""
    return storage if location.startswith("cpu:") else None


# The Trainer of transformers 5.17 restores the optimizer state of several CPU processes to the device "cpu:0" of
# accelerate, which torch cannot do by itself.
torch.serialization.register_package(12, lambda storage: None, _restore_to_indexed_cpu)


def write_manifest(folder: str | Path) -> None:
    """Flush a checkpoint's files to the disk, then write its manifest atomically."""
    folder = Path(folder)
    paths = [path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST_NAME]
    for path in paths:
        _flush(path)
    write_checksummed_json(folder / MANIFEST_NAME, {"files": describe_files(folder, paths)}, sync=True)
    _flush(folder)
    _flush(folder.parent)


def _flush(path: Path) -> None:
    """Wait until a file, or the entries of a directory, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def is_complete(folder: str | Path) -> bool:
    """Return whether a checkpoint has a manifest and all files that it lists, in their sizes."""
    folder = Path(folder)
    try:
        files = _read_manifest(folder)
        return all((folder / name).stat().st_size == file["bytes"] for name, file in files.items())
    except (OSError, DamagedFileError):
        return False


def _read_manifest(folder: Path) -> dict[str, dict[str, Any]]:
    """Return bytes and checksum of each file by its name; manifests of older versions contain only sizes."""
    path, remedy = folder / MANIFEST_NAME, _remedy(folder)
    content = read_json(path, remedy)
    sizes = content["files"] if isinstance(content, dict) and content.keys() == {"files"} else None
    if isinstance(sizes, dict) and all(type(size) is int for size in sizes.values()):
        return {name: {"bytes": size} for name, size in sizes.items()}
    return read_checksummed_json(path, _SHAPE, remedy)["files"]


def _remedy(folder: Path) -> str:
    """Return the instruction for a damaged checkpoint."""
    return f"delete {folder} (`rm -r {shlex.quote(str(folder))}`) to resume from the checkpoint before it."


def verify_checkpoint(folder: str | Path) -> Path:
    """Compare all files of a complete checkpoint with their checksums.

    Args:
        folder: Folder of the checkpoint.

    Returns:
        The folder.

    Raises:
        DamagedFileError: The content of a file has changed; the message names the first one.
    """
    folder = Path(folder)
    files = {name: file for name, file in _read_manifest(folder).items() if "xxh3" in file}
    require_files(folder, files, _remedy(folder))
    return folder


def checkpoints(output_dir: str | Path) -> list[Path]:
    """Return the folders of all checkpoints, complete or not, in ascending order of their steps."""
    prefix = f"{PREFIX_CHECKPOINT_DIR}-"
    folders = [path for path in Path(output_dir).glob(f"{prefix}*") if path.name.removeprefix(prefix).isdigit()]
    return sorted(folders, key=lambda path: int(path.name.removeprefix(prefix)))


def last_complete_checkpoint(output_dir: str | Path) -> Path:
    """Return the complete checkpoint of the most steps.

    Raises:
        ValueError: There is no complete checkpoint.
    """
    for path in reversed(checkpoints(output_dir)):
        if is_complete(path):
            return path
    raise ValueError(f"There is no complete checkpoint in {output_dir}; train without `resume_from_checkpoint`.")


def delete_checkpoint(folder: Path) -> None:
    """Delete a checkpoint, its manifest first, so that it stops counting as complete at once."""
    (folder / MANIFEST_NAME).unlink(missing_ok=True)
    shutil.rmtree(folder)


def rotate(output_dir: str | Path, limit: int | None, best: str | Path | None = None) -> None:
    """Delete old checkpoints: keep the newest `limit` complete ones and the best, and delete older incomplete ones.

    An incomplete folder of more steps than the newest complete one is not deleted, but replaced when its step is saved
    again.

    Args:
        output_dir: Folder of the checkpoints.
        limit: Number of complete checkpoints to keep. None or zero deletes nothing.
        best: Folder of the best checkpoint, which is kept too.
    """
    folders = checkpoints(output_dir)
    complete = [path for path in folders if is_complete(path)]
    if not limit or limit < 0 or not complete:
        return
    kept = {*complete[-limit:], *([] if best is None else [Path(best)])}
    for path in folders[: folders.index(complete[-1])]:
        if path not in kept:
            delete_checkpoint(path)


@contextmanager
def crash_safe_checkpoint(args: TrainingArguments, step: int, best: str | None = None) -> Iterator[Path]:
    """Context in which the Trainer writes a checkpoint, after which its manifest is written and old ones are deleted.

    An incomplete checkpoint of the same step is deleted first. The Trainer's own rotation is turned off, because it
    would delete the last complete checkpoint before the new one has a manifest. All processes must enter the context,
    because the manifest is written after all of them have written their files.

    Args:
        args: Training arguments of the run.
        step: Number of optimizer steps.
        best: Folder of the best checkpoint, which is not deleted.

    Yields:
        Folder of the new checkpoint.
    """
    folder = Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{step}"
    if args.should_save and folder.exists():
        delete_checkpoint(folder)
    _wait_for_all()
    limit, args.save_total_limit = args.save_total_limit, None
    try:
        yield folder
    except Exception:
        # The checkpoint would never count as complete, and its space may be needed on a full disk.
        if args.should_save:
            shutil.rmtree(folder, ignore_errors=True)
        raise
    finally:
        args.save_total_limit = limit
    _wait_for_all()
    if args.should_save:
        write_manifest(folder)
        rotate(args.output_dir, limit, best)
    # No process may continue, and possibly be stopped, before the checkpoint is complete.
    _wait_for_all()


def is_disk_full(error: BaseException) -> bool:
    """Return whether an error means that the disk, a quota or the largest file size is exhausted.

    safetensors and torch report such errors as exceptions of their own types.
    """
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return True
    # The last two are in the message of torch if it cannot write an archive to its end for any reason.
    parts = ("No space left", "File too large", "quota exceeded", "iostream error", "inline_container.cc")
    return any(part in str(error) for part in parts)


def _wait_for_all() -> None:
    if dist.is_initialized():
        dist.barrier()
