"""Reading, cropping and batching of annotated regions, for caches with one row of numbers for each region.

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
    """Interface of objects that compute one row of numbers for each region.

    Attributes:
        kind: Kind of the store of the rows, `teacher` or `synonyms`.
        columns: Number D of columns of a row.
        with_crowds: Whether crowds have rows too.
        crop: Function that crops a region. It runs in the data loading processes.
    """

    kind: str
    columns: int
    with_crowds: bool
    crop: Crop

    def rows(self, crops: Tensor, classes: Tensor) -> Tensor:
        """Compute the rows of regions.

        Args:
            crops: (N, S, S, 3) uint8 crops of the regions.
            classes: (N,) classes of the regions.

        Returns:
            (N, D) rows.
        """

    def fingerprint(self, dataset: Dataset, remember: str | Path | None = None, progress: bool = True) -> dict:
        """Return the hash of each input of the rows, by its name.

        Args:
            dataset: Dataset of the regions.
            remember: File that stores the hash of the dataset, see `train.storage.fingerprints.data_fingerprint`.
            progress: Whether to show a progress bar.
        """


class ImageRegions(NamedTuple):
    """Regions of one image.

    Attributes:
        image_id: Id of the image.
        segment_ids: (N,) segment ids.
        classes: (N,) classes.
        crops: (N, S, S, 3) uint8 crops.
        broken: Error message if the image cannot be read; it then has no regions.
    """

    image_id: str
    segment_ids: Tensor
    classes: Tensor
    crops: Tensor
    broken: str | None = None


@dataclass(frozen=True)
class RegionRows:
    """Rows of the regions of several images, concatenated.

    Attributes:
        image_ids: Ids of the images.
        counts: Number of regions of each image.
        segment_ids: (R,) segment ids.
        rows: (R, D) rows.
    """

    image_ids: list[str]
    counts: list[int]
    segment_ids: np.ndarray
    rows: np.ndarray


class RegionCrops(torch.utils.data.Dataset):
    """Dataset whose sample `index` is the `ImageRegions` of that image: its non-empty regions by ascending id.

    Args:
        dataset: Dataset in the schema of `train.data`.
        crop: Function that crops a region.
        with_crowds: Whether crowds are included.
    """

    def __init__(self, dataset: Dataset, crop: Crop, with_crowds: bool):
        self.dataset, self.crop, self.with_crowds = dataset, crop, with_crowds

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> ImageRegions:
        try:
            return self._read(self.dataset[index])
        except (OSError, ValueError, SyntaxError) as error:  # Pillow's errors for broken images
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
    """Read and crop the regions of images in data loading processes.

    Args:
        dataset: Dataset in the schema of `train.data`.
        source: Source of the rows, which says how regions are cropped.
        indices: Positions of the images in the dataset.
        num_workers: Number of data loading processes.

    Returns:
        Iterator over the images in the order of `indices`.
    """
    crops = RegionCrops(dataset, source.crop, source.with_crowds)
    return iter(torch.utils.data.DataLoader(crops, batch_size=None, sampler=indices, num_workers=num_workers))


def embed_images(images: Iterable[ImageRegions], source: RegionSource, batch_size: int) -> RegionRows:
    """Compute the rows of all regions of images, in batches of regions.

    Args:
        images: Regions of each image.
        source: Source of the rows.
        batch_size: Number of regions in a batch. The last batch may have fewer.
    """
    image_ids, counts, segment_ids, rows = [], [], [], []
    waiting: list[tuple[Tensor, Tensor]] = []
    for image in images:
        image_ids.append(image.image_id)
        counts.append(len(image.segment_ids))
        segment_ids.append(image.segment_ids.numpy())
        waiting += zip(image.crops, image.classes, strict=True)
        while len(waiting) >= batch_size:
            rows.append(_embed_batch(waiting[:batch_size], source))
            waiting = waiting[batch_size:]
    if waiting:
        rows.append(_embed_batch(waiting, source))
    rows = np.concatenate(rows) if rows else np.empty((0, source.columns), dtype=np.float32)
    return RegionRows(image_ids, counts, np.concatenate(segment_ids), rows)


def _embed_batch(regions: list[tuple[Tensor, Tensor]], source: RegionSource) -> np.ndarray:
    """Compute the rows (batch, D) of one batch of crops and classes."""
    crops, classes = (torch.stack(parts) for parts in zip(*regions, strict=True))
    return source.rows(crops, classes).float().cpu().numpy()
