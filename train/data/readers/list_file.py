"""List of images and masks, with a JSON file of class names.

    DIR/list.parquet, or list.csv, or list.jsonl        DIR/names.json

The list has one row per image: `image` and `mask`, paths that are absolute or relative to DIR, and optionally
`image_id`, `split` (train, val, test), `captions` (in CSV one, in a column `caption`), `video_id` and `frame`.
Masks and `names.json` have the format of a folder of images and masks.
"""

import csv
import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from ..sources import SPLIT_NAMES, AnnotatedImage, Source
from .mask_folder import NAMES_FILE, read_mask, read_names

LIST_FILES = ("list.parquet", "list.csv", "list.jsonl")
_COLUMNS = {"image", "mask", "image_id", "split", "caption", "captions", "video_id", "frame"}


def read_list(folder: Path) -> Source:
    """Return the images of a list file, in its order.

    Raises:
        ValueError: If the list or the file of names is missing or invalid.
    """
    path = next((folder / name for name in LIST_FILES if (folder / name).is_file()), None)
    if path is None or not (folder / NAMES_FILE).is_file():
        raise ValueError(f"{folder} lacks {' or '.join(LIST_FILES) if path is None else NAMES_FILE}.")
    names, vocabulary = read_names(folder / NAMES_FILE)
    images = []
    for number, row in enumerate(_rows(path), start=1):
        place = f"{path}, row {number}"
        _check_row(row, place)
        image, mask = folder / row["image"], folder / row["mask"]
        images.append(
            AnnotatedImage(
                str(row.get("image_id") or Path(row["image"]).with_suffix("").as_posix()),
                image,
                partial(read_mask, mask, names, (), image),
                _split(row.get("split"), place),
                _captions(row),
                str(row.get("video_id") or ""),
                int(row.get("frame") or 0),
            )
        )
    if not images:
        raise ValueError(f"{path} has no row.")
    return Source(vocabulary, images, layout=f"a list of images and masks, {path.name}")


def _rows(path: Path) -> list[dict[str, Any]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        if path.suffix == ".parquet":
            return pq.read_table(path).to_pylist()
        text = path.read_text(encoding="utf-8-sig")
        if path.suffix == ".csv":
            return list(csv.DictReader(text.splitlines(), restkey="cells without a name", strict=True))
        return [json.loads(line) for line in text.splitlines() if line.strip()]
    except (OSError, ValueError, RecursionError, csv.Error, pa.ArrowException) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error


def _check_row(row: Any, place: str) -> None:
    """Check that a row has known columns with values of the right type."""
    if not isinstance(row, dict):
        raise ValueError(f"{place}: The row must be an object, got {str(row)[:60]}.")
    if unknown := sorted(str(column) for column in row.keys() - _COLUMNS):
        raise ValueError(f"{place}: Unknown columns {unknown}; there are {', '.join(sorted(_COLUMNS))}.")
    if not row.get("image") or not row.get("mask"):
        raise ValueError(f"{place}: The row needs an image and a mask.")
    for column in ("image", "mask", "split", "caption"):
        if row.get(column) is not None and not isinstance(row[column], str):
            raise ValueError(f"{place}: {column} must be text, got {str(row[column])[:60]!r}.")
    captions, frame = row.get("captions") or [], row.get("frame") or 0
    if not isinstance(captions, str | list) or not all(isinstance(caption, str) for caption in captions):
        raise ValueError(f"{place}: The captions must be a list of texts, got {str(captions)[:60]!r}.")
    if not str(frame).isdecimal() or int(frame) >= 2**31:
        raise ValueError(f"{place}: The frame must be a whole number from 0, got {str(frame)[:60]!r}.")


def _split(name: str | None, place: str) -> str | None:
    if name and name not in SPLIT_NAMES:
        raise ValueError(f"{place}: The split must be train, val or test, got {name!r}.")
    return SPLIT_NAMES[name] if name else None


def _captions(row: Mapping[str, Any]) -> tuple[str, ...]:
    captions = row.get("captions") or row.get("caption") or ()
    return (captions,) if isinstance(captions, str) else tuple(captions)
