"""Pairing of image and annotation files by name."""

from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

from ..sources import AnnotatedImage, Segmentation

Read = Callable[[Path, tuple[int, int]], Segmentation]


def paired(
    images: Path, annotations: Path, read: Read, split: str, suffixes: tuple[str, str] = (".jpg", ".png")
) -> list[AnnotatedImage]:
    """Pair the images and annotations of two folders by name; a missing file is reported when it is read.

    Args:
        images: Folder of the images.
        annotations: Folder of the annotations.
        read: Function that maps an annotation file and the image height and width to ids and segments.
        split: Split of the images.
        suffixes: Suffixes of images and annotations.
    """
    folders = zip((images, annotations), suffixes, strict=True)
    names = {path.stem for folder, suffix in folders for path in folder.glob(f"[!.]*{suffix}")}
    return listed(sorted(names), images, annotations, read, split, suffixes)


def listed(
    names: Iterable[str],
    images: Path,
    annotations: Path,
    read: Read,
    split: str,
    suffixes: tuple[str, str] = (".jpg", ".png"),
) -> list[AnnotatedImage]:
    """Pair the images and annotations of the listed names; the other arguments are those of `paired`."""
    return [
        AnnotatedImage(
            name, images / f"{name}{suffixes[0]}", partial(read, annotations / f"{name}{suffixes[1]}"), split
        )
        for name in names
    ]


def names_in(path: Path) -> list[str]:
    """Return the non-blank lines of a list file.

    Raises:
        ValueError: If the file does not exist or is empty.
    """
    if not path.is_file():
        raise ValueError(f"There is no {path}, the list of images: the folder is not laid out as published.")
    names = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    if not names:
        raise ValueError(f"{path} is empty.")
    return names
