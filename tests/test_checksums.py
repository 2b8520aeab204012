"""Stored files are compared with their checksums, and damage is one line that says what makes the file again."""

import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.numpy import load_file, save_file

from modeling_gkc.file_checksums import EMPTY_CHECKSUM, DamagedFileError, verify_checksum, write_checksum
from train.data import from_folder
from train.data.load import CHECKSUMS_NAME, load_split, load_splits
from train.data.prepare import Settings, prepare
from train.data.prepared import load_prepared, read_manifest, write_manifest
from train.storage import checksums
from train.storage.checksums import Each, Perhaps, read_checksummed_json, shape_problems, write_checksummed_json
from train.storage.shards import StoreSettings, StoreWriter, shard_name
from train.teacher.region_teacher import TeacherCache

from .test_from_folder import write_folder
from .test_prepare import QUICK, toy


def flip(path: Path, position: int = -20) -> None:
    """Change one bit of a file."""
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """Prepare a benchmark with two Parquet files, with its source."""
    folder = tmp_path_factory.mktemp("prepared")
    prepare(toy(folder / "source", images=4), folder / "source", folder / "data", None, Settings(**QUICK))
    return folder


@pytest.fixture
def prepared(whole, tmp_path) -> Path:
    """Copy the benchmark."""
    return Path(shutil.copytree(whole, tmp_path / "copy")) / "data"


def prepare_again(prepared: Path) -> dict:
    """Check that the command named in the message repairs the benchmark."""
    source = prepared.parent / "source"
    manifest = read_manifest(prepared)
    write_manifest(prepared, {**manifest, "source": str(source)})
    return prepare(toy(source, images=4), source, prepared, None, Settings(**QUICK))["val"]


@pytest.mark.parametrize("loaded_before", [False, True])
def test_rewritten_parquet_file_is_rejected_and_written_again(prepared, loaded_before):
    expected = load_prepared(prepared, "val").dataset["image_id"][:]
    if not loaded_before:
        shutil.rmtree(prepared / ".arrow")
    path = prepared / "val-00000-of-00002.parquet"
    table = pq.read_table(path)
    pq.write_table(table.take([1, 0, 2]), path)
    advice = (
        r"copy/data/val-00000-of-00002.parquet is missing, damaged or was rewritten, .*: run `python -m train.data"
    )
    with pytest.raises(DamagedFileError, match=advice):
        load_prepared(prepared, "val")
    before = read_manifest(prepared)["splits"]["val"]["shards"]
    assert prepare_again(prepared)["shards"] == before
    assert load_prepared(prepared, "val").dataset["image_id"][:] == expected


def test_damaged_arrow_cache_is_written_again(prepared, monkeypatch):
    expected = load_prepared(prepared, "val").dataset["image_id"][:]
    (arrow,) = (prepared / ".arrow").glob("*.arrow")
    flip(arrow, arrow.stat().st_size // 2)
    assert load_prepared(prepared, "val").dataset["image_id"][:] == expected
    # Undamaged, it is neither made again, nor are the Parquet files read.
    monkeypatch.setattr("train.data.prepared._write_arrow", None)
    monkeypatch.setattr("train.data.prepared.require_parquet", None)
    assert load_prepared(prepared, "val").dataset["image_id"][:] == expected


def test_vocabulary_with_other_classes_is_rejected(prepared):
    path = prepared / "vocabulary.json"
    content = json.loads(path.read_text())
    content["classes"].reverse()
    path.write_text(json.dumps(content))
    with pytest.raises(DamagedFileError, match=r"vocabulary.json is missing, damaged or was edited"):
        load_prepared(prepared, "val")
    prepare_again(prepared)
    assert load_prepared(prepared, "val").vocabulary.labels[0] == content["classes"][-1]["name"]


def test_edited_manifest_is_rejected(prepared):
    path = prepared / "prepared.json"
    path.write_text(path.read_text().replace('"benchmark": "toy"', '"benchmark": "ade20k_150"'))
    with pytest.raises(DamagedFileError, match=rf"{path} is damaged or was edited .*delete {prepared}"):
        load_prepared(prepared, "val")


@pytest.fixture
def dataset(tmp_path) -> Path:
    """Make a dataset by `train.data.from_folder`."""
    from_folder.convert(write_folder(tmp_path / "mine"), tmp_path / "data", val_share=0.25)
    return tmp_path / "data"


def test_damaged_split_is_rejected_when_it_is_loaded(dataset):
    (path,) = (dataset / "train").glob("*.arrow")
    flip(path, path.stat().st_size // 2)
    assert len(load_split(dataset, "val")) == 1
    for load in (lambda: load_split(dataset, "train"), lambda: load_splits(dataset)):
        with pytest.raises(
            ValueError, match=rf"{path} is damaged .*create it again with `python -m train.data.from_fold"
        ):
            load()
    (dataset / CHECKSUMS_NAME).unlink()
    assert len(load_split(dataset, "train")) == 3  # nothing tells


def test_errors_of_datasets_are_one_line(dataset):
    (dataset / CHECKSUMS_NAME).unlink()
    (dataset / "train" / "state.json").write_text('{"_data_files": 3}')
    with pytest.raises(ValueError, match=rf"^DATASET: {dataset} cannot be loaded: [^\n]+$"):
        load_split(dataset, "train")


def write_store(folder: Path, rows: np.ndarray) -> StoreWriter:
    """Six images of two regions each in three shards."""
    writer = StoreWriter(folder, StoreSettings("teacher", {"data": "d"}, 4, 6, images_per_shard=2, command="again"))
    writer.begin()
    for shard in writer.pending():
        images = writer.settings.images_of(shard)
        segments = np.array([1, 2] * len(images))
        part = rows[2 * images.start : 2 * images.stop]
        writer.write(shard, [f"i{image}" for image in images], [2] * len(images), segments, part)
    writer.finish()
    return writer


def test_damaged_shard_is_rejected_on_reading_and_written_again(tmp_path):
    rows = np.arange(48, dtype=np.float32).reshape(12, 4)
    write_store(tmp_path, rows)
    undamaged = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    path = tmp_path / shard_name(1)
    stored = load_file(path)["rows"].tobytes()
    flip(path, path.read_bytes().index(stored) + 3)  # of image i2
    store, ids = TeacherCache.open(tmp_path, {"data": "d"}), [torch.tensor([1, 2])]
    for image in (0, 1, 3, 4, 5):
        assert store.lookup([f"i{image}"], ids)[0].tolist() == rows[2 * image : 2 * image + 2].tolist()
    with pytest.raises(
        DamagedFileError, match=rf"{path} is damaged, the checksum of rows 4 to 6 .*: `again` writes it again"
    ):
        store.lookup(["i2"], ids)
    written = write_store(tmp_path, rows)
    assert sorted(written.shards._verified) == [0, 1, 2]
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == undamaged


def test_shard_damaged_before_the_manifest_is_written_again(tmp_path):
    rows = np.arange(48, dtype=np.float32).reshape(12, 4)
    writer = StoreWriter(tmp_path, StoreSettings("teacher", {"data": "d"}, 4, 6, images_per_shard=2))
    writer.begin()
    writer.write(0, ["i0", "i1"], [2, 2], np.array([1, 2, 1, 2]), rows[:4])
    assert writer.pending() == [1, 2]
    flip(tmp_path / shard_name(0), -1)
    assert writer.pending() == [0, 1, 2]


def test_older_format_is_rejected_by_name(tmp_path):
    (tmp_path / "manifest.json").write_text('{"format": "gkc-region-rows-1"}')
    with pytest.raises(ValueError, match=rf"has the format 'gkc-region-rows-1', .*delete {tmp_path}"):
        TeacherCache.open(tmp_path, {})


def test_equal_tensors_make_equal_files(tmp_path):
    path, seals = tmp_path / "a.safetensors", set()
    for _ in range(8):  # safetensors orders metadata anew each time
        save_file({"a": np.arange(3)}, path, {"one": "ä\n\x1f", "two": "2", "three": "3", **EMPTY_CHECKSUM})
        write_checksum(path)
        seals.add(verify_checksum(path, "x"))
    assert len(seals) == 1 and load_file(path)["a"].tolist() == [0, 1, 2]
    for position in range(0, path.stat().st_size, 5):
        flip(path, position)
        with pytest.raises(DamagedFileError, match=rf"{path} is damaged, .*: make it again"):
            verify_checksum(path, "make it again")
        flip(path, position)
    save_file({"a": np.arange(3)}, path)
    with pytest.raises(ValueError, match="write it with the metadata `EMPTY_CHECKSUM`"):
        write_checksum(path)


def test_json_with_a_checksum_is_read_as_written_and_in_its_shape(tmp_path):
    path, shape = tmp_path / "a.json", {"counts": Each(int), "names": [str], "note": Perhaps(str)}
    write_checksummed_json(
        path, {"counts": {9: 1, 10: 2}, "names": ["ä", "\ud800".encode("utf-8", "replace").decode()]}
    )
    assert read_checksummed_json(path, shape, "x") == {"counts": {"9": 1, "10": 2}, "names": ["ä", "?"]}
    path.write_text(json.dumps(json.loads(path.read_text())))  # laid out in another way
    assert read_checksummed_json(path, shape, "x")["counts"] == {"9": 1, "10": 2}
    for text, problem in [
        (path.read_text().replace("2}", "3}"), "checksum mismatch"),
        (path.read_text().replace('"names"', '"nouns"'), "names: is missing"),
        (path.read_text().replace("2}", "true}"), "counts.10: must be int, got True"),
        ("[" * 100_000, "it cannot be read as JSON: it is nested too deeply"),
        ("[\n1 2]", "line 2: invalid JSON: Expecting ',' delimiter"),
        ("[]", "the file: must be an object, got list"),
    ]:
        other = tmp_path / "b.json"
        other.write_text(text)
        with pytest.raises(DamagedFileError, match=rf"{other} is damaged.*{problem}.*: make it again"):
            read_checksummed_json(other, shape, "make it again")
    with pytest.raises(DamagedFileError, match=r"c.json cannot be read \(No such file or directory\): make it again"):
        read_checksummed_json(tmp_path / "c.json", shape, "make it again")
    for missing in ("c.json", "no/folder.json"):
        with pytest.raises(DamagedFileError):  # also without a remedy, for callers that catch it
            read_checksummed_json(tmp_path / missing, shape, "")


def test_shapes():
    shape = {"a": (int, type(None)), "b": [{"c": float}]}
    assert shape_problems({"a": None, "b": [{"c": 1.5}], "more": 1}, shape) == []
    assert shape_problems({"a": True, "b": [{"c": float("nan")}, {}]}, shape) == [
        "a: must be int or NoneType, got True",
        "b[0].c: is nan",
        "b[1].c: is missing",
    ]


def test_a_file_is_read_in_blocks(tmp_path, monkeypatch):
    (tmp_path / "a").write_bytes(bytes(range(256)) * 40)
    sums = set()
    for size in (7, 4096, 1 << 20):
        monkeypatch.setattr(checksums, "BLOCK_BYTES", size)
        sums.add(checksums.file_xxh3(tmp_path / "a"))
    assert len(sums) == 1
