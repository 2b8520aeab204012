"""Images of a prepared benchmark with their ground truth, at the size of the scored maps."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from ..data.schema import read_row, semantic_map
from ..metrics.score import Sample


def reduced_size(size: tuple[int, int], shrink_above: int | None) -> tuple[int, int]:
    """Compute the (height, width) at which an image is scored.

    Args:
        size: (height, width) of the image.
        shrink_above: Maximum shorter side in pixels, see `Protocol`; None for no maximum.
    """
    if shrink_above is None or min(size) <= shrink_above:
        return size
    scale = shrink_above / min(size)
    height, width = (shrink_above if side == min(size) else round(side * scale) for side in size)
    return height, width


def read_sample(row: Mapping[str, Any], shrink_above: int | None = None) -> Sample:
    """Decode the image and the annotation of one row.

    Args:
        row: Row in the schema of `train.data`, with images not decoded.
        shrink_above: Maximum shorter side in pixels, see `Protocol`; None for no maximum.

    Raises:
        ValueError: The image or the annotation cannot be read, or they do not fit together; the message names the
            sample.
    """
    image, ids = read_row(row)
    size = reduced_size(ids.shape, shrink_above)
    if size != ids.shape:
        image, ids = resize_bilinear(image, size), resize_nearest(ids, size)
    names = {name: row.get(name) or default for name, default in (("video_id", ""), ("frame", 0))}
    truth = semantic_map(row, ids)
    return Sample(image, ids, truth, list(row["segments"]), row["image_id"], **names)


def resize_bilinear(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Resize an image (H, W, 3) uint8 to `size` by bilinear interpolation without antialiasing.

    Published protocols interpolate four neighboring pixels; Pillow's bilinear filter averages more when it
    downsamples.
    """
    pixels = torch.tensor(image).permute(2, 0, 1)[None].float()
    resized = F.interpolate(pixels, size=size, mode="bilinear", align_corners=False, antialias=False)
    return resized.round_().clamp_(0, 255).byte()[0].permute(1, 2, 0).contiguous().numpy()


def resize_nearest(ids: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Resize a map (H, W) to `size`: as in published protocols, pixel i is read at floor(i * old / new)."""
    rows, columns = (np.arange(new) * old // new for new, old in zip(size, ids.shape, strict=True))
    return ids[rows[:, None], columns]
