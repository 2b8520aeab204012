"""Joint augmentations of an image and its segment ids."""

from dataclasses import dataclass

import numpy as np
from PIL import Image

from .schema import VOID

PADDING_GRAY = 128


@dataclass(frozen=True)
class JointTransform:
    """Random horizontal flip, scale jitter and fixed-size crop.

    The scale is relative to the scale at which the image fits the crop, as in detectron2's large-scale jitter (0.1 to
    2.0); the paper uses 0.8 to 1.2. Only the cropped part of the image is resized.

    Attributes:
        crop_size: Side of the square crop in pixels. The image is scaled to fit it, times a random factor, and then
            cropped at random or padded to the right and bottom with gray (void in the segmentation). None keeps the
            image size.
        scale_range: Minimum and maximum of the random factor.
        flip_probability: Probability of a horizontal flip.
        padding: Whether to pad an image that is smaller than the crop.
    """

    crop_size: int | None = 512
    scale_range: tuple[float, float] = (0.8, 1.2)
    flip_probability: float = 0.5
    padding: bool = True

    def __call__(
        self, image: np.ndarray, ids: np.ndarray, generator: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray]:
        """Transform an image (H, W, 3) uint8 and its ids (H, W)."""
        if generator.random() < self.flip_probability:
            # Pillow flips three times faster than NumPy.
            image = np.asarray(Image.fromarray(np.ascontiguousarray(image)).transpose(Image.Transpose.FLIP_LEFT_RIGHT))
            ids = ids[:, ::-1]
        if self.crop_size is not None:
            scaled = scaled_size(ids.shape, generator.uniform(*self.scale_range) * self.crop_size / max(ids.shape))
            top, left = (int(generator.integers(0, max(side - self.crop_size, 0) + 1)) for side in scaled)
            height, width = (min(side, self.crop_size) for side in scaled)
            image, ids = resize_window(image, ids, scaled, (top, left, height, width))
            if self.padding:
                image, ids = pad(image, ids, self.crop_size)
        return np.ascontiguousarray(image), np.ascontiguousarray(ids)


def scaled_size(shape: tuple[int, int], factor: float) -> tuple[int, int]:
    """Return the height and width of an image of the given shape after scaling."""
    height, width = (max(1, round(side * factor)) for side in shape)
    return height, width


def resize_window(
    image: np.ndarray, ids: np.ndarray, scaled: tuple[int, int], window: tuple[int, int, int, int]
) -> tuple[np.ndarray, np.ndarray]:
    """Return a window of an image after bilinear resizing, and of its ids after nearest-neighbor resizing.

    Only the pixels that contribute to the window are read. The ids equal those of the fully resized image; image
    values may differ by one through rounding.

    Args:
        image: Image (H, W, 3) uint8.
        ids: Segment ids (H, W).
        scaled: Height and width of the fully resized image.
        window: Top, left, height and width of the window in the resized image.
    """
    top, left, height, width = window
    rows = _nearest(ids.shape[0], scaled[0])[top : top + height]
    columns = _nearest(ids.shape[1], scaled[1])[left : left + width]
    down, across = ids.shape[0] / scaled[0], ids.shape[1] / scaled[1]
    # Pillow raises if the box exceeds the image by a rounding error.
    bottom, right = min((top + height) * down, ids.shape[0]), min((left + width) * across, ids.shape[1])
    box = (left * across, top * down, right, bottom)
    image = Image.fromarray(np.ascontiguousarray(image))
    resized = image.resize((width, height), Image.Resampling.BILINEAR, box)
    return np.asarray(resized), ids[rows][:, columns]


def _nearest(old: int, new: int) -> np.ndarray:
    """Return the source index of each of `new` positions in nearest-neighbor resizing from `old` positions."""
    return ((np.arange(new) + 0.5) * old / new).astype(np.int64)


def pad(image: np.ndarray, ids: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Pad an image and its ids to a square of `size` pixels with gray and void at the right and bottom."""
    height, width = ids.shape
    padded = np.full((size, size, 3), PADDING_GRAY, dtype=np.uint8)
    padded_ids = np.full((size, size), VOID, dtype=ids.dtype)
    padded[:height, :width], padded_ids[:height, :width] = image, ids
    return padded, padded_ids
