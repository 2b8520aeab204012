"""Panoptic label images whose values encode class and instance."""

from collections.abc import Callable
from pathlib import Path

import numpy as np

from ..schema import NO_CLASS, VOID, ids_within
from ..sources import Segmentation
from .base import look_up

BITS_16 = ("I;16", "I;16B", "I")  # Pillow's modes of 16-bit gray images; 8-bit images have truncated values


def segments_of_values(
    values: np.ndarray, meaning: Callable[[int], tuple[int, bool] | None], path: Path
) -> Segmentation:
    """Convert a label image to segments that keep the published values as ids.

    Args:
        values: Non-negative values (H, W) int32.
        meaning: Function that maps a value to its train id (-1 for void) and whether it is a crowd, or to None for an
            invalid value.
        path: Annotation file, for the error.

    Returns:
        The ids (H, W) int32, 0 for void, and segments as in `train.data.schema`, in increasing id order.

    Raises:
        ValueError: If the image contains invalid values.
    """
    known = {value: found for value in ids_within(values).tolist() if (found := meaning(value)) is not None}
    segments = [
        {"id": value, "category_id": category, "iscrowd": crowd}
        for value, (category, crowd) in known.items()
        if category != NO_CLASS
    ]
    new_values = {value: VOID if category == NO_CLASS else value for value, (category, _) in known.items()}
    return look_up(values, new_values, (), path), segments
