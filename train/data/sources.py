"""Annotated images of external datasets, and helpers for their readers."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from PIL import ExifTags, Image

from modeling_gkc.vocabulary import Vocabulary

from .schema import NO_CLASS, VOID, ids_within

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp")
SPLITS = ("train", "val", "test")
SPLIT_NAMES = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "dev": "val",
    "test": "test",
    "testing": "test",
}
# Array operations that apply the EXIF orientations with swapped height and width.
_SIDEWAYS = {
    5: lambda array: array.T,
    6: lambda array: np.rot90(array, -1),
    7: lambda array: np.rot90(array, 2).T,
    8: np.rot90,
}

Segmentation = tuple[np.ndarray, list[dict[str, Any]]]


@dataclass
class AnnotatedImage:
    """Image file with its annotation.

    Attributes:
        image_id: Unique name within the dataset.
        path: Path of the image file.
        read: Function that maps the image height and width to ids (H, W) int32 and segments as in
            `train.data.schema`. It raises a ValueError or OSError that names the file. None with `problem`.
        split: `train`, `val`, `test`, or None if the dataset does not define splits.
        captions: Captions of the image.
        video_id: Video of a frame, or "" for a still image.
        frame: Index of the frame in its video, from 0.
        problem: Reason why the image cannot be used, if it is known before reading.
        notes: Annotations that `read` skipped, each with the name of its file.
    """

    image_id: str
    path: Path
    read: Callable[[tuple[int, int]], Segmentation] | None
    split: str | None = None
    captions: Sequence[str] = ()
    video_id: str = ""
    frame: int = 0
    problem: str = ""
    notes: list[str] = field(default_factory=list)


@dataclass
class Source:
    """External dataset: a vocabulary and the images annotated with it.

    Attributes:
        vocabulary: Classes of the dataset.
        images: Annotated images.
        problems: Unusable images and annotations that are known before reading, each with the name of its file.
        layout: Description of the detected annotation format.
        notes: Remarks on the dataset that do not exclude an image.
    """

    vocabulary: Vocabulary
    images: list[AnnotatedImage]
    problems: list[str] = field(default_factory=list)
    layout: str = ""
    notes: list[str] = field(default_factory=list)


def read_annotated(image: AnnotatedImage) -> tuple[bytes, np.ndarray, list[dict[str, Any]]]:
    """Read and check an image and its annotation.

    Returns:
        The bytes of the image file, the ids (H, W) of its upright pixels, and segments as in `train.data.schema`.

    Raises:
        ValueError: If the image or its annotation is invalid.
        OSError: If a file cannot be read.
    """
    if image.problem:
        raise ValueError(image.problem)
    try:
        content = image.path.read_bytes()
    except FileNotFoundError:
        raise FileNotFoundError(f"{image.path}: The file is missing") from None
    from modeling_gkc.image_processing_gkc import read_image  # imports torch, which --help must not need

    shape = read_image(content, name=str(image.path)).size[::-1]
    image.notes.clear()
    ids, segments = image.read(shape)
    if ids.shape != shape:
        raise ValueError(f"{image.path}: The annotation is {ids.shape} (height, width), the image {shape}")
    listed = [segment["id"] for segment in segments]
    unlisted = sorted(set(ids_within(ids).tolist()) - {VOID, *listed})
    if unlisted or len(set(listed)) < len(listed) or VOID in listed:
        raise ValueError(f"{image.path}: The ids {unlisted or listed} of its annotation are not listed exactly once")
    return content, ids, segments


def check_classes(image: AnnotatedImage, segments: Sequence[dict[str, Any]], num_classes: int) -> None:
    """Raise if a segment of an image has a class that is not in the vocabulary.

    Args:
        image: Image of the segments, named in the error.
        segments: Segments of the image.
        num_classes: Number of classes in the vocabulary.

    Raises:
        ValueError: If a class is not in the vocabulary.
    """
    classes = {segment["category_id"] for segment in segments}
    if unknown := sorted(classes - {NO_CLASS, *range(num_classes)}):
        raise ValueError(f"{image.path}: The classes {unknown} are not in the vocabulary of {num_classes}")


def image_files(folder: Path, suffixes: Sequence[str] = IMAGE_SUFFIXES) -> dict[str, Path]:
    """Return the image files, or files of other suffixes, below a folder by their relative path without suffix.

    Raises:
        ValueError: If two paths differ in the suffix only.
    """
    files: dict[str, Path] = {}
    for path in sorted(folder.rglob("*")):
        if path.suffix.casefold() in suffixes and not path.name.startswith(".") and path.is_file():
            name = path.relative_to(folder).with_suffix("").as_posix()
            if name in files:
                raise ValueError(f"{files[name]} and {path} differ in the suffix only: rename or remove one.")
            files[name] = path
    return files


def split_named(name: str) -> str | None:
    """Return the split that a folder or file name contains: train, val, test or None.

    A name with words of two splits has none, except that `test-dev` is a test split.
    """
    words = re.split(r"[^a-z0-9]+", name.casefold())
    found = {SPLIT_NAMES[bare] for word in words if (bare := word.rstrip("0123456789")) in SPLIT_NAMES}
    if found == {"test", "val"}:
        return "test"
    return found.pop() if len(found) == 1 else None


def split_of_folders(path: str) -> str | None:
    """Return the split that the folders of a relative path name, the outermost first, ignoring the file name."""
    return next((split for folder in path.split("/")[:-1] if (split := split_named(folder))), None)


def folder_pairs(folder: Path, images: Sequence[str], others: Sequence[str]) -> dict[str, tuple[Path, Path]]:
    """Find pairs of an image folder and an annotation folder, in a folder or in its split sub-folders.

    Args:
        folder: Folder of the dataset.
        images: Possible names of the image folder.
        others: Possible names of the annotation folder.

    Returns:
        The pairs of folders by the name of the sub-folder, "" for `folder` itself.
    """
    places = {"": folder} | {
        place.name: place for place in sorted(folder.iterdir()) if place.is_dir() and split_named(place.name)
    }
    found = {name: (first_folder(place, images), first_folder(place, others)) for name, place in places.items()}
    return {name: pair for name, pair in found.items() if None not in pair}


def files_of_splits(folders: Mapping[str, Path], suffixes: Sequence[str] = IMAGE_SUFFIXES) -> dict[str, Path]:
    """Return the files of several folders by split name and relative path without suffix.

    Args:
        folders: Folder of each split, "" for no split.
        suffixes: Suffixes of the files.

    Raises:
        ValueError: If two paths differ in the suffix only.
    """
    return {
        f"{split}/{name}" if split else name: path
        for split, folder in folders.items()
        for name, path in image_files(folder, suffixes).items()
    }


def relative_names(file_name: str) -> list[PurePosixPath]:
    """Return possible relative paths of a file that an annotation names, the most likely first.

    Windows separators are accepted. For an absolute path or one with `..`, the last two components and the last one
    are tried, so that nothing outside the folder of the dataset is read.

    Args:
        file_name: File name in the annotation.
    """
    names = []
    for text in dict.fromkeys((file_name, file_name.replace("\\", "/"))):
        name = PurePosixPath(text)
        is_foreign = name.is_absolute() or ".." in name.parts or ":" in name.parts[0] if name.parts else False
        names += [PurePosixPath(*name.parts[-count:]) for count in (2, 1)] if is_foreign else [name]
    return [name for name in dict.fromkeys(names) if name.name and not name.is_absolute() and ".." not in name.parts]


def first_folder(folder: Path, names: Sequence[str]) -> Path | None:
    """Return the first existing sub-folder of the given names, or None."""
    return next((folder / name for name in names if (folder / name).is_dir()), None)


def declared_shape(height: Any, width: Any, place: str) -> tuple[int, int] | None:
    """Check and return the image height and width in an annotation, or None if it has neither.

    Args:
        height: Height in the annotation.
        width: Width in the annotation.
        place: Name of the annotation for the error.

    Raises:
        ValueError: If height or width is not a positive integer.
    """
    if height is None and width is None:
        return None
    for side in (height, width):
        is_number = isinstance(side, int | float) and not isinstance(side, bool)
        if not is_number or not 0 < side < 2**31 or side != int(side):
            raise ValueError(f"{place}: Height and width must be positive integers, got {str(side)[:60]!r}")
    return int(height), int(width)


def annotated_shape(declared: tuple[int, int], shape: tuple[int, int], image: Path, place: str) -> tuple[int, int]:
    """Return the height and width of the pixels that an annotation refers to, upright or as stored.

    Args:
        declared: Height and width of the annotation.
        shape: Height and width of the upright image.
        image: Image file, whose EXIF orientation tells whether height and width are swapped as stored.
        place: Name of the annotation for the error.

    Raises:
        ValueError: If the annotation refers to an image of another size.
    """
    if declared == shape or (declared == shape[::-1] and _orientation(image) in _SIDEWAYS):
        return declared
    raise ValueError(
        f"{place}: The annotation is {declared} (height, width), its image {shape}: the image was resized or "
        "rotated after it was annotated"
    )


def upright(ids: np.ndarray, shape: tuple[int, int], image: Path) -> np.ndarray:
    """Rotate ids by the EXIF orientation of their image, if they refer to its stored pixels.

    Args:
        ids: Segment ids (H, W) or (W, H), of a size that `annotated_shape` returned.
        shape: Height and width of the upright image.
        image: Image file.

    Returns:
        The segment ids (H, W) of the upright image.
    """
    return ids if ids.shape == shape else np.ascontiguousarray(_SIDEWAYS[_orientation(image)](ids))


def _orientation(image: Path) -> int:
    with Image.open(image) as opened:
        return opened.getexif().get(ExifTags.Base.Orientation, 1)
