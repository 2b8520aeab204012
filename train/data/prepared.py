"""Format and loading of prepared benchmarks.

    FOLDER/vocabulary.json                 classes, in the order of `category_id`
    FOLDER/prepared.json                   manifest, see below
    FOLDER/val-00000-of-00010.parquet      rows as in `train.data.schema`, a fixed number of images per file
    FOLDER/.arrow/                         cache of the rows in Arrow format, written on first use

The manifest `prepared.json` contains `benchmark`, `source`, `options`, `vocabulary_sha256` and `splits`; for labels of
a teacher (`train.teacher.segmenter_labels`) also the `command` that made them and `labels`, the hashes of the inputs.
The entry of a split contains `complete`, `images`, `expected` (the published number of images or null), `found`
(images in the source), `left_out` (images excluded by the rules of a base or novel variant), `classes` (`segments` and
`images` by label), `problems` (one line per unusable image), `notes` and `shards` (`file`, `images`, `sha256`).

Evaluation results identify their data by these checksums. `prepared.json` has its own checksum, Parquet files are
verified when they are converted to Arrow and whenever their size or modification time changes, and the Arrow file is
verified each time it is opened.
"""

from __future__ import annotations

import os
import shlex
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock
from tqdm.auto import tqdm

from modeling_gkc.atomic_files import atomic_path
from modeling_gkc.file_checksums import DamagedFileError
from modeling_gkc.vocabulary import Vocabulary

from ..storage.checksums import Each, Perhaps, file_sha256, file_xxh3, read_checksummed_json, write_checksummed_json
from ..storage.fingerprints import settings_fingerprint

if TYPE_CHECKING:
    from datasets import Dataset

MANIFEST_NAME = "prepared.json"
VOCABULARY_NAME = "vocabulary.json"
ARROW_FOLDER = ".arrow"
FORMAT = 2
_SPLIT = {
    "complete": bool,
    "images": Perhaps(int),
    "expected": Perhaps((int, type(None))),
    "left_out": Perhaps(int),
    "problems": Perhaps([str]),
    "notes": Perhaps([str]),
    "classes": Perhaps(Each({"segments": int, "images": int})),
    "shards": [{"file": str, "images": int, "sha256": str}],
}
_MANIFEST = {
    "format": int,
    "benchmark": str,
    "source": str,
    "options": Each((int, type(None))),
    "vocabulary_sha256": str,
    "splits": Each(_SPLIT),
    "command": Perhaps(str),
    "labels": Perhaps(Each(str)),
}
_ARROW = {"bytes": int, "xxh3": str, "parquet": Each([int])}


@dataclass(frozen=True)
class Prepared:
    """Split of a prepared benchmark.

    Attributes:
        dataset: Rows in the schema of `train.data.schema`.
        vocabulary: Classes of the benchmark.
        benchmark: Name of the benchmark, such as `ade20k_150`.
        info: Entry of the split in `prepared.json`.
    """

    dataset: Dataset
    vocabulary: Vocabulary
    benchmark: str
    info: dict[str, Any]


def is_prepared(folder: str | Path) -> bool:
    """Return whether `train.data.prepare` wrote a folder, finished or not."""
    return (Path(folder) / MANIFEST_NAME).is_file()


def read_manifest(folder: str | Path) -> dict[str, Any]:
    """Read the manifest `prepared.json`.

    Raises:
        ValueError: If the manifest is missing or damaged, or has another format version.
    """
    path = Path(folder) / MANIFEST_NAME
    if not path.is_file():
        raise ValueError(
            f"{folder} is not a prepared benchmark, it has no {MANIFEST_NAME}: create it with `python -m "
            f"train.data.prepare BENCHMARK --source DIR --out {folder}`."
        )
    remedy = f"delete {folder} (`rm -r {shlex.quote(str(folder))}`) and prepare the benchmark again."
    manifest = read_checksummed_json(path, _MANIFEST, remedy)
    if manifest["format"] != FORMAT:
        raise ValueError(f"{path} was written by another version of this code: {remedy}")
    return manifest


def write_manifest(folder: str | Path, manifest: Mapping[str, Any]) -> None:
    """Write `prepared.json` with its checksum, its format version and the SHA-256 of the vocabulary."""
    if "vocabulary_sha256" not in manifest:
        manifest = {**manifest, "vocabulary_sha256": file_sha256(Path(folder) / VOCABULARY_NAME)}
    write_checksummed_json(Path(folder) / MANIFEST_NAME, {**manifest, "format": FORMAT})


def finished_splits(folder: str | Path) -> list[str]:
    """Return the names of the complete splits of a prepared benchmark.

    Raises:
        ValueError: If the manifest is missing or damaged, or has another format version.
    """
    return [name for name, split in read_manifest(folder)["splits"].items() if split["complete"]]


def load_prepared(folder: str | Path, split: str) -> Prepared:
    """Load a split that `python -m train.data.prepare` wrote.

    On first use the Parquet files are converted to a memory-mapped Arrow file of the same size, in the folder itself
    or, if the folder is read-only, in the cache of `datasets`.

    Args:
        folder: Folder of the prepared benchmark.
        split: Name of the split.

    Raises:
        ValueError: If the folder, the split or a file is missing, incomplete or damaged. The message names the command
            to run.
    """
    from datasets import Dataset, NamedSplit

    folder = Path(folder)
    manifest = read_manifest(folder)
    info = manifest["splits"].get(split)
    command = f"`{prepare_command(manifest, folder, split)}`"
    if info is None:
        there = ", ".join(manifest["splits"]) or "none"
        raise ValueError(f"{folder} has no split {split!r}, only {there}: create it with {command}.")
    if not info["complete"]:
        raise ValueError(f"The split {split!r} of {folder} is incomplete: finish it with {command}.")
    files = [folder / shard["file"] for shard in info["shards"]]
    if missing := [path.name for path in files if not path.is_file()]:
        raise ValueError(f"{folder} lacks {', '.join(missing[:3])}: run {command} again.")
    vocabulary = _vocabulary(folder, manifest["vocabulary_sha256"], command)
    dataset = Dataset.from_file(str(_arrow_file(folder, split, info, command)), split=NamedSplit(split))
    if len(dataset) != info["images"]:
        raise ValueError(f"{folder} holds {len(dataset)} images of {split!r}, not {info['images']}: prepare it again.")
    return Prepared(dataset, vocabulary, manifest["benchmark"], info)


def _vocabulary(folder: Path, sha256: str, command: str) -> Vocabulary:
    if is_damaged(folder / VOCABULARY_NAME, sha256):
        raise DamagedFileError(
            f"{folder / VOCABULARY_NAME} is missing, damaged or was edited, its SHA-256 is not that of "
            f"{MANIFEST_NAME}: give {command} again."
        )
    with warnings.catch_warnings():  # words of several classes are intended in packaged vocabularies
        warnings.simplefilter("ignore", UserWarning)
        return Vocabulary.from_file(folder / VOCABULARY_NAME)


def is_damaged(path: Path, sha256: str) -> bool:
    """Return whether a file is missing or its SHA-256 differs, by reading the whole file."""
    try:
        return file_sha256(path) != sha256
    except OSError:
        return True


def require_parquet(path: Path, sha256: str, command: str) -> None:
    """Verify the SHA-256 of a Parquet file.

    Args:
        path: Parquet file.
        sha256: Expected SHA-256 as a hexadecimal string.
        command: Command that repairs the file, for the error.

    Raises:
        DamagedFileError: If the file is missing or its SHA-256 differs.
    """
    if is_damaged(path, sha256):
        raise DamagedFileError(
            f"{path} is missing, damaged or was rewritten, its SHA-256 differs from {MANIFEST_NAME}: run {command} "
            "again."
        )


def _arrow_file(folder: Path, split: str, info: Mapping[str, Any], command: str) -> Path:
    """Return the Arrow file of a split, after writing it if it is missing, damaged or out of date."""
    from datasets import config as datasets_config

    is_writable = os.access(folder, os.W_OK)
    place = folder / ARROW_FOLDER if is_writable else Path(datasets_config.HF_DATASETS_CACHE) / "gkc_prepared"
    path = place / f"{split}-{settings_fingerprint([FORMAT, info['shards']])}.arrow"
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_suffix(".lock")):
        known = _known_arrow(path)
        states = {}
        for shard in info["shards"]:
            file = folder / shard["file"]
            state = file.stat()
            states[shard["file"]] = [state.st_size, state.st_mtime_ns]
            if (known or {}).get("parquet", {}).get(shard["file"]) != states[shard["file"]]:
                require_parquet(file, shard["sha256"], command)
        if known is None:
            for other in path.parent.glob(f"{split}-*.arrow"):
                other.unlink()
            _write_arrow([folder / shard["file"] for shard in info["shards"]], path)
            known = {"bytes": path.stat().st_size, "xxh3": file_xxh3(path)}
        if known.get("parquet") != states:
            write_checksummed_json(path.with_suffix(".json"), {**known, "parquet": states})
    return path


def _known_arrow(path: Path) -> dict[str, Any] | None:
    """Return the stored record of an Arrow file, or None if the file has changed."""
    try:
        known = read_checksummed_json(path.with_suffix(".json"), _ARROW, "")
        return known if path.stat().st_size == known["bytes"] and file_xxh3(path) == known["xxh3"] else None
    except (OSError, DamagedFileError):
        return None


def _write_arrow(files: list[Path], path: Path) -> None:
    import pyarrow.parquet as pq
    from datasets import Features
    from datasets.arrow_writer import ArrowWriter

    features = Features.from_arrow_schema(pq.read_schema(files[0]))
    bar = tqdm(files, f"Reading {path.stem.partition('-')[0]}", unit="file", disable=None if len(files) > 1 else True)
    with atomic_path(path) as temporary, ArrowWriter(features=features, path=str(temporary)) as writer:
        for file in bar:
            with pq.ParquetFile(file) as opened:
                for group in range(opened.num_row_groups):
                    writer.write_table(opened.read_row_group(group))
        writer.finalize()


def prepare_command(manifest: dict[str, Any], folder: Path, split: str) -> str:
    """Return the command that prepares a split of a benchmark, or the command that the manifest contains."""
    if "command" in manifest:
        return manifest["command"]
    given = {"--source": manifest["source"], "--out": str(folder), "--split": split}
    options = [part for option in given.items() for part in option]
    return shlex.join(["python", "-m", "train.data.prepare", manifest["benchmark"], *options])


def vocabulary_json(vocabulary: Vocabulary) -> dict[str, Any]:
    """Return a vocabulary in the JSON format that `Vocabulary.from_file` reads."""
    nothing = [None] * len(vocabulary)
    kinds, colors, templates = (
        column or nothing for column in (vocabulary.is_thing, vocabulary.colors, vocabulary.templates)
    )
    columns = zip(vocabulary.names, kinds, colors, templates, strict=True)
    classes = []
    for names, kind, color, own in columns:
        entry = {"name": names[0], "synonyms": names[1:], "is_thing": kind, "color": color and list(color)}
        classes.append(entry if own is None else entry | {"templates": own})
    return {"classes": classes}
