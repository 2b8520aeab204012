"""Draw samples of a dataset: image, overlay and legend, so that one sees whether names and colours are right.

    python -m train.data.view data/ade20k_150 --out sheet.png
    python -m train.data.view data/ade20k_150 --split train --rows 20
    python -m train.data.view data/vspw_124 --rows 3 --frames 6          a row for each video
    python -m train.data.view data/coco --ids 000000000139 000000000285
    python -m train.data.view my_dataset --vocabulary tools.json

DATASET is a folder that `python -m train.data.prepare` or `python -m train.data.from_folder` wrote, or that
`save_to_disk` did: then --vocabulary says what its classes are, unless it holds a vocabulary.json.

Look at: do the names fit what is there (classes moved by one show at once), do outlines follow the objects, is little
of what has a class hatched (void)?
"""

from __future__ import annotations

import argparse
import functools
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm.auto import tqdm

from modeling_gkc.atomic_files import atomic_path
from modeling_gkc.cli.common import interruptible
from modeling_gkc.label_text import error_line
from modeling_gkc.vocabulary import Vocabulary

from .contact_sheet import Sample, SheetRow, draw_sheet
from .load import load_saved
from .prepared import VOCABULARY_NAME, is_prepared, prepare_command, read_manifest, require_parquet
from .schema import dataset_features, learnable_ids, read_row, without_decoding

if TYPE_CHECKING:
    import pyarrow.parquet as pq
    from datasets import Dataset

ROWS, FRAMES, MAX_ROWS = 8, 4, 100
_PLACE = {"image_id": "", "video_id": "", "frame": 0}  # columns, and what a dataset without videos has in them
_SPLITS = ("val", "validation", "test", "train")


@dataclass
class Viewed:
    """A split of a dataset of which single rows are read.

    Attributes:
        name: of dataset and split, for people.
        vocabulary: its classes.
        places: of every row, in their order: image id, video id, frame.
        read: number of a row -> the row as stored.
    """

    name: str
    vocabulary: Vocabulary
    places: list[tuple[str, str, int]]
    read: Callable[[int], Mapping[str, Any]]


def open_dataset(folder: Path, split: str | None = None, vocabulary: str | None = None) -> Viewed:
    """Open a prepared folder, or one that `save_to_disk` wrote.

    Args:
        folder: the dataset.
        split: None takes val where there is one.
        vocabulary: as `Vocabulary.parse` takes it; None: the dataset's own.

    Raises:
        ValueError: there is no such dataset or split, it is half-written, or has no vocabulary; the message says what
            to do.
    """
    from datasets import DatasetDict

    if not folder.is_dir():
        raise ValueError(f"there is not a directory {folder}.")
    words = _vocabulary(folder, vocabulary)
    if is_prepared(folder):
        return _open_prepared(folder, split, words)
    if not {"dataset_dict.json", "dataset_info.json"} & {path.name for path in folder.iterdir()}:
        raise ValueError(f"{folder} is neither a prepared benchmark nor a dataset of `save_to_disk`.")
    found = load_saved(folder)
    splits = dict(found) if isinstance(found, DatasetDict) else {"all": found}
    split = _chosen(split, list(splits), folder)
    return _open_saved(f"{folder} {split}", splits[split], words)


def _vocabulary(folder: Path, given: str | None) -> Vocabulary:
    own = folder / VOCABULARY_NAME
    if given is None and not own.is_file():
        raise ValueError(f"{folder} has no {VOCABULARY_NAME}: say with --vocabulary what its classes are.")
    if given is not None:
        return Vocabulary.parse(given)
    with warnings.catch_warnings():  # words of several classes: whoever wrote the dataset has been told
        warnings.simplefilter("ignore", UserWarning)
        return Vocabulary.from_file(own)


def _chosen(split: str | None, there: Sequence[str], folder: Path) -> str:
    if split is None:
        split = next((name for name in (*_SPLITS, *there) if name in there), None)
    if split not in there:
        raise ValueError(f"{folder} has no split {split!r}, but {', '.join(there) or 'none'}.")
    return split


def _open_saved(name: str, dataset: Dataset, vocabulary: Vocabulary) -> Viewed:
    needed = {"image", "segmentation", "segments", "image_id"}
    if missing := sorted(needed - set(dataset.column_names)):
        raise ValueError(f"{name} lacks the columns {missing}; it has {dataset.column_names}.")
    there = [column for column in _PLACE if column in dataset.column_names]
    columns = {column: [default] * len(dataset) for column, default in _PLACE.items()}
    columns |= dataset.select_columns(there)[:]
    places = list(zip(*columns.values(), strict=True))
    return Viewed(name, vocabulary, places, without_decoding(dataset).__getitem__)


def _open_prepared(folder: Path, split: str | None, vocabulary: Vocabulary) -> Viewed:
    """Rows come from the Parquet files themselves: loading a large benchmark as a whole would take long."""
    import pyarrow.parquet as pq

    manifest = read_manifest(folder)
    split = _chosen(split, list(manifest["splits"]), folder)
    record, command = manifest["splits"][split], prepare_command(manifest, folder, split)
    paths = [folder / shard["file"] for shard in record["shards"]]
    if not record["complete"] or not all(path.is_file() for path in paths):
        raise ValueError(f"the split {split!r} of {folder} is half-written: finish it with `{command}`.")
    sums = {path: shard["sha256"] for path, shard in zip(paths, record["shards"], strict=True)}
    files, tables = {}, []
    for path in paths:
        try:
            files[path] = pq.ParquetFile(path)
            tables.append(files[path].read(list(_PLACE)).to_pydict())
        except Exception:  # Arrow raises errors of many types where a file is damaged
            require_parquet(path, sums[path], f"`{command}`")
            raise
    require = functools.cache(lambda path: require_parquet(path, sums[path], f"`{command}`"))
    places = [place for table in tables for place in zip(*(table[column] for column in _PLACE), strict=True)]
    return Viewed(f"{folder} {split}", vocabulary, places, lambda number: _parquet_row(files, number, require))


def _parquet_row(
    files: Mapping[Path, pq.ParquetFile], number: int, require: Callable[[Path], None]
) -> Mapping[str, Any]:
    """A row of several files, counted over all of them; only the rows stored together with it are read.

    `require` is called with the file that holds it, to refuse a damaged one.
    """
    for path, file in files.items():
        for group in range(file.num_row_groups):
            size = file.metadata.row_group(group).num_rows
            if number < size:
                require(path)
                (row,) = file.read_row_group(group, list(dataset_features())).slice(number, 1).to_pylist()
                return row
            number -= size
    raise IndexError(number)


def choose(viewed: Viewed, rows: int = ROWS, frames: int = FRAMES, ids: Sequence[str] = ()) -> list[list[int]]:
    """Which rows of a dataset each row of the sheet shows.

    Args:
        viewed: the dataset.
        rows: how many images, or videos, spread over it.
        frames: how many frames of a video, spread over it.
        ids: images or videos by their ids, instead.

    Raises:
        ValueError: there is nothing of such an id, or nothing at all.
    """
    videos: dict[str, list[int]] = {}
    for number, (image_id, video_id, _) in enumerate(viewed.places):
        videos.setdefault(video_id or f"image {image_id}", []).append(number)
    if not videos:
        raise ValueError(f"{viewed.name} is empty.")
    if not ids:
        groups = list(videos.values())
        return [_spread(groups[place], frames, viewed) for place in _evenly(len(groups), rows)]
    numbers = {image_id: [number] for number, (image_id, _, _) in enumerate(viewed.places)}
    if unknown := [name for name in ids if name not in numbers and name not in videos]:
        some = ", ".join(image_id for image_id, _, _ in viewed.places[:3])
        raise ValueError(f"{viewed.name} has no image or video {', '.join(unknown[:5])}; it has {some}, ...")
    return [numbers[name] if name in numbers else _spread(videos[name], frames, viewed) for name in ids]


def _spread(numbers: Sequence[int], frames: int, viewed: Viewed) -> list[int]:
    """Some frames of a video, in order."""
    ordered = sorted(numbers, key=lambda number: viewed.places[number][2])
    return [ordered[place] for place in _evenly(len(ordered), frames)]


def _evenly(length: int, wanted: int) -> list[int]:
    """Places of at most `wanted` of `length` things, the first and the last among them."""
    return np.linspace(0, length - 1, min(wanted, length)).round().astype(int).tolist()


def sheet_row(viewed: Viewed, numbers: Sequence[int]) -> SheetRow:
    """Read what a row of the sheet shows; what cannot be read is told in it."""
    row = SheetRow(_title(viewed, numbers))
    samples = []
    for number in numbers:
        try:
            samples.append(_sample(viewed.read(number), len(viewed.vocabulary)))
        except ValueError as error:
            row.problems.append(str(error))
    row.samples = samples
    if samples:
        height, width = samples[0].ids.shape
        row.title += f"   {width} x {height} pixels"
    return row


def _sample(stored: Mapping[str, Any], num_classes: int) -> Sample:
    image, ids = read_row(stored)
    learnable_ids(stored, ids)  # refuses ids that no segment describes
    unknown = sorted({s["category_id"] for s in stored["segments"] if not -1 <= s["category_id"] < num_classes})
    if unknown:
        raise ValueError(
            f"sample {stored['image_id']!r}: the classes {unknown} are not in the vocabulary of {num_classes}: is it "
            "another one?"
        )
    return Sample(image, ids, stored["segments"])


def _title(viewed: Viewed, numbers: Sequence[int]) -> str:
    image_id, video_id, frame = viewed.places[numbers[0]]
    if not video_id:
        return image_id
    if len(numbers) == 1:
        return f"{image_id}   frame {frame} of video {video_id}"
    return f"video {video_id}   frames {', '.join(str(viewed.places[number][2]) for number in numbers)}"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m train.data.view", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("dataset", type=Path, metavar="DATASET", help="the folder")
    add("--split", help="which split (default: val where there is one)")
    which = parser.add_mutually_exclusive_group()
    which.add_argument(
        "--rows", type=_positive, default=ROWS, metavar="N", help="so many images or videos, spread (%(default)s)"
    )
    which.add_argument("--ids", nargs="+", default=(), metavar="ID", help="these images, or videos")
    add("--frames", type=_positive, default=FRAMES, metavar="N", help="frames of each video (%(default)s)")
    add("--vocabulary", help="name of a packaged vocabulary, or a .json, .csv or .txt file")
    add("--out", type=Path, default=Path("sheet.png"), metavar="FILE", help=".png or .jpg to write (%(default)s)")
    return parser


def _positive(text: str) -> int:
    if not text.isdecimal() or not 0 < int(text) <= MAX_ROWS:
        raise argparse.ArgumentTypeError(f"it must be a whole number from 1 to {MAX_ROWS}, got {text!r}")
    return int(text)


@interruptible("train.data.view")
def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; the exit code is 1 if a sample could not be read, 2 if nothing could be drawn."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.out.suffix.casefold() not in (".png", ".jpg", ".jpeg"):
        parser.error(f"--out must end in .png or .jpg, got {options.out}")
    try:
        viewed = open_dataset(options.dataset, options.split, options.vocabulary)
        chosen = choose(viewed, options.rows, options.frames, options.ids)
        rows = [sheet_row(viewed, numbers) for numbers in tqdm(chosen, "Reading", unit="row")]
        heading = f"{viewed.name}: {len(rows)} rows, {len(viewed.places)} images, {len(viewed.vocabulary)} classes"
        options.out.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(options.out) as temporary:
            draw_sheet(heading, rows, viewed.vocabulary).save(temporary)
    except (OSError, ValueError) as error:
        tqdm.write(f"{parser.prog}: {error_line(error) if isinstance(error, OSError) else error}", file=sys.stderr)
        return 2
    problems = [problem for row in rows for problem in row.problems]
    tqdm.write("\n".join([f"{options.out}: {len(rows)} rows", *(f"cannot be read: {line}" for line in problems)]))
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
