"""Crops of annotated regions, the input of the frozen CLIP image encoder.

Letters: N regions of an image, S side of a crop, (H, W) size of the image.
"""

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

GRAY = 128
_REGIONS_PER_PASS = 32  # of one image, on an accelerator


def crop_region(image: np.ndarray, mask: np.ndarray, size: int, keep_aspect: bool = False) -> np.ndarray:
    """Crop a region to its bounding box, gray outside its mask, and resize the crop to a square.

    Args:
        image: (H, W, 3) uint8 image.
        mask: (H, W) bool mask of the region.
        size: Side of the result in pixels.
        keep_aspect: Whether to pad the bounding box with gray to a square before resizing. Otherwise the box is
            stretched, as published.

    Returns:
        (size, size, 3) uint8 crop.

    Raises:
        ValueError: The mask is empty, or its size differs from the image's.
    """
    box = _box(image, mask)
    crop = np.where(mask[box][..., None], image[box], np.uint8(GRAY))
    if keep_aspect:
        crop = _pad_to_square(crop)
    height, width = crop.shape[:2]
    return _resize(crop, (0, width), (0, height), size)


def crop_box(image: np.ndarray, mask: np.ndarray, size: int) -> np.ndarray:
    """Crop a region to its bounding box without masking, and apply CLIP's resizing and center crop.

    CLIP's preprocessing resizes the shorter side to `size` and the longer one in proportion, then crops the central
    square.

    Args:
        image: (H, W, 3) uint8 image.
        mask: (H, W) bool mask of the region.
        size: Side of the result in pixels.

    Returns:
        (size, size, 3) uint8 crop.

    Raises:
        ValueError: The mask is empty, or its size differs from the image's.
    """
    crop = image[_box(image, mask)]
    span_y, span_x = (_middle(side, min(crop.shape[:2]), size) for side in crop.shape[:2])
    return _resize(crop, span_x, span_y, size)


def _resize(image: np.ndarray, span_x: tuple[float, float], span_y: tuple[float, float], size: int) -> np.ndarray:
    """Resize one part of an image bicubically, first in x and then in y, as Pillow did before version 13."""
    height = image.shape[0]
    window = span_x[0], 0, span_x[1], height
    narrow = Image.fromarray(image).resize((size, height), Image.Resampling.BICUBIC, window)
    window = 0, span_y[0], size, span_y[1]
    return np.asarray(narrow.resize((size, size), Image.Resampling.BICUBIC, window))


def _middle(side: int, shorter: int, size: int) -> tuple[float, float]:
    """Return the first and last coordinate along a side of the part that a resize and center crop keep.

    Only this part is resized, because the whole of a region of 1 x 1000 pixels would become 1000 times as large as
    the crop. Sizes are rounded as in torchvision's `Resize` and `CenterCrop`, which CLIP's preprocessing uses.
    """
    resized = size * side // shorter
    start = round((resized - size) / 2)
    return start * side / resized, min((start + size) * side / resized, side)


def _box(image: np.ndarray, mask: np.ndarray) -> tuple[slice, slice]:
    """Return the rows and columns of a region's bounding box."""
    if image.shape[:2] != mask.shape:
        raise ValueError(
            f"The mask is {mask.shape}, the image {image.shape[:2]} (height, width); their sizes must be equal."
        )
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    if len(rows) == 0:
        raise ValueError("The mask of the region is empty: there is nothing to crop. Skip such regions.")
    return slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1)


def _pad_to_square(crop: np.ndarray) -> np.ndarray:
    """Center a crop (h, w, 3) on a gray square (max(h, w), max(h, w), 3)."""
    height, width, _ = crop.shape
    side = max(height, width)
    square = np.full((side, side, 3), GRAY, dtype=np.uint8)
    top, left = (side - height) // 2, (side - width) // 2
    square[top : top + height, left : left + width] = crop
    return square


def crop_regions(image: Tensor, ids: Tensor, segment_ids: Tensor, size: int, keep_aspect: bool = False) -> Tensor:
    """Apply `crop_region` to several regions of an image, on the image's device.

    Args:
        image: (H, W, 3) uint8 image.
        ids: (H, W) segment id of every pixel, on the same device.
        segment_ids: (N,) segment ids of the regions.
        size: Side S of the crops in pixels.
        keep_aspect: Whether to keep the aspect ratio, see `crop_region`.

    Returns:
        (N, S, S, 3) uint8 crops. On an accelerator, values may differ by one from Pillow's.

    Raises:
        ValueError: A region has no pixel.
    """
    crops = torch.empty(len(segment_ids), size, size, 3, dtype=torch.uint8, device=image.device)
    if image.device.type == "cpu":
        pixels, labels = image.numpy(), ids.numpy()
        for crop, segment_id in zip(crops, segment_ids.tolist(), strict=True):
            crop.copy_(torch.tensor(crop_region(pixels, labels == segment_id, size, keep_aspect)))
        return crops
    for start in range(0, len(segment_ids), _REGIONS_PER_PASS):
        part = slice(start, start + _REGIONS_PER_PASS)
        masks = ids == segment_ids[part].to(ids.device)[:, None, None]
        crops[part] = resample_regions(image, masks, size, keep_aspect)
    return crops


def resample_regions(image: Tensor, masks: Tensor, size: int, keep_aspect: bool = False) -> Tensor:
    """Apply `crop_region` to several masks at once, as two matrix products.

    Args:
        image: (H, W, 3) uint8 image.
        masks: (N, H, W) bool masks of the regions, on the same device.
        size: Side S of the crops in pixels.
        keep_aspect: Whether to keep the aspect ratio, see `crop_region`.

    Returns:
        (N, S, S, 3) uint8 crops.

    Raises:
        ValueError: A mask is empty.
    """
    boxes = [_extent(masks.any(dim=2)), _extent(masks.any(dim=1))]  # in y, in x: start (N,), length (N,)
    if not (boxes[0][1] > 0).all():
        raise ValueError("The mask of a region is empty: there is nothing to crop. Skip such regions.")
    if keep_aspect:
        side = torch.maximum(boxes[0][1], boxes[1][1])
        boxes = [(start - (side - length) // 2, side) for start, length in boxes]
    with torch.autocast(image.device.type, enabled=False):
        rows, columns = (_bicubic_weights(*box, size, old) for box, old in zip(boxes, image.shape[:2], strict=True))
        # Gray is subtracted, so that gray pixels, also those beyond the image's edges, are zero and can be left out.
        values = (image.float() - GRAY) * masks[..., None]  # (N, H, W, 3)
        values = _round(torch.einsum("nsx,nyxc->nysc", columns, values))  # first in x, then in y, as in Pillow
        return (_round(torch.einsum("nty,nysc->ntsc", rows, values)) + GRAY).to(torch.uint8)


def _extent(occupied: Tensor) -> tuple[Tensor, Tensor]:
    """Return the first true position (N,) of each row (N, side), and the length (N,) up to its last one."""
    places = torch.arange(occupied.shape[1], device=occupied.device)
    first = torch.where(occupied, places, occupied.shape[1]).amin(dim=1)
    return first, torch.where(occupied, places, -1).amax(dim=1) + 1 - first


def _bicubic_weights(start: Tensor, length: Tensor, size: int, side: int) -> Tensor:
    """Return the weights (N, S, side) of a side's positions in every pixel of the resized boxes, as in Pillow.

    The kernel is Keys' cubic with a = -0.5, widened by the downscaling factor. Only positions within the box have a
    weight. Positions of a box beyond the side count in the sum by which the weights are normalized.
    """
    start, length = start[:, None, None], length[:, None, None]
    scale = length / size
    centers = (torch.arange(size, device=start.device)[:, None] + 0.5) * scale
    inside = torch.arange(side, device=start.device)
    longest = torch.arange(int(length.max()), device=start.device)

    def weights(places: Tensor) -> Tensor:
        distance = ((places + 0.5 - centers) / scale.clamp(min=1)).abs()
        near = (1.5 * distance - 2.5) * distance**2 + 1
        far = ((-0.5 * distance + 2.5) * distance - 4) * distance + 2
        cubic = torch.where(distance < 1, near, torch.where(distance < 2, far, 0.0))
        return cubic * ((places >= 0) & (places < length))

    return weights(inside - start) / weights(longest).sum(dim=-1, keepdim=True)


def _round(values: Tensor) -> Tensor:
    """Round to pixel values from which gray has been subtracted."""
    return (values + 0.5).floor().clamp(-GRAY, 255 - GRAY)


def normalize_crops(crops: Tensor, like: Tensor) -> Tensor:
    """Normalize crops with CLIP's mean and standard deviation.

    Args:
        crops: (N, S, S, 3) crops with values from 0 to 255.
        like: Tensor whose device and type the result has.

    Returns:
        (N, 3, S, S) pixel values.
    """
    mean, std = (like.new_tensor(values)[:, None, None] for values in (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD))
    return (crops.to(like.device).permute(0, 3, 1, 2).to(like.dtype) / 255 - mean) / std
