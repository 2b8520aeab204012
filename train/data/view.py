"""Draw samples of a dataset with overlays and legends, to check its classes and masks by eye.

    python -m train.data.view data/ade20k_150 --out sheet.png
    python -m train.data.view data/ade20k_150 --split train --rows 20
    python -m train.data.view data/vspw_124 --rows 3 --frames 6          one row per video
    python -m train.data.view data/coco --ids 000000000139 000000000285
    python -m train.data.view my_dataset --vocabulary tools.json

DATASET is a folder that `python -m train.data.prepare`, `python -m train.data.from_folder` or
`datasets.save_to_disk` wrote. If it does not contain a vocabulary.json, name its classes with --vocabulary.

Check that the class names match the objects (class ids that are off by one are easy to see), that outlines follow
the objects, and that annotated objects are not hatched as void.
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
_PLACE = {"image_id": "", "video_id": "", "frame": 0}  # columns and their defaults for datasets without videos
_SPLITS = ("val", "validation", "test", "train")


@dataclass
class Viewed:
    """Dataset split with random access to single rows.

    Attributes:
        name: Display name of dataset and split.
        vocabulary: Classes of the dataset.
        places: Image id, video id and frame number of every row, in row order.
        read: Function that maps a row number to the stored row.
    """

    name: str
    vocabulary: Vocabulary
    places: list[tuple[str, str, int]]
    read: Callable[[int], Mapping[str, Any]]


def open_dataset(folder: Path, split: str | None = None, vocabulary: str | None = None) -> Viewed:
    """Open one split of a prepared benchmark or of a dataset that `save_to_disk` wrote.

    Args:
        folder: Folder of the dataset.
        split: Name of the split. None takes val, if there is one.
        vocabulary: Name or file, as for `Vocabulary.parse`. None takes the vocabulary file of the dataset.

    Raises:
        ValueError: If the dataset or split does not exist, is incomplete, or has no vocabulary.
    """
    from datasets import DatasetDict

    if not folder.is_dir():
        raise ValueError(f"{folder} is not a directory.")
    words = _vocabulary(folder, vocabulary)
    if is_prepared(folder):
        return _open_prepared(folder, split, words)
    if not {"dataset_dict.json", "dataset_info.json"} & {path.name for path in folder.iterdir()}:
        raise ValueError(f"{folder} is neither a prepared benchmark nor a dataset written by `save_to_disk`.")
    found = load_saved(folder)
    splits = dict(found) if isinstance(found, DatasetDict) else {"all": found}
    split = _chosen(split, list(splits), folder)
    return _open_saved(f"{folder} {split}", splits[split], words)


def _vocabulary(folder: Path, given: str | None) -> Vocabulary:
    own = folder / VOCABULARY_NAME
    if given is None and not own.is_file():
        raise ValueError(f"{folder} has no {VOCABULARY_NAME}: name its classes with --vocabulary.")
    if given is not None:
        return Vocabulary.parse(given)
    with warnings.catch_warnings():  # the command that wrote the dataset already warned
        warnings.simplefilter("ignore", UserWarning)
        return Vocabulary.from_file(own)


def _chosen(split: str | None, there: Sequence[str], folder: Path) -> str:
    if split is None:
        split = next((name for name in (*_SPLITS, *there) if name in there), None)
    if split not in there:
        raise ValueError(f"{folder} has no split {split!r}. Its splits are: {', '.join(there) or 'none'}.")
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
    """Open one split of a prepared benchmark without loading whole Parquet files, which would be slow."""
    import pyarrow.parquet as pq

    manifest = read_manifest(folder)
    split = _chosen(split, list(manifest["splits"]), folder)
    record, command = manifest["splits"][split], prepare_command(manifest, folder, split)
    paths = [folder / shard["file"] for shard in record["shards"]]
    if not record["complete"] or not all(path.is_file() for path in paths):
        raise ValueError(f"The split {split!r} of {folder} is incomplete: finish it with `{command}`.")
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
    """Return one row, numbered over all files, by reading only its row group.

    Args:
        files: Open Parquet files by path, in row order.
        number: Number of the row over all files.
        require: Check that is called with the path of the file, and raises if the file is damaged.
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
    """Select the dataset rows for each row of the sheet.

    Args:
        viewed: The dataset split.
        rows: Number of images or videos, spread evenly over the split.
        frames: Number of frames of each video, spread evenly over the video.
        ids: Image or video ids to select instead.

    Returns:
        For each row of the sheet, the numbers of its dataset rows.

    Raises:
        ValueError: If an id is unknown, or the split is empty.
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
    """Return evenly spaced frames of a video, in order."""
    ordered = sorted(numbers, key=lambda number: viewed.places[number][2])
    return [ordered[place] for place in _evenly(len(ordered), frames)]


def _evenly(length: int, wanted: int) -> list[int]:
    """Return up to `wanted` evenly spaced indices below `length`, including the first and the last."""
    return np.linspace(0, length - 1, min(wanted, length)).round().astype(int).tolist()


def sheet_row(viewed: Viewed, numbers: Sequence[int]) -> SheetRow:
    """Read the samples of one row of the sheet and list those that cannot be read."""
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
    learnable_ids(stored, ids)  # raises if an id has no segment
    unknown = sorted({s["category_id"] for s in stored["segments"] if not -1 <= s["category_id"] < num_classes})
    if unknown:
        raise ValueError(
            f"Sample {stored['image_id']!r} has class ids {unknown}, but the vocabulary has {num_classes} classes: "
            "name the vocabulary of the dataset with --vocabulary."
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
    add("dataset", type=Path, metavar="DATASET", help="folder of the dataset")
    add("--split", help="split to draw (default: val, if there is one)")
    which = parser.add_mutually_exclusive_group()
    which.add_argument(
        "--rows",
        type=_positive,
        default=ROWS,
        metavar="N",
        help="number of evenly spaced images or videos to draw (default: %(default)s)",
    )
    which.add_argument("--ids", nargs="+", default=(), metavar="ID", help="ids of the images or videos to draw")
    add(
        "--frames",
        type=_positive,
        default=FRAMES,
        metavar="N",
        help="number of frames to draw of each video (default: %(default)s)",
    )
    add("--vocabulary", help="packaged vocabulary name, or a .json, .csv or .txt file (default: from the dataset)")
    add(
        "--out",
        type=Path,
        default=Path("sheet.png"),
        metavar="FILE",
        help=".png or .jpg file to write (default: %(default)s)",
    )
    return parser


def _positive(text: str) -> int:
    if not text.isdecimal() or not 0 < int(text) <= MAX_ROWS:
        raise argparse.ArgumentTypeError(f"must be an integer from 1 to {MAX_ROWS}, got {text!r}")
    return int(text)


@interruptible("train.data.view")
def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code: 1 if a sample could not be read, 2 if nothing was drawn."""
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
    tqdm.write("\n".join([f"{options.out}: {len(rows)} rows", *(f"Cannot read: {line}" for line in problems)]))
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
