"""Augmentations that move an image and its segment ids alike."""

from dataclasses import dataclass

import numpy as np
from PIL import Image

from .schema import VOID

PADDING_GREY = 128


@dataclass(frozen=True)
class JointTransform:
    """Random flip, scale jitter and crop of fixed size.

    The scale is relative to the one at which the image fits the crop, as in detectron2's large-scale jitter (0.1 to
    2.0); the paper's is 0.8 to 1.2. Only the part of the image that the crop shows is ever scaled, so a large scale
    costs no more than a small one.

    Attributes:
        crop_size: Side in pixels of the square result: the image is scaled to fit it, times a random factor, and then
            cropped at a random place or padded to the right and bottom with grey (void in the segmentation). None
            keeps the image's size.
        scale_range: Bounds of the random factor.
        flip_probability: How often the image is mirrored.
        padding: Pad what is smaller than the crop; False keeps its size.
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
            # Pillow mirrors three times faster than NumPy copies backwards.
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
    """Height and width of an image of that shape when it is scaled."""
    height, width = (max(1, round(side * factor)) for side in shape)
    return height, width


def resize_window(
    image: np.ndarray, ids: np.ndarray, scaled: tuple[int, int], window: tuple[int, int, int, int]
) -> tuple[np.ndarray, np.ndarray]:
    """Scale an image bilinearly and its ids to the nearest, and return a window of the result.

    Pixels outside the window are read only where the filter reaches them, so the window is that of the whole scaled
    image: the ids exactly, the image but for the rounding of a value to the neighbouring one of 0..255.

    Args:
        image: (H, W, 3) uint8.
        ids: (H, W).
        scaled: Height and width that the whole is scaled to.
        window: Top, left, height and width within the scaled image.
    """
    top, left, height, width = window
    rows = _nearest(ids.shape[0], scaled[0])[top : top + height]
    columns = _nearest(ids.shape[1], scaled[1])[left : left + width]
    down, across = ids.shape[0] / scaled[0], ids.shape[1] / scaled[1]
    # Pillow refuses a box that leaves the image by so much as a rounding error.
    bottom, right = min((top + height) * down, ids.shape[0]), min((left + width) * across, ids.shape[1])
    box = (left * across, top * down, right, bottom)
    picture = Image.fromarray(np.ascontiguousarray(image))
    resized = picture.resize((width, height), Image.Resampling.BILINEAR, box)
    return np.asarray(resized), ids[rows][:, columns]


def _nearest(old: int, new: int) -> np.ndarray:
    """For each of `new` positions along a side, the index of the position whose place it takes."""
    return ((np.arange(new) + 0.5) * old / new).astype(np.int64)


def pad(image: np.ndarray, ids: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """A square of `size` pixels with the image at its top left: grey where it has nothing, and void."""
    height, width = ids.shape
    padded = np.full((size, size, 3), PADDING_GREY, dtype=np.uint8)
    padded_ids = np.full((size, size), VOID, dtype=ids.dtype)
    padded[:height, :width], padded_ids[:height, :width] = image, ids
    return padded, padded_ids
