"""A prepared benchmark in its folder: how it is laid out, and how it is loaded.

    FOLDER/vocabulary.json                 the classes, in the order that `category_id` counts
    FOLDER/prepared.json                   what was prepared, see below
    FOLDER/val-00000-of-00010.parquet      rows as in `train.data.schema`, a fixed number of images a file
    FOLDER/.arrow/                         the same rows as Arrow, made when they are first loaded

`prepared.json` has `benchmark`, `source`, `options`, `vocabulary_sha256` and `splits`; of each split `complete`,
`images`, `expected` (the published number, null where there is none), `found` (images of the source), `left_out` (by
the rule of a base or novel variant), `classes` (`segments` and `images` by label), `problems` (one line for each image
left out), `notes` and `shards` (`file`, `images`, `sha256`).

A result names its data by these SHA-256. So `prepared.json` has a checksum of itself; Parquet files are compared with
theirs when they are made into Arrow, and whenever their size or time has changed since; and the Arrow file, from which
all rows are read, is compared with its own each time it is opened, as fast as it can be read.
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
}
_ARROW = {"bytes": int, "xxh3": str, "parquet": Each([int])}


@dataclass(frozen=True)
class Prepared:
    """A split of a prepared benchmark.

    Attributes:
        dataset: its rows, in the schema of `train.data.schema`.
        vocabulary: its classes.
        benchmark: its name, such as `ade20k_150`.
        info: what `prepared.json` holds of the split.
    """

    dataset: Dataset
    vocabulary: Vocabulary
    benchmark: str
    info: dict[str, Any]


def is_prepared(folder: str | Path) -> bool:
    """Whether a folder is one that `train.data.prepare` writes, finished or not."""
    return (Path(folder) / MANIFEST_NAME).is_file()


def read_manifest(folder: str | Path) -> dict[str, Any]:
    """The content of `prepared.json`.

    Raises:
        ValueError: there is none, it cannot be read, or it is of another version of this code.
    """
    path = Path(folder) / MANIFEST_NAME
    if not path.is_file():
        raise ValueError(
            f"{folder} is no prepared benchmark, it has no {MANIFEST_NAME}: make it with `python -m "
            f"train.data.prepare BENCHMARK --source DIR --out {folder}`."
        )
    remedy = f"delete {folder} (`rm -r {shlex.quote(str(folder))}`) and prepare the benchmark anew."
    manifest = read_checksummed_json(path, _MANIFEST, remedy)
    if manifest["format"] != FORMAT:
        raise ValueError(f"{path} is of another version of this code: {remedy}")
    return manifest


def write_manifest(folder: str | Path, manifest: Mapping[str, Any]) -> None:
    """Write `prepared.json` with its checksum and format, and with the vocabulary's SHA-256 where it lacks it."""
    if "vocabulary_sha256" not in manifest:
        manifest = {**manifest, "vocabulary_sha256": file_sha256(Path(folder) / VOCABULARY_NAME)}
    write_checksummed_json(Path(folder) / MANIFEST_NAME, {**manifest, "format": FORMAT})


def finished_splits(folder: str | Path) -> list[str]:
    """The splits that are completely there; raises as `read_manifest`."""
    return [name for name, split in read_manifest(folder)["splits"].items() if split["complete"]]


def load_prepared(folder: str | Path, split: str) -> Prepared:
    """Load a split that `python -m train.data.prepare` wrote.

    On first use the Parquet files become an Arrow file, which is mapped into memory: it takes the same room once more,
    in the folder itself or, where that cannot be written to, in the cache of `datasets`.

    Raises:
        ValueError: the folder, the split or a file is not there, half-written or damaged; the message says what to
            run.
    """
    from datasets import Dataset, NamedSplit

    folder = Path(folder)
    manifest = read_manifest(folder)
    info = manifest["splits"].get(split)
    command = f"`{prepare_command(manifest, folder, split)}`"
    if info is None:
        there = ", ".join(manifest["splits"]) or "none"
        raise ValueError(f"{folder} has no split {split!r}, but {there}: make it with {command}.")
    if not info["complete"]:
        raise ValueError(f"The split {split!r} of {folder} is half-written: finish it with {command}.")
    files = [folder / shard["file"] for shard in info["shards"]]
    if missing := [path.name for path in files if not path.is_file()]:
        raise ValueError(f"{folder} lacks {', '.join(missing[:3])}: give {command} again.")
    vocabulary = _vocabulary(folder, manifest["vocabulary_sha256"], command)
    dataset = Dataset.from_file(str(_arrow_file(folder, split, info, command)), split=NamedSplit(split))
    if len(dataset) != info["images"]:
        raise ValueError(f"{folder} holds {len(dataset)} images of {split!r}, not {info['images']}: prepare it anew.")
    return Prepared(dataset, vocabulary, manifest["benchmark"], info)


def _vocabulary(folder: Path, sha256: str, command: str) -> Vocabulary:
    if is_damaged(folder / VOCABULARY_NAME, sha256):
        raise DamagedFileError(
            f"{folder / VOCABULARY_NAME} is missing, damaged or was edited, its SHA-256 is not that of "
            f"{MANIFEST_NAME}: give {command} again."
        )
    with warnings.catch_warnings():  # words of several classes: whoever packed the vocabulary knows
        warnings.simplefilter("ignore", UserWarning)
        return Vocabulary.from_file(folder / VOCABULARY_NAME)


def is_damaged(path: Path, sha256: str) -> bool:
    """Whether a file is missing or has another SHA-256; all of it is read."""
    try:
        return file_sha256(path) != sha256
    except OSError:
        return True


def require_parquet(path: Path, sha256: str, command: str) -> None:
    """
    Compare a Parquet file with its SHA-256.

    Raises:
        DamagedFileError: it is missing or was damaged or rewritten.
    """
    if is_damaged(path, sha256):
        raise DamagedFileError(
            f"{path} is missing, damaged or was rewritten, its SHA-256 is not that of {MANIFEST_NAME}: give {command} "
            "again."
        )


def _arrow_file(folder: Path, split: str, info: Mapping[str, Any], command: str) -> Path:
    """The Arrow file of a split's rows, made anew if it is missing, damaged or made from other Parquet files."""
    path = _arrow_place(folder, f"{split}-{settings_fingerprint([FORMAT, info['shards']])}.arrow")
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


def _arrow_place(folder: Path, name: str) -> Path:
    from datasets import config as datasets_config

    if os.access(folder, os.W_OK):
        return folder / ARROW_FOLDER / name
    return Path(datasets_config.HF_DATASETS_CACHE) / "gkc_prepared" / name


def _known_arrow(path: Path) -> dict[str, Any] | None:
    """What was noted of an Arrow file, if it is still as it was written."""
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
    """The command that makes a split of a prepared benchmark."""
    given = {"--source": manifest["source"], "--out": str(folder), "--split": split}
    options = [part for option in given.items() for part in option]
    return shlex.join(["python", "-m", "train.data.prepare", manifest["benchmark"], *options])


def vocabulary_json(vocabulary: Vocabulary) -> dict[str, Any]:
    """A vocabulary in the form that `Vocabulary.from_file` reads."""
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
