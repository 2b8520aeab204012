"""What readers of other people's data give: pictures, and how to get their segments."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from modeling_gkc.vocabulary import Vocabulary

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp")
SPLIT_NAMES = {"train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val"}

Segmentation = tuple[np.ndarray, list[dict[str, Any]]]


@dataclass
class Picture:
    """An image file with its annotation.

    Attributes:
        image_id: its name within the data, unique.
        image: the file.
        read: height and width -> ids (H, W) int32 and segments as in `train.data.schema`; a ValueError or OSError says
            what is wrong, and where.
        split: `train`, `val`, or None where the data does not say.
        captions: sentences about the image.
        video_id: the video that it is a frame of, "" of an image alone.
        frame: its place in the video, from 0.
        problem: why it cannot be used, if that is known before it is read.
    """

    image_id: str
    image: Path
    read: Callable[[tuple[int, int]], Segmentation]
    split: str | None = None
    captions: Sequence[str] = ()
    video_id: str = ""
    frame: int = 0
    problem: str = ""


@dataclass
class Source:
    """A vocabulary, the pictures annotated with it, and problems found so far, each with the name of its file."""

    vocabulary: Vocabulary
    pictures: list[Picture]
    problems: list[str] = field(default_factory=list)


def image_files(folder: Path) -> dict[str, Path]:
    """The images below a folder by their path without suffix.

    Raises:
        ValueError: two differ in the suffix alone.
    """
    files: dict[str, Path] = {}
    for path in sorted(folder.rglob("*")):
        if path.suffix.casefold() in IMAGE_SUFFIXES and not path.name.startswith("."):
            name = path.relative_to(folder).with_suffix("").as_posix()
            if name in files:
                raise ValueError(f"{files[name]} and {path} differ in the suffix alone; rename or remove one.")
            files[name] = path
    return files


def split_named(path: str) -> str | None:
    """The split that a part of a path, or a word of a file's name, stands for."""
    words = path.casefold().replace("_", "/").replace("-", "/").replace(".", "/").split("/")
    found = {SPLIT_NAMES[bare] for word in words if (bare := word.rstrip("0123456789")) in SPLIT_NAMES}
    return found.pop() if len(found) == 1 else None


def first_folder(folder: Path, names: Sequence[str]) -> Path | None:
    """The first folder of these names that is there."""
    return next((folder / name for name in names if (folder / name).is_dir()), None)
