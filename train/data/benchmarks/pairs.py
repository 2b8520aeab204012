"""Images and annotations that are found by their names."""

from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

from ..sources import Picture, Segmentation

Read = Callable[[Path, tuple[int, int]], Segmentation]


def paired(
    images: Path, annotations: Path, read: Read, split: str, suffixes: tuple[str, str] = (".jpg", ".png")
) -> list[Picture]:
    """A picture for every name that an image or an annotation in two folders has; either may turn out to be missing.

    Args:
        images, annotations: the folders.
        read: path of an annotation and height and width -> what `Picture.read` gives.
        split: of the pictures.
        suffixes: of images and of annotations.
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
) -> list[Picture]:
    """A picture for every name of a list; see `paired`."""
    return [
        Picture(name, images / f"{name}{suffixes[0]}", partial(read, annotations / f"{name}{suffixes[1]}"), split)
        for name in names
    ]


def names_in(path: Path) -> list[str]:
    """The lines of a list file, without blank ones.

    Raises:
        ValueError: there is no such file, or it is empty.
    """
    if not path.is_file():
        raise ValueError(f"There is no {path}, the list of images: the folder is not laid out as published.")
    names = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    if not names:
        raise ValueError(f"{path} is empty.")
    return names
