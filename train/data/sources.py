"""What readers of other people's data give: pictures, and how to get their segments."""

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
# How numpy turns an array as Pillow turns a picture that is stored on its side, by its EXIF orientation.
_SIDEWAYS = {
    5: lambda array: array.T,
    6: lambda array: np.rot90(array, -1),
    7: lambda array: np.rot90(array, 2).T,
    8: np.rot90,
}

Segmentation = tuple[np.ndarray, list[dict[str, Any]]]


@dataclass
class Picture:
    """An image file with its annotation.

    Attributes:
        image_id: its name within the data, unique.
        image: the file.
        read: height and width -> ids (H, W) int32 and segments as in `train.data.schema`; a ValueError or OSError says
            what is wrong, and where.
        split: `train`, `val`, `test`, or None where the data does not say.
        captions: sentences about the image.
        video_id: the video that it is a frame of, "" of an image alone.
        frame: its place in the video, from 0.
        problem: why it cannot be used, if that is known before it is read.
        notes: what `read` left out of its annotation, each with the name of its file.
    """

    image_id: str
    image: Path
    read: Callable[[tuple[int, int]], Segmentation]
    split: str | None = None
    captions: Sequence[str] = ()
    video_id: str = ""
    frame: int = 0
    problem: str = ""
    notes: list[str] = field(default_factory=list)


@dataclass
class Source:
    """
    Data of other people: a vocabulary and the pictures annotated with it.

    Attributes:
        vocabulary: the classes.
        pictures: the pictures.
        problems: what cannot be used, as far as it is known before pictures are read, each with the name of its file.
        layout: what the data was taken for, in words.
        notes: what is to be said of it though no picture is left out for it.
    """

    vocabulary: Vocabulary
    pictures: list[Picture]
    problems: list[str] = field(default_factory=list)
    layout: str = ""
    notes: list[str] = field(default_factory=list)


def read_annotated(picture: Picture) -> tuple[bytes, np.ndarray, list[dict[str, Any]]]:
    """
    Read an image and its annotation, with the checks that every writer of datasets needs.

    Returns:
        Bytes of the image file, ids (H, W) of its upright pixels, and segments as in `train.data.schema`.

    Raises:
        ValueError, OSError: image or annotation cannot be used; the file is named.
    """
    if picture.problem:
        raise ValueError(picture.problem)
    try:
        content = picture.image.read_bytes()
    except FileNotFoundError:
        raise FileNotFoundError(f"{picture.image}: the file is missing") from None
    from modeling_gkc.image_processing_gkc import read_image  # needs torch, which the commands' help does without

    shape = read_image(content, name=str(picture.image)).size[::-1]
    picture.notes.clear()
    ids, segments = picture.read(shape)
    if ids.shape != shape:
        raise ValueError(f"{picture.image}: the annotation is {ids.shape} (height, width), the image {shape}")
    listed = [segment["id"] for segment in segments]
    unlisted = sorted(set(ids_within(ids).tolist()) - {VOID, *listed})
    if unlisted or len(set(listed)) < len(listed) or VOID in listed:
        raise ValueError(f"{picture.image}: the ids {unlisted or listed} of its annotation are not listed just once")
    return content, ids, segments


def check_classes(picture: Picture, segments: Sequence[dict[str, Any]], num_classes: int) -> None:
    """
    Refuse segments of a picture whose class is not in the vocabulary.

    Raises:
        ValueError: naming the picture and the classes.
    """
    classes = {segment["category_id"] for segment in segments}
    if unknown := sorted(classes - {NO_CLASS, *range(num_classes)}):
        raise ValueError(f"{picture.image}: the classes {unknown} are not in the vocabulary of {num_classes}")


def image_files(folder: Path, suffixes: Sequence[str] = IMAGE_SUFFIXES) -> dict[str, Path]:
    """The images, or other files, below a folder by their path without suffix.

    Raises:
        ValueError: two differ in the suffix alone.
    """
    files: dict[str, Path] = {}
    for path in sorted(folder.rglob("*")):
        if path.suffix.casefold() in suffixes and not path.name.startswith(".") and path.is_file():
            name = path.relative_to(folder).with_suffix("").as_posix()
            if name in files:
                raise ValueError(f"{files[name]} and {path} differ in the suffix alone; rename or remove one.")
            files[name] = path
    return files


def split_named(name: str) -> str | None:
    """
    Split that a word of a folder's or a file's name stands for: train, val or test.

    Words of two splits name none, except that `test-dev` is a test.
    """
    words = re.split(r"[^a-z0-9]+", name.casefold())
    found = {SPLIT_NAMES[bare] for word in words if (bare := word.rstrip("0123456789")) in SPLIT_NAMES}
    if found == {"test", "val"}:
        return "test"
    return found.pop() if len(found) == 1 else None


def split_of_folders(path: str) -> str | None:
    """Split that the folders of a relative path stand for, the outermost first; the file's own name says nothing."""
    return next((split for folder in path.split("/")[:-1] if (split := split_named(folder))), None)


def folder_pairs(folder: Path, images: Sequence[str], others: Sequence[str]) -> dict[str, tuple[Path, Path]]:
    """
    Folders of images and of their annotations side by side, in a folder or in its sub-folders of splits.

    Args:
        folder: of the data.
        images: names that a folder of images may have.
        others: names that a folder of annotations may have.

    Returns:
        Both folders by the name of the sub-folder, "" for `folder` itself.
    """
    places = {"": folder} | {
        place.name: place for place in sorted(folder.iterdir()) if place.is_dir() and split_named(place.name)
    }
    found = {name: (first_folder(place, images), first_folder(place, others)) for name, place in places.items()}
    return {name: pair for name, pair in found.items() if None not in pair}


def files_of_splits(folders: Mapping[str, Path], suffixes: Sequence[str] = IMAGE_SUFFIXES) -> dict[str, Path]:
    """
    Files of several folders by their path without suffix, behind the name of their split.

    Args:
        folders: by split, "" for none.
        suffixes: that the files have.

    Raises:
        ValueError: two differ in the suffix alone.
    """
    return {
        f"{split}/{name}" if split else name: path
        for split, folder in folders.items()
        for name, path in image_files(folder, suffixes).items()
    }


def relative_names(file_name: str) -> list[PurePosixPath]:
    """
    Relative paths under which a file may be found that an annotation names, the likeliest ones first.

    Separators may be Windows'. Of a path on the machine of whoever annotated (absolute, or with `..`) the last two
    parts and the last one are tried; nothing outside the folder of the data is read.

    Args:
        file_name: as the annotation names it.
    """
    names = []
    for text in dict.fromkeys((file_name, file_name.replace("\\", "/"))):
        name = PurePosixPath(text)
        is_foreign = name.is_absolute() or ".." in name.parts or ":" in name.parts[0] if name.parts else False
        names += [PurePosixPath(*name.parts[-count:]) for count in (2, 1)] if is_foreign else [name]
    return [name for name in dict.fromkeys(names) if name.name and not name.is_absolute() and ".." not in name.parts]


def first_folder(folder: Path, names: Sequence[str]) -> Path | None:
    """The first folder of these names that is there."""
    return next((folder / name for name in names if (folder / name).is_dir()), None)


def declared_shape(height: Any, width: Any, place: str) -> tuple[int, int] | None:
    """
    Height and width that an annotation says its image has, None where it says neither.

    Raises:
        ValueError: one is no whole number above 0; the place is named.
    """
    if height is None and width is None:
        return None
    for side in (height, width):
        is_number = isinstance(side, int | float) and not isinstance(side, bool)
        if not is_number or not 0 < side < 2**31 or side != int(side):
            raise ValueError(f"{place}: height and width must be whole numbers above 0, got {str(side)[:60]!r}")
    return int(height), int(width)


def annotated_shape(declared: tuple[int, int], shape: tuple[int, int], image: Path, place: str) -> tuple[int, int]:
    """
    Height and width of the pixels that an annotation was drawn on: the upright ones, or those stored on their side.

    Args:
        declared: height and width that the annotation is for.
        shape: those of the upright image.
        image: its file, whose EXIF orientation says whether it is stored on its side.
        place: of the annotation, for the error.

    Raises:
        ValueError: it was drawn on a picture of another size.
    """
    if declared == shape or (declared == shape[::-1] and _orientation(image) in _SIDEWAYS):
        return declared
    raise ValueError(
        f"{place}: it is {declared} (height, width), its image {shape}: the picture was resized or turned after it "
        "was annotated"
    )


def upright(ids: np.ndarray, shape: tuple[int, int], image: Path) -> np.ndarray:
    """
    Turn ids drawn on the stored pixels of an image as its EXIF orientation turns the image.

    Args:
        ids: (H, W) or (W, H), of a size that `annotated_shape` gave.
        shape: height and width of the upright image.
        image: its file.

    Returns:
        (H, W).
    """
    return ids if ids.shape == shape else np.ascontiguousarray(_SIDEWAYS[_orientation(image)](ids))


def _orientation(image: Path) -> int:
    with Image.open(image) as picture:
        return picture.getexif().get(ExifTags.Base.Orientation, 1)
