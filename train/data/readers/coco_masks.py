"""Masks from the outlines of annotation files: checked polygons and run lengths, painted into one segmentation.

pycocotools draws the polygons. It checks nothing: NaN or large coordinates crash the process, so only what this module
has checked reaches it. Run lengths are decoded by `modeling_gkc.run_length`.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from modeling_gkc.run_length import checked_runs, decode_rle

from ..schema import VOID, ids_within
from ..sources import Segmentation

_NUMBERS_OF_A_TRIANGLE = 6


class UnusableObjectError(ValueError):
    """An object outlines no area: it is left out and reported, its picture is kept."""


@dataclass(frozen=True)
class PaintedObject:
    """
    One object of a picture.

    Attributes:
        mask: (H, W) bool.
        category_id: Position of its class in the vocabulary.
        iscrowd: Whether it marks a group of objects.
        place: File and annotation, for reports.
    """

    mask: np.ndarray
    category_id: int
    iscrowd: bool
    place: str


def paint_objects(objects: Sequence[PaintedObject], shape: tuple[int, int], notes: list[str]) -> Segmentation:
    """
    Paint objects from the largest to the smallest, because what lies on something else is nearly always the smaller.

    Args:
        objects: Objects of one picture.
        shape: Height and width of the picture.
        notes: Receives a line for each object of which no pixel is left.

    Returns:
        Ids (H, W) int32, 0 for void, and segments as in `train.data.schema`.
    """
    ids, segments, places = np.full(shape, VOID, dtype=np.int32), [], []
    areas = [int(painted.mask.sum()) for painted in objects]
    for index in sorted(range(len(objects)), key=lambda index: -areas[index]):
        painted = objects[index]
        if not areas[index]:
            notes.append(f"{painted.place}: it covers no pixel of the picture, left out")
            continue
        segments.append({"id": len(segments) + 1, "category_id": painted.category_id, "iscrowd": painted.iscrowd})
        places.append(painted.place)
        ids[painted.mask] = len(segments)
    present = set(ids_within(ids).tolist())
    hidden = [place for place, segment in zip(places, segments, strict=True) if segment["id"] not in present]
    notes += [f"{place}: smaller objects cover it wholly, left out" for place in hidden]
    return ids, [segment for segment in segments if segment["id"] in present]


def segmentation_mask(segmentation: Any, shape: tuple[int, int], notes: list[str]) -> np.ndarray:
    """
    Draw the `segmentation` of a COCO annotation: polygons, or run lengths, compressed or not.

    Args:
        segmentation: As JSON holds it.
        shape: Height and width of the picture.
        notes: Receives a line for each ring that was left out.

    Returns:
        Mask (H, W) bool.

    Raises:
        UnusableObjectError: it outlines no area: it is missing or empty, or a ring has an odd number of numbers.
        ValueError: it cannot be meant: a number that is not finite or lies far outside the picture, another size, or
            run lengths that do not cover it.
    """
    if segmentation is None or segmentation == [] or segmentation == {}:
        raise UnusableObjectError("it has no segmentation (a box alone?)")
    if isinstance(segmentation, Mapping):
        return run_length_mask(segmentation, shape)
    if not isinstance(segmentation, list):
        raise ValueError(
            f"its segmentation cannot be read: neither polygons nor run lengths, {str(segmentation)[:60]}"
        )
    rings = [segmentation] if all(isinstance(number, int | float) for number in segmentation) else segmentation
    return polygon_mask(rings, shape, notes)


def run_length_mask(code: Mapping[str, Any], shape: tuple[int, int]) -> np.ndarray:
    """
    Decode run lengths of a picture of this height and width to a mask (H, W) bool.

    Raises:
        ValueError: as in `modeling_gkc.run_length.checked_runs`.
    """
    try:
        checked_runs(code, shape)
        return decode_rle(code)
    except ValueError as error:
        raise ValueError(f"its segmentation cannot be read: {error}") from error


def polygon_mask(rings: Sequence[Any], shape: tuple[int, int], notes: list[str]) -> np.ndarray:
    """
    Draw the union of polygons as pycocotools does.

    Args:
        rings: Polygons [x1, y1, x2, y2, ...] in pixels.
        shape: Height and width of the picture. Polygons may reach beyond it by the length of its longer side.
        notes: Receives a line for each ring that was left out.

    Returns:
        Mask (H, W) bool.

    Raises:
        UnusableObjectError: a ring has an odd number of numbers, or no ring is left; or
            all coordinates lie in 0..1, as shares of the picture do.
        ValueError: a number is none, is not finite, or lies too far outside.
        RuntimeError: pycocotools is missing.
    """
    kept, short = [], []
    for number, ring in enumerate(rings, start=1):
        name = f"ring {number} of its polygons"
        _check_numbers(ring, name, shape)
        if len(ring) % 2:
            raise UnusableObjectError(f"{name} has {len(ring)} numbers, an odd one: x and y come in pairs")
        if len(ring) < _NUMBERS_OF_A_TRIANGLE:
            short.append(f"{name} has {len(ring) // 2} points and encloses no area, left out")
        else:
            kept.append([float(value) for value in ring])
    if not kept:
        is_paired = len(rings) > 2 and all(len(ring) == 2 for ring in rings)
        advice = "; write a polygon as one list [x1, y1, x2, y2, ...]" if is_paired else ""
        raise UnusableObjectError(f"none of its polygons has three points{advice}")
    if max(shape) > 1 and all(0 <= value <= 1 for ring in kept for value in ring):
        raise UnusableObjectError(
            "all its coordinates lie in 0..1: they must be pixels, not shares of the picture's width and height"
        )
    notes += short
    try:
        from pycocotools import mask as coder
    except ImportError as error:
        raise RuntimeError("Polygons are drawn by pycocotools: pip install pycocotools") from error
    return coder.decode(coder.merge(coder.frPyObjects(kept, *shape))).astype(bool)


def _check_numbers(ring: Any, name: str, shape: tuple[int, int]) -> None:
    if not isinstance(ring, list | tuple):
        raise ValueError(f"its segmentation cannot be read: {name} is no list of numbers but {str(ring)[:60]}")
    longest = max(shape)
    for value in ring:
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ValueError(f"its segmentation cannot be read: {name} holds {str(value)[:60]!r}, which is no number")
        # Integers of JSON may be too large for a float.
        if (isinstance(value, float) and not math.isfinite(value)) or not -longest <= value <= 2 * longest:
            raise ValueError(
                f"its segmentation cannot be read: {name} holds the coordinate {str(value)[:60]}, far outside of the "
                f"picture of {shape} (height, width)"
            )
