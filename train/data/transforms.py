"""Augmentations that move an image and its segment ids alike; the same in every run for one seed, epoch and sample."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from PIL import Image

from .schema import VOID, annotated_segments, read_row

PADDING_GREY = 128


@dataclass(frozen=True)
class JointTransform:
    """Random flip, scale jitter and crop of fixed size.

    Attributes:
        crop_size: Side in pixels of the square result: the image is scaled to fit it, times a random factor, and then
            cropped at a random place or padded to the right and bottom with grey (void in the segmentation). None
            keeps the image's size.
        scale_range: Bounds of the random factor.
        flip_probability: How often the image is mirrored.
    """

    crop_size: int | None = 512
    scale_range: tuple[float, float] = (0.8, 1.2)
    flip_probability: float = 0.5

    def __call__(
        self, image: np.ndarray, ids: np.ndarray, generator: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray]:
        """Transform an image (H, W, 3) uint8 and its ids (H, W)."""
        if generator.random() < self.flip_probability:
            image, ids = image[:, ::-1], ids[:, ::-1]
        if self.crop_size is not None:
            factor = generator.uniform(*self.scale_range) * self.crop_size / max(ids.shape)
            image, ids = resize(image, ids, factor)
            image, ids = crop_or_pad(image, ids, self.crop_size, generator)
        return np.ascontiguousarray(image), np.ascontiguousarray(ids)


def resize(image: np.ndarray, ids: np.ndarray, factor: float) -> tuple[np.ndarray, np.ndarray]:
    """Scale an image bilinearly and its ids to the nearest."""
    height, width = (max(1, round(side * factor)) for side in ids.shape)
    resized = Image.fromarray(np.ascontiguousarray(image)).resize((width, height), Image.Resampling.BILINEAR)
    rows, columns = _nearest(ids.shape[0], height), _nearest(ids.shape[1], width)
    return np.asarray(resized), ids[rows[:, None], columns]


def _nearest(old: int, new: int) -> np.ndarray:
    """For each of `new` positions along a side, the index of the position whose place it takes."""
    return ((np.arange(new) + 0.5) * old / new).astype(np.int64)


def crop_or_pad(
    image: np.ndarray, ids: np.ndarray, size: int, generator: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Cut a square of `size` pixels at a random place; what is missing is padded."""
    top, left = (int(generator.integers(0, max(side - size, 0) + 1)) for side in ids.shape)
    window = slice(top, top + size), slice(left, left + size)
    image, ids = image[window], ids[window]
    bottom, right = size - ids.shape[0], size - ids.shape[1]
    image = np.pad(image, ((0, bottom), (0, right), (0, 0)), constant_values=PADDING_GREY)
    return image, np.pad(ids, ((0, bottom), (0, right)), constant_values=VOID)


class AugmentedDataset(torch.utils.data.Dataset):
    """A dataset whose rows are decoded and transformed, each by a generator of (seed, epoch, row number).

    No state of a worker enters, so a resumed run sees what an undisturbed one would have seen. Rows are dicts with
    `image` (H, W, 3) uint8, `ids` (H, W) int32, `segments` (crowds left out) and `image_id`.
    """

    def __init__(self, dataset: Dataset, transform: JointTransform, seed: int):
        self.dataset = dataset
        self.transform = transform
        self.seed = seed
        # In shared memory, for workers that live on from one epoch to the next.
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    def set_epoch(self, epoch: int) -> None:
        """Draw other augmentations from now on."""
        self._epoch.fill_(epoch)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = self.dataset[index]
        generator = np.random.default_rng((self.seed, int(self._epoch), index))
        image, ids = self.transform(*read_row(row), generator)
        return {"image": image, "ids": ids, "segments": annotated_segments(row), "image_id": row["image_id"]}
