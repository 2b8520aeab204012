"""Files that version 0.1.0 wrote load as they did, and numbered shards are whole or absent."""

import os
import zipfile
from pathlib import Path

import pytest
from datasets import disable_progress_bars

from modeling_gkc.file_checksums import DamagedFileError
from train.storage.shard_folder import ShardFolder

from .fuzz import stores

OLD = Path(__file__).parent / "golden" / "stores_0.1.0.zip"  # of the makers in `fuzz.stores`, run in 0.1.0


@pytest.mark.parametrize("kind", ["prepared", "dataset", "regions", "rows", "chunks", "results", "checkpoints"])
def test_files_of_earlier_versions_load_and_equal_current_ones(kind, tmp_path):
    disable_progress_bars()
    with zipfile.ZipFile(OLD) as archive:
        archive.extractall(tmp_path / "old", [name for name in archive.namelist() if name.startswith(f"{kind}/")])
    store = getattr(stores, f"_{kind}")(tmp_path / kind)
    found = store.read(tmp_path / "old" / kind)
    if kind == "prepared":  # its last part holds SHA-256 of Parquet files, which depend on the version of pyarrow
        assert found[:3] == store.stored[:3] and found[3].keys() == store.stored[3].keys()
    elif callable(store.stored):
        assert store.stored(found) and found != "again"
    else:
        assert found == store.stored


def test_unchanged_shard_is_verified_once(tmp_path):
    asked = []
    folder = ShardFolder(tmp_path / "store", ["a", "b"], lambda shard: asked.append(shard) or f"known {shard}")
    assert folder.pending() == [0, 1] and asked == []
    with folder.writing(1) as temporary:
        temporary.write_text("1")
        assert folder.pending() == [0, 1]
    assert folder.finished() == folder.finished() == {1: "known 1"} and asked == [1]
    folder.path(1).write_text("changed")
    assert folder.pending() == [0] and asked == [1, 1]


def test_a_damaged_or_half_written_shard_is_pending(tmp_path):
    def verify(shard: int) -> bool | None:
        return True if folder.path(shard).read_text() == "whole" else None

    folder = ShardFolder(tmp_path, ["a", "b"], verify)
    folder.path(0).write_text("damaged")
    with pytest.raises(DamagedFileError, match="full"), folder.writing(1) as temporary:
        temporary.write_text("wh")
        raise DamagedFileError("full")
    assert folder.pending() == [0, 1] and os.listdir(tmp_path) == ["a"]
    (tmp_path / ".b-12345678.part").touch()
    folder.remove_leftovers()
    assert os.listdir(tmp_path) == ["a"]
