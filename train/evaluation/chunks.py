"""Evaluation in pieces: consecutive images whose counts are stored when they are done, so that a kill loses little.

The pieces depend on the data alone, not on the number of processes. Each is one file, written whole or not at all, in
a folder named by the fingerprint of everything that the numbers depend on; files of another model, other data or other
options lie elsewhere and are never read.
"""

import json
import os
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .scores import Score

IMAGES_PER_CHUNK = 64
_META = "meta"


def plan_chunks(video_ids: Sequence[str], images_per_chunk: int = IMAGES_PER_CHUNK) -> list[range]:
    """
    Rows of each chunk.

    Args:
        video_ids: of all rows, "" of images; a video is a run of rows and is never divided.
        images_per_chunk: at least so many in every chunk but the last, and no more where no video crosses the border.
    """
    chunks, start = [], 0
    for row in range(1, len(video_ids) + 1):
        at_end = row == len(video_ids)
        in_video = not at_end and video_ids[row] != "" and video_ids[row] == video_ids[row - 1]
        if at_end or (row - start >= images_per_chunk and not in_video):
            chunks.append(range(start, row))
            start = row
    return chunks


class ChunkFolder:
    """
    The finished chunks of one evaluation.

    Args:
        folder: made where it is missing.
        count: chunks of the evaluation.
    """

    def __init__(self, folder: Path, count: int):
        self.folder, self.count = folder, count

    def path(self, chunk: int) -> Path:
        """File of a chunk."""
        return self.folder / f"chunk-{chunk:05d}-of-{self.count:05d}.npz"

    def pending(self) -> list[int]:
        """Chunks that are not done."""
        return [chunk for chunk in range(self.count) if not self.path(chunk).is_file()]

    def write(self, chunk: int, scores: dict[str, Score], meta: dict[str, Any]) -> None:
        """Store a finished chunk: the counts of its scores, and what JSON can hold beside them."""
        self.folder.mkdir(parents=True, exist_ok=True)
        arrays = {f"{name}/{key}": value for name, score in scores.items() for key, value in score.state().items()}
        arrays[_META] = np.frombuffer(json.dumps(meta).encode(), dtype=np.uint8)
        temporary = self.path(chunk).with_name(f".{self.path(chunk).name}.{os.getpid()}")
        with open(temporary, "wb") as file:
            np.savez_compressed(file, **arrays)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, self.path(chunk))

    def merge_into(self, chunk: int, scores: dict[str, Score]) -> dict[str, Any]:
        """
        Add the counts of a chunk to the scores.

        Returns:
            What was stored beside them.

        Raises:
            ValueError: the file is damaged.
        """
        try:
            with np.load(self.path(chunk)) as stored:
                arrays = {name: stored[name] for name in stored.files}
            meta = json.loads(arrays.pop(_META).tobytes())
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
            raise ValueError(
                f"{self.path(chunk)} cannot be read ({error}): delete it and give the command again."
            ) from error
        for name, score in scores.items():
            prefix = f"{name}/"
            state = {key.removeprefix(prefix): value for key, value in arrays.items() if key.startswith(prefix)}
            score.merge_state(state)
        return meta
