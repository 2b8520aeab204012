"""From the pictures of a dataset to one row of numbers for each annotated region: reading, cropping, batching.

Letters: R regions in all, N regions of an image, S side of a crop, D columns of a row.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor

from ..data.schema import annotated_segments, read_row

Crop = Callable[[np.ndarray, np.ndarray], np.ndarray]  # image (H, W, 3) uint8 and mask (H, W) -> (S, S, 3) uint8


class RegionSource(Protocol):
    """What makes rows out of regions.

    Attributes:
        kind: of the store that holds the rows, `teacher` or `synonyms`.
        columns: D.
        with_crowds: whether crowds have rows too.
        crop: what is seen of a region; runs in the processes that read.
    """

    kind: str
    columns: int
    with_crowds: bool
    crop: Crop

    def rows(self, crops: Tensor, classes: Tensor) -> Tensor:
        """Crops (N, S, S, 3) uint8 of regions of some classes (N,) -> (N, D)."""

    def fingerprint(self, dataset: Dataset, remember: str | Path | None = None, progress: bool = True) -> dict:
        """Hash of each thing that the rows are made from, by name; see `train.storage.fingerprints`."""


class ImageRegions(NamedTuple):
    """Regions of one image: ids (N,), classes (N,), crops (N, S, S, 3) uint8; why there are none, if it is broken."""

    image_id: str
    segment_ids: Tensor
    classes: Tensor
    crops: Tensor
    broken: str | None = None


@dataclass(frozen=True)
class RegionRows:
    """Rows of images one after the other: `counts` regions of each, `segment_ids` (R,), `rows` (R, D)."""

    image_ids: list[str]
    counts: list[int]
    segment_ids: np.ndarray
    rows: np.ndarray


class RegionCrops(torch.utils.data.Dataset):
    """The regions with a pixel of image `index`, in the order of their ids, as `ImageRegions`."""

    def __init__(self, dataset: Dataset, crop: Crop, with_crowds: bool):
        self.dataset, self.crop, self.with_crowds = dataset, crop, with_crowds

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> ImageRegions:
        try:
            return self._read(self.dataset[index])
        except (OSError, ValueError, SyntaxError) as error:  # what Pillow raises for broken pictures
            image_id = self.dataset.select_columns("image_id")[index]["image_id"]
            nothing = torch.empty(0, dtype=torch.int64)
            return ImageRegions(image_id, nothing, nothing, torch.empty(0, dtype=torch.uint8), str(error))

    def _read(self, row: Mapping[str, Any]) -> ImageRegions:
        image, ids = read_row(row)
        segments = row["segments"] if self.with_crowds else annotated_segments(row)
        classes = {segment["id"]: segment["category_id"] for segment in segments}
        visible = [segment_id for segment_id in np.unique(ids).tolist() if segment_id in classes]
        crops = [torch.from_numpy(np.array(self.crop(image, ids == segment_id))) for segment_id in visible]
        return ImageRegions(
            image_id=row["image_id"],
            segment_ids=torch.tensor(visible, dtype=torch.int64),
            classes=torch.tensor([classes[segment_id] for segment_id in visible], dtype=torch.int64),
            crops=torch.stack(crops) if crops else torch.empty(0, dtype=torch.uint8),
        )


def read_regions(
    dataset: Dataset, source: RegionSource, indices: Sequence[int], num_workers: int = 0
) -> Iterator[ImageRegions]:
    """The regions of some images, read and cropped ahead by processes."""
    crops = RegionCrops(dataset, source.crop, source.with_crowds)
    return iter(torch.utils.data.DataLoader(crops, batch_size=None, sampler=indices, num_workers=num_workers))


def embed_images(images: Iterable[ImageRegions], source: RegionSource, batch_size: int) -> RegionRows:
    """Rows of the regions of images, in passes of `batch_size` regions; the last one may have fewer."""
    image_ids, counts, segment_ids, rows = [], [], [], []
    waiting: list[tuple[Tensor, Tensor]] = []
    for image in images:
        image_ids.append(image.image_id)
        counts.append(len(image.segment_ids))
        segment_ids.append(image.segment_ids.numpy())
        waiting += zip(image.crops, image.classes, strict=True)
        while len(waiting) >= batch_size:
            rows.append(_pass(waiting[:batch_size], source))
            waiting = waiting[batch_size:]
    if waiting:
        rows.append(_pass(waiting, source))
    rows = np.concatenate(rows) if rows else np.empty((0, source.columns), dtype=np.float32)
    return RegionRows(image_ids, counts, np.concatenate(segment_ids), rows)


def _pass(regions: list[tuple[Tensor, Tensor]], source: RegionSource) -> np.ndarray:
    crops, classes = (torch.stack(parts) for parts in zip(*regions, strict=True))
    return source.rows(crops, classes).float().cpu().numpy()
