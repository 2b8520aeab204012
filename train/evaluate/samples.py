"""Rows of a prepared benchmark as images with their ground truth, at the size that is scored."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from ..data.schema import read_row, semantic_map
from ..metrics.score import Sample


def reduced_size(size: tuple[int, int], shrink_above: int | None) -> tuple[int, int]:
    """
    Height and width at which an image is scored.

    Args:
        size: of the image.
        shrink_above: as in `Protocol`.
    """
    if shrink_above is None or min(size) <= shrink_above:
        return size
    scale = shrink_above / min(size)
    height, width = (shrink_above if side == min(size) else round(side * scale) for side in size)
    return height, width


def read_sample(row: Mapping[str, Any], shrink_above: int | None = None) -> Sample:
    """
    Read one row.

    Args:
        row: in the schema of `train.data`, its pictures as they are stored.
        shrink_above: as in `Protocol`.

    Raises:
        ValueError: a picture cannot be read, or image, segmentation and segments do not fit; the sample is named.
    """
    image, ids = read_row(row)
    size = reduced_size(ids.shape, shrink_above)
    if size != ids.shape:
        image, ids = resize_bilinear(image, size), resize_nearest(ids, size)
    names = {name: row.get(name) or default for name, default in (("video_id", ""), ("frame", 0))}
    truth = semantic_map(row, ids)
    return Sample(image, ids, truth, list(row["segments"]), row["image_id"], **names)


def resize_bilinear(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """
    An image (H, W, 3) uint8 at another size, each pixel from its four neighbours, as published protocols have it.

    Pillow's bilinear filter averages over more of them when it shrinks, and would give a smoother image.
    """
    pixels = torch.tensor(image).permute(2, 0, 1)[None].float()
    resized = F.interpolate(pixels, size=size, mode="bilinear", align_corners=False, antialias=False)
    return resized.round_().clamp_(0, 255).byte()[0].permute(1, 2, 0).contiguous().numpy()


def resize_nearest(ids: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """A map (H, W) at another size, pixel i taken from floor(i * old / new), as published protocols have it."""
    rows, columns = (np.arange(new) * old // new for new, old in zip(size, ids.shape, strict=True))
    return ids[rows[:, None], columns]
