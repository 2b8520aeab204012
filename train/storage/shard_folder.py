"""Crash-safe folder of numbered shard files, each complete or absent, so that an interrupted writer resumes.

All sharded stores of this project use it: region rows (`shards`), Parquet files of prepared benchmarks
(`train.data.prepared_shards`) and evaluation counts (`train.evaluate.chunks`). The stores define the content of a
shard and how damage is detected.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from modeling_gkc.atomic_files import atomic_path, remove_leftovers


class ShardFolder:
    """Folder of the shard files of one store.

    A shard is written to a temporary file, flushed to disk and then renamed, so that a file with its final name is
    complete. Several processes may write different shards.

    Args:
        folder: Folder of the shards. It is created when the first shard is written.
        names: File name of each shard, in order.
        verify: Function that maps the number of an existing shard to information about it, or to None if it is
            damaged. Results are cached until the file changes. None accepts every existing file.
    """

    def __init__(self, folder: Path, names: Sequence[str], verify: Callable[[int], Any] | None = None):
        self.folder, self.names, self.verify = Path(folder), list(names), verify
        self._verified: dict[int, tuple[tuple[int, int, int], Any]] = {}  # file state and result of `verify`

    def path(self, shard: int) -> Path:
        """Return the path of a shard."""
        return self.folder / self.names[shard]

    def finished(self) -> dict[int, Any]:
        """Return the numbers of the complete shards, each with the result of `verify`."""
        found = {shard: self._known(shard) for shard in range(len(self.names))}
        return {shard: known for shard, known in found.items() if known is not None}

    def pending(self) -> list[int]:
        """Return the numbers of the missing or damaged shards."""
        finished = self.finished()
        return [shard for shard in range(len(self.names)) if shard not in finished]

    def _known(self, shard: int) -> Any:
        try:
            state = self.path(shard).stat()
        except OSError:
            return None
        if self.verify is None:
            return True
        key = (state.st_ino, state.st_size, state.st_mtime_ns)
        if shard not in self._verified or self._verified[shard][0] != key:
            self._verified[shard] = key, self.verify(shard)
        return self._verified[shard][1]

    @contextmanager
    def writing(self, shard: int) -> Iterator[Path]:
        """Yield the temporary path of a shard, which is renamed when the block succeeds."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with atomic_path(self.path(shard), sync=True) as temporary:
            yield temporary

    def remove_leftovers(self) -> None:
        """Delete temporary files of killed writers; call it from one process while no other writes to the folder."""
        remove_leftovers(self.folder)
