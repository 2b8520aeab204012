"""Rasterization of annotated polygons and run lengths to one segmentation.

Polygons are drawn with pycocotools, which crashes on NaN or large coordinates, so that this module checks them first.
Run lengths are decoded by `modeling_gkc.run_length`.
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
    """Error for an object without area, which is skipped and reported while its image is kept."""


@dataclass(frozen=True)
class PaintedObject:
    """Object of an image.

    Attributes:
        mask: Mask (H, W) bool.
        category_id: Position of its class in the vocabulary.
        iscrowd: Whether it marks a group of objects.
        place: File and annotation, for reports.
    """

    mask: np.ndarray
    category_id: int
    iscrowd: bool
    place: str


def paint_objects(objects: Sequence[PaintedObject], shape: tuple[int, int], notes: list[str]) -> Segmentation:
    """Paint objects from the largest to the smallest, since the smaller of two overlapping objects is usually on top.

    Args:
        objects: Objects of one image.
        shape: Height and width of the image.
        notes: List that receives a line for each object without visible pixels.

    Returns:
        Ids (H, W) int32, 0 for void, and segments as in `train.data.schema`.
    """
    ids, segments, places = np.full(shape, VOID, dtype=np.int32), [], []
    areas = [int(painted.mask.sum()) for painted in objects]
    for index in sorted(range(len(objects)), key=lambda index: -areas[index]):
        painted = objects[index]
        if not areas[index]:
            notes.append(f"{painted.place}: Left out, because it covers no pixel of the image")
            continue
        segments.append({"id": len(segments) + 1, "category_id": painted.category_id, "iscrowd": painted.iscrowd})
        places.append(painted.place)
        ids[painted.mask] = len(segments)
    present = set(ids_within(ids).tolist())
    hidden = [place for place, segment in zip(places, segments, strict=True) if segment["id"] not in present]
    notes += [f"{place}: Smaller objects cover it wholly, left out" for place in hidden]
    return ids, [segment for segment in segments if segment["id"] in present]


def segmentation_mask(segmentation: Any, shape: tuple[int, int], notes: list[str]) -> np.ndarray:
    """Draw the `segmentation` of a COCO annotation: polygons, or compressed or uncompressed run lengths.

    Args:
        segmentation: Value in the JSON file.
        shape: Height and width of the image.
        notes: List that receives a line for each skipped ring.

    Returns:
        The mask (H, W) bool.

    Raises:
        UnusableObjectError: If the segmentation is missing, empty or has a ring with an odd number of values.
        ValueError: If a coordinate is not finite or far outside the image, or run lengths have another size.
    """
    if segmentation is None or segmentation == [] or segmentation == {}:
        raise UnusableObjectError("The annotation has no segmentation (a box alone?)")
    if isinstance(segmentation, Mapping):
        return run_length_mask(segmentation, shape)
    if not isinstance(segmentation, list):
        raise ValueError(
            f"The segmentation cannot be read: neither polygons nor run lengths, {str(segmentation)[:60]}"
        )
    rings = [segmentation] if all(isinstance(number, int | float) for number in segmentation) else segmentation
    return polygon_mask(rings, shape, notes)


def run_length_mask(code: Mapping[str, Any], shape: tuple[int, int]) -> np.ndarray:
    """Decode the run lengths of an image of the given height and width to a mask (H, W) bool.

    Raises:
        ValueError: If `modeling_gkc.run_length.checked_runs` rejects the run lengths.
    """
    try:
        checked_runs(code, shape)
        return decode_rle(code)
    except ValueError as error:
        raise ValueError(f"The segmentation cannot be read: {error}") from error


def polygon_mask(rings: Sequence[Any], shape: tuple[int, int], notes: list[str]) -> np.ndarray:
    """Draw the union of polygons with pycocotools.

    Args:
        rings: Polygons [x1, y1, x2, y2, ...] in pixels.
        shape: Height and width of the image. Polygons may exceed it by the length of its longer side.
        notes: List that receives a line for each skipped ring.

    Returns:
        The mask (H, W) bool.

    Raises:
        UnusableObjectError: If a ring has an odd number of values, no ring is usable, or all coordinates are in 0..1,
            like fractions of the image size.
        ValueError: If a coordinate is not a finite number or is too far outside.
        RuntimeError: If pycocotools is not installed.
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
        raise UnusableObjectError(f"None of its polygons has three points{advice}")
    if max(shape) > 1 and all(0 <= value <= 1 for ring in kept for value in ring):
        raise UnusableObjectError(
            "All its coordinates lie in 0..1: they must be pixels, not shares of the image's width and height"
        )
    notes += short
    try:
        from pycocotools import mask as coder
    except ImportError as error:
        raise RuntimeError("Polygons require pycocotools: pip install pycocotools") from error
    return coder.decode(coder.merge(coder.frPyObjects(kept, *shape))).astype(bool)


def _check_numbers(ring: Any, name: str, shape: tuple[int, int]) -> None:
    if not isinstance(ring, list | tuple):
        raise ValueError(f"The segmentation cannot be read: {name} must be a list of numbers, got {str(ring)[:60]}")
    longest = max(shape)
    for value in ring:
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ValueError(
                f"The segmentation cannot be read: {name} contains {str(value)[:60]!r}, which is not a number"
            )
        # JSON integers may be too large for a float.
        if (isinstance(value, float) and not math.isfinite(value)) or not -longest <= value <= 2 * longest:
            raise ValueError(
                f"The segmentation cannot be read: {name} holds the coordinate {str(value)[:60]}, far outside of the "
                f"image of {shape} (height, width)"
            )
