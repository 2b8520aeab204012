"""YOLO segmentation text files, one per image.

    DIR/images/train/a.jpg    DIR/labels/train/a.txt    DIR/data.yaml
    DIR/train/images/a.jpg    DIR/train/labels/a.txt    DIR/data.yaml                (Roboflow export)

`data.yaml` has `names`, a list or a mapping from numbers to names; alternatively, `classes.txt` has one name per line.
Each line of a text file is an object: its class number, then x y of each corner as fractions of the image width and
height. Smaller objects cover larger ones; pixels without an object are void. An image without a text file has no
object.
"""

from collections.abc import Mapping
from functools import partial
from pathlib import Path

import yaml

from modeling_gkc.vocabulary import Vocabulary

from ..sources import AnnotatedImage, Segmentation, Source, files_of_splits, folder_pairs, split_of_folders
from .coco_masks import PaintedObject, UnusableObjectError, paint_objects, polygon_mask

_IMAGES, _LABELS = ("images",), ("labels",)
_CLASSES_FILE = "classes.txt"
_NUMBERS_OF_A_BOX = 4
_SLACK = 0.1  # maximum distance of a corner outside the image, as a fraction of its sides


def find_yolo_names(folder: Path) -> Path | None:
    """Return the file of class names of a YOLO folder, or None for another layout."""
    files = [*sorted(folder.glob("*.yaml")), *sorted(folder.glob("*.yml")), folder / _CLASSES_FILE]
    pairs = folder_pairs(folder, _IMAGES, _LABELS)
    has_labels = any(next(labels.rglob("*.txt"), None) for _, labels in pairs.values())
    return next((file for file in files if file.is_file() and _names(file) is not None), None) if has_labels else None


def _names(path: Path) -> object | None:
    try:
        text = path.read_text(encoding="utf-8-sig")
        if path.name == _CLASSES_FILE:
            return [line.strip() for line in text.splitlines() if line.strip()]
        content = yaml.safe_load(text)
    except (ValueError, yaml.YAMLError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    return content.get("names") if isinstance(content, dict) else None


def read_yolo(folder: Path, names: Path) -> Source:
    """Find the images of a YOLO folder.

    Args:
        folder: Folder of the dataset.
        names: File of class names.

    Raises:
        ValueError: If the names cannot be read.
    """
    classes, vocabulary = _classes(names)
    pairs = folder_pairs(folder, _IMAGES, _LABELS)
    images = files_of_splits({split: pair[0] for split, pair in pairs.items()})
    labels = files_of_splits({split: pair[1] for split, pair in pairs.items()}, (".txt",))
    labels = {name: path for name, path in labels.items() if path.name != _CLASSES_FILE}
    source = Source(vocabulary, [], [], f"YOLO segmentation, {len(labels)} text files, names in {names.name}")
    source.problems += [f"{labels[name]}: No image has this name" for name in sorted(labels.keys() - images.keys())]
    for name, path in images.items():
        notes = []
        read = partial(_read_lines, labels.get(name), classes, notes)
        source.images.append(AnnotatedImage(name, path, read, split_of_folders(name), notes=notes))
    if without := sorted(images.keys() - labels.keys()):
        source.notes.append(
            f"{len(without)} images have no text file and count as images without objects, such as "
            f"{images[without[0]]}"
        )
    return source


def _classes(path: Path) -> tuple[dict[int, int], Vocabulary]:
    """Return the vocabulary positions of the class numbers, and the vocabulary."""
    names = _names(path)
    names = dict(enumerate(names)) if isinstance(names, list) else names
    if not isinstance(names, dict) or not names:
        raise ValueError(f"{path}: `names` must be a list of names, or numbers with names.")
    for number, name in names.items():
        if isinstance(number, bool) or not isinstance(number, int) or number < 0 or not isinstance(name, str):
            raise ValueError(f"{path}, names: {number!r}: {name!r} must be a number with a name; quote names as text.")
    try:
        vocabulary = Vocabulary([[name] for name in names.values()], is_thing=[True] * len(names))
    except ValueError as error:
        raise ValueError(f"{path}, names: {error}") from error
    return {number: position for position, number in enumerate(names)}, vocabulary


def _read_lines(
    path: Path | None, classes: Mapping[int, int], notes: list[str], shape: tuple[int, int]
) -> Segmentation:
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines() if path else []
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: The file is not UTF-8 ({error})") from error
    objects, used = [], 0
    for number, line in enumerate(lines, start=1):
        place, of_line = f"{path}, line {number}", []
        if not line.strip():
            continue
        used += 1
        category, corners = _numbers(line, place, classes)
        try:
            if len(corners) == _NUMBERS_OF_A_BOX:
                raise UnusableObjectError("The line has a box only")
            sides = (shape[1], shape[0]) * (len(corners) // 2 + 1)
            ring = [corner * side for corner, side in zip(corners, sides, strict=False)]
            objects.append(PaintedObject(polygon_mask([ring], shape, of_line), category, False, place))
        except UnusableObjectError as error:
            of_line.append(f"{error}, left out")
        notes += [f"{place}: {note}" for note in of_line]
    if used and not objects:
        raise ValueError(f"{path}: None of its lines can be used: {'; '.join(notes[:3])}")
    return paint_objects(objects, shape, notes)


def _numbers(line: str, place: str, classes: Mapping[int, int]) -> tuple[int, list[float]]:
    """Parse the class position and the corners of one line.

    Raises:
        ValueError: If a value is not a number or is out of range.
    """
    first, *rest = line.split()
    if not (first.isascii() and first.isdigit() and len(first) < 10 and int(first) in classes):
        raise ValueError(f"{place}: Unknown class {first[:60]!r}")
    try:
        corners = [float(text) for text in rest]
    except ValueError as error:
        raise ValueError(f"{place}: Corners must be numbers: {error}") from error
    wrong = [text for text, corner in zip(rest, corners, strict=True) if not -_SLACK <= corner <= 1 + _SLACK]
    if wrong:
        raise ValueError(
            f"{place}: Corners are shares of the image's width and height, from 0 to 1, got {wrong[0][:60]}"
        )
    return classes[int(first)], corners
