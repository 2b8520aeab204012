"""Crash-safe partial results of an evaluation, stored after every chunk of consecutive images.

The division into chunks depends on the data alone, not on the number of processes. Each chunk is one file of a
`ShardFolder`, in a folder named by the fingerprint of everything that the scores depend on, so that chunks of another
model, other data or other options are never read. A file begins with the SHA-256 of its folder name, its file name and
its content, so that damaged, renamed or moved files are detected before numpy reads them.
"""

import hashlib
import io
import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from modeling_gkc.file_checksums import DamagedFileError

from ..storage.shard_folder import ShardFolder

if TYPE_CHECKING:
    from ..metrics.score import Score

IMAGES_PER_CHUNK = 64
_META = "meta"
_DIGEST_BYTES = 32


def plan_chunks(video_ids: Sequence[str], images_per_chunk: int = IMAGES_PER_CHUNK) -> list[range]:
    """Divide the rows of a dataset into chunks.

    Args:
        video_ids: Video of each row, "" for images. The rows of a video are consecutive and stay in one chunk.
        images_per_chunk: Rows of each chunk. The last chunk may have fewer, and one that ends with a video more.

    Returns:
        Row range of each chunk.
    """
    chunks, start = [], 0
    for row in range(1, len(video_ids) + 1):
        at_end = row == len(video_ids)
        in_video = not at_end and video_ids[row] != "" and video_ids[row] == video_ids[row - 1]
        if at_end or (row - start >= images_per_chunk and not in_video):
            chunks.append(range(start, row))
            start = row
    return chunks


class ChunkFolder(ShardFolder):
    """Finished chunks of one evaluation.

    Args:
        folder: Folder of the files, created when the first chunk is written.
        count: Number of chunks of the evaluation.
    """

    def __init__(self, folder: Path, count: int):
        super().__init__(folder, [f"chunk-{chunk:05d}-of-{count:05d}.counts" for chunk in range(count)])
        self.count = count

    def write(self, chunk: int, scores: dict[str, "Score"], meta: dict[str, Any]) -> None:
        """Store the state of the scores of a finished chunk, and a JSON-serializable description `meta`."""
        arrays = {f"{name}/{key}": value for name, score in scores.items() for key, value in score.state().items()}
        arrays[_META] = np.frombuffer(json.dumps(meta).encode(), dtype=np.uint8)
        content = io.BytesIO()
        np.savez_compressed(content, **arrays)
        with self.writing(chunk) as temporary:
            temporary.write_bytes(self._digest(chunk, content.getvalue()) + content.getvalue())

    def _digest(self, chunk: int, content: bytes) -> bytes:
        place = f"{self.folder.name}/{self.path(chunk).name}\n"
        return hashlib.sha256(place.encode() + content).digest()

    def merge_into(self, chunk: int, scores: dict[str, "Score"]) -> dict[str, Any]:
        """Add the counts of a chunk to the scores.

        Returns:
            The description `meta` of the chunk.

        Raises:
            DamagedFileError: The file is missing or damaged.
        """
        path = self.path(chunk)
        remedy = f"delete it (`rm {shlex.quote(str(path))}`) and run the command again to re-evaluate its images."
        try:
            stored = path.read_bytes()
        except OSError as error:
            raise DamagedFileError(f"{path} cannot be read ({error.strerror}): {remedy}") from error
        content = stored[_DIGEST_BYTES:]
        if stored[:_DIGEST_BYTES] != self._digest(chunk, content):
            raise DamagedFileError(f"{path} is damaged (checksum mismatch): {remedy}")
        with np.load(io.BytesIO(content)) as loaded:
            arrays = {name: loaded[name] for name in loaded.files}
        meta = json.loads(arrays.pop(_META).tobytes())
        for name, score in scores.items():
            prefix = f"{name}/"
            state = {key.removeprefix(prefix): value for key, value in arrays.items() if key.startswith(prefix)}
            score.merge_state(state)
        return meta
