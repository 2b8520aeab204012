"""Numbered shard files of a store, each whole or absent, so that a killed writer goes on at the first missing one.

Every store of this project that is written in shards keeps them by this class: rows of regions (`shards`), Parquet
files of prepared benchmarks (`train.data.prepared_shards`) and counts of an evaluation (`train.evaluate.chunks`). What
stands in a shard, and how damage is found, belongs to the store.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from modeling_gkc.atomic_files import atomic_path, remove_leftovers


class ShardFolder:
    """
    Shard files of one store.

    A shard is written under a temporary name, brought to the disk and then renamed: what has its final name is whole.
    Any number of processes may each write their own shards.

    Args:
        folder: Folder of the files; made when the first shard is written.
        names: File name of each shard, in order.
        verify: Number of a shard whose file exists -> what is known of it, None where it is damaged. Without it every
            file that exists counts as whole. It is asked once as long as the file stays as it is.
    """

    def __init__(self, folder: Path, names: Sequence[str], verify: Callable[[int], Any] | None = None):
        self.folder, self.names, self.verify = Path(folder), list(names), verify
        self._verified: dict[int, tuple[tuple[int, int, int], Any]] = {}  # state of the file, what is known of it

    def path(self, shard: int) -> Path:
        """File of a shard."""
        return self.folder / self.names[shard]

    def finished(self) -> dict[int, Any]:
        """Numbers of the shards that are whole, each with what `verify` tells of it."""
        found = {shard: self._known(shard) for shard in range(len(self.names))}
        return {shard: known for shard, known in found.items() if known is not None}

    def pending(self) -> list[int]:
        """Numbers of the shards that are missing or damaged."""
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
        """Yield the temporary path of a shard, which gets its name when the block succeeds."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with atomic_path(self.path(shard), sync=True) as temporary:
            yield temporary

    def remove_leftovers(self) -> None:
        """Delete temporary files of killed writers; by one process, while no other writes into the folder."""
        remove_leftovers(self.folder)
