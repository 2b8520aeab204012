"""Rows -> one batch of tensors for the model and the trainer."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers.image_processing_utils import BaseImageProcessor


@dataclass
class SegmentationCollator:
    """Turns rows of an `AugmentedDataset` into a batch.

    The batch has `pixel_values` (B, 3, H, W) and `pixel_mask` (B, H, W); lists over the images of `mask_labels`
    (N, H, W) bool, `class_labels` (N,) and `segment_ids` (N,), where N segments are those with a pixel left; and
    `image_ids`, a list of strings.

    Attributes:
        image_processor: Normalises and pads; its resizing is not used.
        num_classes: Size of the vocabulary.
    """

    image_processor: BaseImageProcessor
    num_classes: int

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Batch rows."""
        images = [row["image"] for row in rows]
        batch = dict(self.image_processor(images=images, do_resize=False, return_tensors="pt"))
        size = batch["pixel_values"].shape[-2:]
        targets = [self._targets(row, size) for row in rows]
        for position, key in enumerate(("mask_labels", "class_labels", "segment_ids")):
            batch[key] = [target[position] for target in targets]
        batch["image_ids"] = [row["image_id"] for row in rows]
        return batch

    def _targets(self, row: Mapping[str, Any], size: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
        """Masks (N, H, W), classes (N,) and ids (N,) of the segments that are still there."""
        height, width = row["ids"].shape
        ids = torch.from_numpy(np.pad(row["ids"], ((0, size[0] - height), (0, size[1] - width))))
        segment_ids = torch.tensor([segment["id"] for segment in row["segments"]], dtype=torch.int64)
        classes = torch.tensor([segment["category_id"] for segment in row["segments"]], dtype=torch.int64)
        self._check_classes(row["image_id"], classes)
        masks = ids[None] == segment_ids[:, None, None]
        visible = masks.flatten(1).any(dim=1)
        return masks[visible], classes[visible], segment_ids[visible]

    def _check_classes(self, image_id: str, classes: Tensor) -> None:
        outside = classes[(classes < 0) | (classes >= self.num_classes)].tolist()
        if outside:
            raise ValueError(
                f"Sample {image_id!r}: category ids {outside} are not in the vocabulary of {self.num_classes} classes."
            )
