"""Collation of training samples to batches; masks are stored as ids until they are on the training device."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers.image_processing_utils import BaseImageProcessor

from .schema import VOID, ids_within


@dataclass
class SegmentationCollator:
    """Collator that builds a batch from rows of an `AugmentedDataset` or a `StreamingDataset`.

    The batch contains `pixel_values` (B, 3, H, W) float; `pixel_mask` (B, H, W); `segmentation` (B, H, W) int32, the
    segment id of every pixel, 0 for void and padding; lists over the images of `segment_ids` (N,) and `class_labels`
    (N,) int64 of the N visible segments, in row order; `image_ids`; `draw_seeds`, the integer seeds of all random
    draws about a sample; and `nouns`, lists of strings. `expand_masks` converts `segmentation` to masks.

    Attributes:
        image_processor: Image processor that normalizes and pads; its resizing is not used.
        num_classes: Number of classes in the vocabulary.
        keep_images: Whether to add `images`, the augmented images (h, w, 3) uint8 before normalization and padding.
    """

    image_processor: BaseImageProcessor
    num_classes: int
    keep_images: bool = False

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Collate rows to a batch.

        Raises:
            ValueError: If a class is not in the vocabulary.
        """
        images = [row["image"] for row in rows]
        batch = dict(self.image_processor(images=images, do_resize=False, return_tensors="pt"))
        del batch["original_sizes"]  # unused in training
        segmentation = np.full((len(rows), *batch["pixel_values"].shape[-2:]), VOID, dtype=np.int32)
        for padded, row in zip(segmentation, rows, strict=True):
            height, width = row["ids"].shape
            padded[:height, :width] = row["ids"]
        batch["segmentation"] = torch.from_numpy(segmentation)
        targets = [self._targets(row) for row in rows]
        batch["segment_ids"] = [segment_ids for segment_ids, _ in targets]
        batch["class_labels"] = [classes for _, classes in targets]
        batch["image_ids"] = [row["image_id"] for row in rows]
        batch["draw_seeds"] = [row["draw_seed"] for row in rows]
        batch["nouns"] = [list(row["nouns"]) for row in rows]
        if self.keep_images:
            batch["images"] = [torch.tensor(image) for image in images]
        return batch

    def _targets(self, row: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        """Return the ids (N,) and classes (N,) of the segments that are visible after augmentation."""
        self._check_classes(row)
        present = set(ids_within(row["ids"]).tolist())
        visible = [segment for segment in row["segments"] if segment["id"] in present]
        segment_ids = torch.tensor([segment["id"] for segment in visible], dtype=torch.int64)
        return segment_ids, torch.tensor([segment["category_id"] for segment in visible], dtype=torch.int64)

    def _check_classes(self, row: Mapping[str, Any]) -> None:
        classes = [segment["category_id"] for segment in row["segments"]]
        outside = [category for category in classes if not 0 <= category < self.num_classes]
        if outside:
            raise ValueError(
                f"Sample {row['image_id']!r}: Category ids {outside} are not in the vocabulary of {self.num_classes} "
                "classes. Name the vocabulary of the dataset."
            )


def expand_masks(segmentation: Tensor, segment_ids: Sequence[Tensor]) -> list[Tensor]:
    """Return the masks of the segments of a batch, on the device of its segmentation.

    Args:
        segmentation: Segment id of every pixel (B, H, W).
        segment_ids: Segment ids (N,) of each image.

    Returns:
        Boolean masks (N, H, W) of each image.
    """
    return [ids[None] == wanted.to(ids)[:, None, None] for ids, wanted in zip(segmentation, segment_ids, strict=True)]
