"""Region crops: what a frozen CLIP image encoder gets to see of one annotated region.

Letters: N regions of an image, S side of a crop, (H, W) size of the image.
"""

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

GREY = 128
_REGIONS_PER_PASS = 32  # of one image, on an accelerator


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
    box = _box(image, mask)
    crop = np.where(mask[box][..., None], image[box], np.uint8(GREY))
    if keep_aspect:
        crop = _pad_to_square(crop)
    height, width = crop.shape[:2]
    return _resize(crop, (0, width), (0, height), size)


def crop_box(image: np.ndarray, mask: np.ndarray, size: int) -> np.ndarray:
    """Cut the bounding box of one region out with all that is in it, and see the middle of it as CLIP does.

    CLIP's preprocessing: the shorter side is resized to `size`, the longer one in proportion, and the central square
    is cut out.

    Args, returns and raises: as `crop_region`.
    """
    crop = image[_box(image, mask)]
    span_y, span_x = (_middle(side, min(crop.shape[:2]), size) for side in crop.shape[:2])
    return _resize(crop, span_x, span_y, size)


def _resize(image: np.ndarray, span_x: tuple[float, float], span_y: tuple[float, float], size: int) -> np.ndarray:
    """Bicubic, of one part of an image: first in x and then in y, as all of Pillow did before version 13."""
    height = image.shape[0]
    window = span_x[0], 0, span_x[1], height
    narrow = Image.fromarray(image).resize((size, height), Image.Resampling.BICUBIC, window)
    window = 0, span_y[0], size, span_y[1]
    return np.asarray(narrow.resize((size, size), Image.Resampling.BICUBIC, window))


def _middle(side: int, shorter: int, size: int) -> tuple[float, float]:
    """First and last coordinate along a side of what is left after resizing and cutting out the middle.

    Only that part is resized: of a region of 1 x 1000 pixels the whole would be 1000 times as large as the crop. Sizes
    are rounded as torchvision's `Resize` and `CenterCrop` do, of which CLIP's own preprocessing is made.
    """
    resized = size * side // shorter
    start = round((resized - size) / 2)
    return start * side / resized, min((start + size) * side / resized, side)


def _box(image: np.ndarray, mask: np.ndarray) -> tuple[slice, slice]:
    """Rows and columns of a region's bounding box."""
    if image.shape[:2] != mask.shape:
        raise ValueError(f"The mask is {mask.shape}, the image {image.shape[:2]} (height, width); they must be equal.")
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    if len(rows) == 0:
        raise ValueError("The mask of the region is empty: there is nothing to crop. Skip such regions.")
    return slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1)


def _pad_to_square(crop: np.ndarray) -> np.ndarray:
    """(h, w, 3) -> (max(h, w), max(h, w), 3), the crop in the middle of grey."""
    height, width, _ = crop.shape
    side = max(height, width)
    square = np.full((side, side, 3), GREY, dtype=np.uint8)
    top, left = (side - height) // 2, (side - width) // 2
    square[top : top + height, left : left + width] = crop
    return square


def crop_regions(image: Tensor, ids: Tensor, segment_ids: Tensor, size: int, keep_aspect: bool = False) -> Tensor:
    """`crop_region` of several regions of an image, computed where the image is.

    Args:
        image: (H, W, 3) uint8.
        ids: (H, W) segment of every pixel, on the same device.
        segment_ids: (N,) the regions.
        size: S.
        keep_aspect: see `crop_region`.

    Returns:
        (N, S, S, 3) uint8. Off the CPU a value may be one off Pillow's.

    Raises:
        ValueError: a region has no pixel.
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
    """`crop_region` of all masks (N, H, W) at once, as two products of matrices: (N, S, S, 3) uint8."""
    boxes = [_extent(masks.any(dim=2)), _extent(masks.any(dim=1))]  # in y, in x: start (N,), length (N,)
    if not (boxes[0][1] > 0).all():
        raise ValueError("The mask of a region is empty: there is nothing to crop. Skip such regions.")
    if keep_aspect:
        side = torch.maximum(boxes[0][1], boxes[1][1])
        boxes = [(start - (side - length) // 2, side) for start, length in boxes]
    with torch.autocast(image.device.type, enabled=False):
        rows, columns = (_bicubic_weights(*box, size, old) for box, old in zip(boxes, image.shape[:2], strict=True))
        # Less grey, so that all that is grey, also beyond the edges of the image, is zero and may be left out.
        values = (image.float() - GREY) * masks[..., None]  # (N, H, W, 3)
        values = _round(torch.einsum("nsx,nyxc->nysc", columns, values))  # as Pillow: first in x, then in y
        return (_round(torch.einsum("nty,nysc->ntsc", rows, values)) + GREY).to(torch.uint8)


def _extent(occupied: Tensor) -> tuple[Tensor, Tensor]:
    """(N, side) bool -> the first occupied position (N,), and the length (N,) up to the last."""
    places = torch.arange(occupied.shape[1], device=occupied.device)
    first = torch.where(occupied, places, occupied.shape[1]).amin(dim=1)
    return first, torch.where(occupied, places, -1).amax(dim=1) + 1 - first


def _bicubic_weights(start: Tensor, length: Tensor, size: int, side: int) -> Tensor:
    """Share (N, S, side) of every position of a side in every pixel of the resized boxes, as in Pillow.

    Keys' cubic with a = -0.5, widened by the factor of reduction; only positions within the box count, and what a box
    has beyond the side counts in the sum to which the shares are normalised.
    """
    start, length = start[:, None, None], length[:, None, None]
    scale = length / size
    centres = (torch.arange(size, device=start.device)[:, None] + 0.5) * scale
    inside = torch.arange(side, device=start.device)
    longest = torch.arange(int(length.max()), device=start.device)

    def shares(places: Tensor) -> Tensor:
        distance = ((places + 0.5 - centres) / scale.clamp(min=1)).abs()
        near = (1.5 * distance - 2.5) * distance**2 + 1
        far = ((-0.5 * distance + 2.5) * distance - 4) * distance + 2
        cubic = torch.where(distance < 1, near, torch.where(distance < 2, far, 0.0))
        return cubic * ((places >= 0) & (places < length))

    return shares(inside - start) / shares(longest).sum(dim=-1, keepdim=True)


def _round(values: Tensor) -> Tensor:
    """To the nearest value that a pixel can have, less grey."""
    return (values + 0.5).floor().clamp(-GREY, 255 - GREY)


def normalize_crops(crops: Tensor, like: Tensor) -> Tensor:
    """Crops (N, size, size, 3) in 0..255 -> CLIP's input (N, 3, size, size), of the device and type of `like`."""
    mean, std = (like.new_tensor(values)[:, None, None] for values in (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD))
    return (crops.to(like.device).permute(0, 3, 1, 2).to(like.dtype) / 255 - mean) / std
