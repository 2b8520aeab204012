"""Panoptic label pictures in which one number says class and instance."""

from collections.abc import Callable
from pathlib import Path

import numpy as np

from ..schema import NO_CLASS, VOID, ids_within
from ..sources import Segmentation
from .base import look_up

BITS_16 = ("I;16", "I;16B", "I")  # Pillow's modes of grey 16-bit pictures; in 8 bits the numbers have been cut off


def segments_of_values(
    values: np.ndarray, meaning: Callable[[int], tuple[int, bool] | None], path: Path
) -> Segmentation:
    """Segments whose ids are the published values, so that nothing of these is lost.

    Args:
        values: (H, W) int32, not negative.
        meaning: of a value: train id and whether it is a crowd; train id -1 is void; None: there is no such value.
        path: the file, for the error.

    Returns:
        ids (H, W) int32, 0 for void, and segments as in `train.data.schema`, by rising id.

    Raises:
        ValueError: there are values without a meaning; file and values are named.
    """
    known = {value: found for value in ids_within(values).tolist() if (found := meaning(value)) is not None}
    segments = [
        {"id": value, "category_id": category, "iscrowd": crowd}
        for value, (category, crowd) in known.items()
        if category != NO_CLASS
    ]
    new_values = {value: VOID if category == NO_CLASS else value for value, (category, _) in known.items()}
    return look_up(values, new_values, (), path), segments
