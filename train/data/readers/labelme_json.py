"""JSON files of labelme, one per image.

    DIR/a.jpg           DIR/a.json           or in sub-folders; folders named train, val and test are the splits

Polygons, rectangles, circles and masks are read; points and lines have no area and are skipped. Shapes with the same
label and `group_id` are one object. Smaller objects cover larger ones; pixels without an object are void, as are those
labeled `__ignore__` or `_background_`. Classes are sorted alphabetically.
"""

import base64
import io
import math
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from modeling_gkc.vocabulary import Vocabulary

from ...storage.checksums import read_json
from ..schema import NO_CLASS
from ..sources import (
    IMAGE_SUFFIXES,
    AnnotatedImage,
    Segmentation,
    Source,
    annotated_shape,
    declared_shape,
    relative_names,
    split_of_folders,
    upright,
)
from .coco_masks import PaintedObject, UnusableObjectError, paint_objects, polygon_mask

VOID_LABELS = ("__ignore__", "_background_")
_KEYS = {"shapes", "imagePath"}
_CIRCLE_POINTS = 360


def find_labelme_files(folder: Path) -> dict[Path, dict[str, Any]]:
    """Return the contents of the labelme JSON files below a folder, including incomplete ones next to an image."""
    found = {}
    for path in sorted(folder.rglob("*.json")):
        if not any(part.startswith(".") for part in path.relative_to(folder).parts):
            content = read_json(path)
            content = content if isinstance(content, dict) else {}
            found[path] = {key: value for key, value in content.items() if key != "imageData"}
    if not any(content.keys() >= _KEYS for content in found.values()):
        return {}
    return {
        path: content
        for path, content in found.items()
        if _KEYS & content.keys() or any(path.with_suffix(suffix).is_file() for suffix in IMAGE_SUFFIXES)
    }


def read_labelme(folder: Path, contents: Mapping[Path, dict[str, Any]]) -> Source:
    """Find the images of labelme files.

    Args:
        folder: Folder of the dataset.
        contents: Contents of the labelme files by path.

    Raises:
        ValueError: If no file has a labeled object.
    """
    problems, usable = [], {}
    for path, content in contents.items():
        try:
            usable[path] = _checked(folder, path, content)
        except (OSError, ValueError) as error:
            problems.append(str(error))
    labels = sorted(
        {shape["label"].strip() for content in usable.values() for shape in content["shapes"]} - {*VOID_LABELS}
    )
    if not labels:
        raise ValueError("\n  ".join([f"{folder}: No labelme JSON file contains an object.", *problems[:10]]))
    try:
        vocabulary = Vocabulary([[label] for label in labels], is_thing=[True] * len(labels))
    except ValueError as error:
        raise ValueError(f"{folder}, labels of labelme: {error}") from error
    source = Source(vocabulary, [], problems, f"JSON of labelme, {len(contents)} files")
    classes = {label: index for index, label in enumerate(labels)} | dict.fromkeys(VOID_LABELS, NO_CLASS)
    for path, content in usable.items():
        name = path.relative_to(folder).with_suffix("").as_posix()
        notes = []
        read = partial(_read_shapes, path, content, classes, notes)
        source.images.append(AnnotatedImage(name, content["image"], read, split_of_folders(name), notes=notes))
    return source


def _checked(folder: Path, path: Path, content: dict[str, Any]) -> dict[str, Any]:
    """Return the checked shapes, the declared size and the image file of a labelme file."""
    shapes, name = content.get("shapes"), content.get("imagePath")
    if not isinstance(shapes, list) or not isinstance(name, str):
        raise ValueError(f"{path}: Not a labelme file: `shapes` must be a list and `imagePath` text")
    for number, shape in enumerate(shapes, start=1):
        if not isinstance(shape, dict) or not isinstance(shape.get("label"), str) or not shape["label"].strip():
            raise ValueError(f"{path}: Shape {number} needs a label")
    places = (path.parent, folder, folder / "images")
    files = [place / relative for relative in relative_names(name) for place in places]
    image = next((file for file in files if file.is_file()), None)
    if image is None:
        raise ValueError(f"{path}: The image {name} does not exist")
    declared = declared_shape(content.get("imageHeight"), content.get("imageWidth"), str(path))
    return {"shapes": shapes, "declared": declared, "image": image}


def _read_shapes(
    path: Path, content: dict[str, Any], classes: Mapping[str, int], notes: list[str], shape: tuple[int, int]
) -> Segmentation:
    image, declared = content["image"], content["declared"]
    frame = shape if declared is None else annotated_shape(declared, shape, image, str(path))
    objects: dict[Any, PaintedObject] = {}
    for number, drawn in enumerate(content["shapes"], start=1):
        place, of_shape, label = f"{path}, shape {number}", [], drawn["label"].strip()
        try:
            mask = _shape_mask(drawn, frame, of_shape)
        except UnusableObjectError as error:
            of_shape.append(f"{error}, left out")
        except ValueError as error:
            raise ValueError(f"{place}: {error}") from error
        else:
            group = drawn.get("group_id")
            key = number if group is None else (label, str(group))
            mask = mask | objects[key].mask if key in objects else mask
            objects[key] = PaintedObject(mask, classes[label], False, place)
        notes += [f"{place}: {note}" for note in of_shape]
    if content["shapes"] and not objects:
        raise ValueError(f"{path}: None of its shapes can be used: {'; '.join(notes[:3])}")
    ids, segments = paint_objects(list(objects.values()), frame, notes)
    return upright(ids, shape, image), segments


def _shape_mask(drawn: Mapping[str, Any], shape: tuple[int, int], notes: list[str]) -> np.ndarray:
    """Draw the mask (H, W) bool of one shape.

    Raises:
        UnusableObjectError: If the shape has no area.
        ValueError: If the shape is invalid.
    """
    kind, points = drawn.get("shape_type", "polygon"), drawn.get("points")
    if not isinstance(points, list) or not all(isinstance(point, list) and len(point) == 2 for point in points):
        raise ValueError("The points must be a list of [x, y]")
    flat = [value for point in points for value in point]
    if kind == "polygon" or (kind == "rectangle" and len(points) == 4):
        return polygon_mask([flat], shape, notes)
    if kind in ("rectangle", "circle", "mask"):
        # abs(value) < 2**31 is False for NaN.
        if len(points) != 2 or not all(
            isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 2**31 for value in flat
        ):
            raise ValueError(f"A {kind} needs two points, got {str(points)[:60]}")
        if kind == "mask":
            return _pasted_mask(drawn.get("mask"), flat, shape)
        x1, y1, x2, y2 = flat
        outline = [x1, y1, x2, y1, x2, y2, x1, y2]
        if kind == "circle":  # a center and a point on the edge
            radius = math.hypot(x2 - x1, y2 - y1)
            angles = [2 * math.pi * step / _CIRCLE_POINTS for step in range(_CIRCLE_POINTS)]
            outline = [value for a in angles for value in (x1 + radius * math.cos(a), y1 + radius * math.sin(a))]
        return polygon_mask([outline], shape, notes)
    raise UnusableObjectError(f"The shape {str(kind)[:30]!r} encloses no area")


def _pasted_mask(encoded: Any, corners: list[float], shape: tuple[int, int]) -> np.ndarray:
    """Decode a base64 PNG mask and paste it between its upper left and lower right corners."""
    try:
        with Image.open(io.BytesIO(base64.b64decode(encoded, validate=True))) as image:
            inside = np.asarray(image.convert("L")) > 0
    except Exception as error:  # Pillow's decoders raise errors of many types
        raise ValueError(f"The mask cannot be read: {error}") from error
    left, top = round(corners[0]), round(corners[1])
    bottom, right = top + inside.shape[0], left + inside.shape[1]
    if (right - 1, bottom - 1) != (round(corners[2]), round(corners[3])):
        raise ValueError(f"The mask is {inside.shape} (height, width), but its points {corners} span another size")
    if left < 0 or top < 0 or bottom > shape[0] or right > shape[1]:
        raise ValueError(f"The mask reaches outside of the image of {shape} (height, width): {corners}")
    mask = np.zeros(shape, dtype=bool)
    mask[top:bottom, left:right] = inside
    return mask
