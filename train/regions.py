"""Region crops: what a frozen CLIP image encoder gets to see of one annotated region."""

import numpy as np
from PIL import Image
from torch import Tensor
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

GREY = 128


def crop_region(image: np.ndarray, mask: np.ndarray, size: int, keep_aspect: bool = False) -> np.ndarray:
    """Cut one region out, grey outside its mask, resized to a square.

    Args:
        image: (H, W, 3) uint8.
        mask: (H, W) bool, the region's pixels.
        size: side of the result in pixels.
        keep_aspect: pad the bounding box with grey to a square before resizing; otherwise it is stretched, as
            published.

    Returns:
        (size, size, 3) uint8.

    Raises:
        ValueError: the mask is empty or does not belong to the image.
    """
    if image.shape[:2] != mask.shape:
        raise ValueError(f"The mask is {mask.shape}, the image {image.shape[:2]} (height, width); they must be equal.")
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    if len(rows) == 0:
        raise ValueError("The mask of the region is empty: there is nothing to crop. Skip such regions.")
    box = slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1)
    crop = np.where(mask[box][..., None], image[box], np.uint8(GREY))
    if keep_aspect:
        crop = _pad_to_square(crop)
    return np.asarray(Image.fromarray(crop).resize((size, size), Image.Resampling.BICUBIC))


def _pad_to_square(crop: np.ndarray) -> np.ndarray:
    """(h, w, 3) -> (max(h, w), max(h, w), 3), the crop in the middle of grey."""
    height, width, _ = crop.shape
    side = max(height, width)
    square = np.full((side, side, 3), GREY, dtype=np.uint8)
    top, left = (side - height) // 2, (side - width) // 2
    square[top : top + height, left : left + width] = crop
    return square


def normalize_crops(crops: Tensor, like: Tensor) -> Tensor:
    """Crops (N, size, size, 3) in 0..255 -> CLIP's input (N, 3, size, size), of the device and type of `like`."""
    mean, std = (like.new_tensor(values)[:, None, None] for values in (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD))
    return (crops.to(like.device).permute(0, 3, 1, 2).to(like.dtype) / 255 - mean) / std
