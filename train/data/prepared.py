"""A prepared benchmark in its folder: how it is laid out, and how it is loaded.

    FOLDER/vocabulary.json                 the classes, in the order that `category_id` counts
    FOLDER/prepared.json                   what was prepared, see below
    FOLDER/val-00000-of-00010.parquet      rows as in `train.data.schema`, a fixed number of images a file
    FOLDER/.arrow/                         what `datasets` makes of them when they are first loaded

`prepared.json` has `benchmark`, `source`, `options` and `splits`; of each split `complete`, `images`, `expected` (the
published number, null where there is none), `found` (images of the source), `left_out` (by the rule of a base or novel
variant), `classes` (`segments` and `images` by label), `problems` (one line for each image left out), `notes` and
`shards` (`file`, `images`, `sha256`).
"""

import json
import os
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset, NamedSplit

from modeling_gkc.vocabulary import Vocabulary

MANIFEST_NAME = "prepared.json"
VOCABULARY_NAME = "vocabulary.json"
ARROW_FOLDER = ".arrow"
FORMAT = 1


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
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    if manifest.get("format") != FORMAT:
        raise ValueError(f"{path} is of another version of this code: prepare the benchmark anew.")
    return manifest


def finished_splits(folder: str | Path) -> list[str]:
    """The splits that are completely there; raises as `read_manifest`."""
    return [name for name, split in read_manifest(folder)["splits"].items() if split["complete"]]


def load_prepared(folder: str | Path, split: str) -> Prepared:
    """Load a split that `python -m train.data.prepare` wrote.

    On first use `datasets` turns the Parquet files into Arrow files, which it maps into memory: they take the same
    room once more, in the folder itself or, where that cannot be written to, in the cache of `datasets`.

    Raises:
        ValueError: the folder, the split or a file is not there, or half-written; the message says what to run.
    """
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
    cache = folder / ARROW_FOLDER if os.access(folder, os.W_OK) else None
    dataset = Dataset.from_parquet(
        [str(path) for path in files], split=NamedSplit(split), cache_dir=None if cache is None else str(cache)
    )
    if len(dataset) != info["images"]:
        raise ValueError(f"{folder} holds {len(dataset)} images of {split!r}, not {info['images']}: prepare it anew.")
    return Prepared(dataset, _vocabulary(folder), manifest["benchmark"], info)


def _vocabulary(folder: Path) -> Vocabulary:
    with warnings.catch_warnings():  # words of several classes: whoever packed the vocabulary knows
        warnings.simplefilter("ignore", UserWarning)
        return Vocabulary.from_file(folder / VOCABULARY_NAME)


def prepare_command(manifest: dict[str, Any], folder: Path, split: str) -> str:
    """The command that makes a split of a prepared benchmark."""
    source = manifest["source"]
    return f"python -m train.data.prepare {manifest['benchmark']} --source {source} --out {folder} --split {split}"


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


def write_json(path: Path, content: Any) -> None:
    """Write a file that is whole or not there."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(temporary, path)
