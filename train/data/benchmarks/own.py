"""Custom data as benchmarks: a folder of annotated images, or a list of images and masks."""

import sys
from collections.abc import Callable
from pathlib import Path

from tqdm.auto import tqdm

from modeling_gkc.vocabulary import Vocabulary

from ..from_folder import LAYOUTS, find_source, shares
from ..readers import list_file, mask_folder
from ..sources import AnnotatedImage, Source
from .base import Benchmark

_VAL_SHARE = 0.1
_SPLITS = "If the data does not define splits, a tenth of the images, selected by a hash of their names, becomes val."
FOLDER_LAYOUT = f"""\
Custom images in a folder, annotated with masks, COCO JSON, labelme or YOLO files.

{_SPLITS}

{LAYOUTS}"""
LIST_LAYOUT = f"""\
Custom images and masks in a list file (Parquet, CSV or JSON lines).

{_SPLITS}

{list_file.__doc__.strip()}

{mask_folder.__doc__.strip().split("splits.", 1)[1].strip()}"""


def _find(read: Callable[[Path], Source], source: Path, split: str) -> list[AnnotatedImage]:
    """Return the images of a split; problems of the dataset are added to `train` as unusable images."""
    found = read(source)
    for line in (f"read as {found.layout}", *found.notes):
        tqdm.write(f"{source}, {split}: {line}", file=sys.stderr)
    images = list(dict(shares(found, _VAL_SHARE))[split])
    if split == "train":
        for number, problem in enumerate(found.problems):
            path = Path(problem.split(": ")[0])
            images.append(AnnotatedImage(f"problem-{number}", path, None, "train", problem=problem))
    return images


def find_folder(source: Path, split: str) -> list[AnnotatedImage]:
    """Return the images of a split of a folder in a layout of `train.data.from_folder`."""
    return _find(find_source, source, split)


def find_list(source: Path, split: str) -> list[AnnotatedImage]:
    """Return the images of a split of a list file."""
    return _find(list_file.read_list, source, split)


def folder_classes(source: Path) -> Vocabulary:
    """Return the vocabulary of a folder in a layout of `train.data.from_folder`."""
    return find_source(source).vocabulary


def list_classes(source: Path) -> Vocabulary:
    """Return the vocabulary of a folder with a list file."""
    return mask_folder.read_names(source / mask_folder.NAMES_FILE)[1]


_COUNTS = {"train": None, "val": None, "test": None}

BENCHMARKS = (
    Benchmark("folder", "", FOLDER_LAYOUT, find_folder, _COUNTS, make_vocabulary=folder_classes),
    Benchmark("list", "", LIST_LAYOUT, find_list, _COUNTS, make_vocabulary=list_classes),
)
