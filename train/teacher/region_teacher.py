"""The frozen CLIP image encoder that embeds annotated regions, and stores of its embeddings.

Letters: B images, R annotated regions of a dataset, N regions of an image, S side of a crop, D width of the image-text
space.
"""

import json
import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from datasets import Dataset
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm.auto import tqdm

from modeling_gkc.atomic_files import atomic_path
from modeling_gkc.file_checksums import EMPTY_CHECKSUM, verify_checksum, write_checksum

from ..storage.fingerprints import data_fingerprint, model_fingerprint, settings_fingerprint
from ..storage.shards import RegionStore, missing_regions
from .crops import GRAY, crop_region, crop_regions, normalize_crops
from .region_rows import ImageRegions, RegionRows, embed_images, read_regions

_CROPS_PER_PASS = 256


@dataclass(frozen=True)
class TeacherEmbeddings:
    """Unit embeddings of a dataset's regions, looked up by image id and segment id.

    Attributes:
        embeddings: (R, D) embeddings, with the regions of an image in consecutive rows.
        segment_ids: (R,) segment ids.
        rows: First row and row after the last one of each image, by image id.
        fingerprint: Hashes of the inputs of the embeddings, see `RegionTeacher.fingerprint`.
    """

    embeddings: Tensor
    segment_ids: Tensor
    rows: dict[str, tuple[int, int]]
    fingerprint: dict[str, str]

    @classmethod
    def from_rows(cls, regions: RegionRows, fingerprint: dict[str, str], dtype: torch.dtype) -> "TeacherEmbeddings":
        """Make embeddings from the rows of several images.

        Args:
            regions: Rows of all regions.
            fingerprint: Hashes of the inputs, see `RegionTeacher.fingerprint`.
            dtype: Data type of the embeddings.

        Raises:
            ValueError: There is no region.
        """
        if not len(regions.rows):
            raise ValueError(
                "The dataset has no annotated region with a pixel, so there is nothing to embed: check its annotation."
            )
        ends = np.cumsum(regions.counts).tolist()
        rows = {
            image_id: (end - count, end)
            for image_id, count, end in zip(regions.image_ids, regions.counts, ends, strict=True)
        }
        embeddings = torch.from_numpy(regions.rows).to(dtype)
        return cls(embeddings, torch.from_numpy(regions.segment_ids), rows, fingerprint)

    def lookup(self, image_ids: Sequence[str], segment_ids: Sequence[Tensor]) -> list[Tensor]:
        """Return the embeddings (N, D) in fp32 of each image's segments (N,).

        Raises:
            KeyError: A segment was not embedded; the message names it and its image.
        """
        return [self._lookup_image(image_id, ids.cpu()) for image_id, ids in zip(image_ids, segment_ids, strict=True)]

    def _lookup_image(self, image_id: str, segment_ids: Tensor) -> Tensor:
        start, stop = self.rows.get(image_id, (0, 0))
        found = segment_ids[:, None] == self.segment_ids[start:stop]
        if not found.any(dim=1).all():
            raise missing_regions(TeacherCache.holds, image_id, segment_ids[~found.any(dim=1)].tolist())
        return self.embeddings[start + found.nonzero()[:, 1]].float()

    def save(self, path: str | Path) -> None:
        """Write the embeddings to one safetensors file."""
        metadata = {"fingerprint": json.dumps(self.fingerprint), "rows": json.dumps(self.rows), **EMPTY_CHECKSUM}
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(path) as temporary:
            save_file({"embeddings": self.embeddings, "segment_ids": self.segment_ids}, temporary, metadata)
            write_checksum(temporary)

    @classmethod
    def load(cls, path: str | Path, fingerprint: Mapping[str, str]) -> "TeacherEmbeddings":
        """Read a file that `save` wrote.

        Args:
            path: The file.
            fingerprint: Expected hashes of the inputs, see `RegionTeacher.fingerprint`.

        Raises:
            ValueError: The file is damaged, or was made from another dataset, by another teacher, or with other crop
                settings.
        """
        verify_checksum(path, f"delete it (`rm {shlex.quote(str(path))}`) to embed again.")
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if differing := _differing(metadata.get("fingerprint"), fingerprint):
                raise ValueError(
                    f"{path} was made with another {' and another '.join(differing)} than requested. Delete it "
                    "to embed again, or name another file."
                )
            tensors = {name: file.get_tensor(name) for name in ("embeddings", "segment_ids")}
        rows = {image_id: tuple(bounds) for image_id, bounds in json.loads(metadata["rows"]).items()}
        return cls(**tensors, rows=rows, fingerprint=dict(fingerprint))


def _differing(stored: str | None, fingerprint: Mapping[str, str]) -> list[str]:
    """Return the names of the hashes that differ from those stored as JSON."""
    try:
        found = dict(json.loads(stored or "{}"))
    except (ValueError, TypeError):
        found = {}
    return sorted(name for name, value in fingerprint.items() if found.get(name) != value)


class TeacherCache(RegionStore):
    """The teacher's unit embeddings (N, D) of regions, as `train.cache teacher` wrote them for a dataset of any size.

    `TeacherCache.open(folder, teacher.fingerprint(dataset))`; see `RegionStore`.
    """

    kind = "teacher"
    holds = "teacher embeddings"
    has_vocabulary = False


class SynonymProbabilities(RegionStore):
    """Probabilities (N, M) of the M words of each region's class, as `train.cache synonyms` wrote them.

    In the order of `synonym_probabilities.synonym_table`, zero where a class has fewer words.
    `SynonymProbabilities.open(folder, box_synonyms.fingerprint(dataset))` with `BoxSynonyms`; see
    `RegionStore`.
    """

    kind = "synonyms"
    holds = "synonym probabilities"
    has_vocabulary = True


class RegionTeacher:
    """Frozen CLIP image encoder that embeds masked crops of regions.

    A region is cropped to its bounding box with gray outside its mask, resized, and normalized as CLIP's input.

    Args:
        vision_model: `CLIPResNetVisionModel` or transformers' `CLIPVisionModelWithProjection`.
        keep_aspect: Whether to keep the aspect ratio of a crop by padding it with gray. Otherwise the crop is
            stretched to a square, as published.
    """

    kind = TeacherCache.kind
    with_crowds = False

    def __init__(self, vision_model: nn.Module, keep_aspect: bool = False):
        self.vision_model = vision_model.eval().requires_grad_(False)
        self.image_size: int = vision_model.config.image_size
        self.columns: int = vision_model.config.projection_dim
        self.keep_aspect = keep_aspect
        self.crop = partial(crop_region, size=self.image_size, keep_aspect=keep_aspect)

    def embed_dataset(
        self,
        dataset: Dataset,
        cache_file: str | Path | None = None,
        batch_size: int = 256,
        dtype: torch.dtype = torch.float16,
        num_workers: int = 0,
        progress: bool = True,
    ) -> TeacherEmbeddings:
        """Embed every annotated region of the un-augmented images.

        Crowds and segments without a pixel are left out. All embeddings are held in memory, which suits thousands of
        images; use `python -m train.cache teacher` for larger datasets.

        Args:
            dataset: Dataset in the schema of `train.data`.
            cache_file: File to read the embeddings from if it exists, and to write them to otherwise.
            batch_size: Number of crops in a forward pass.
            dtype: Data type of the stored embeddings.
            num_workers: Number of data loading processes.
            progress: Whether to show a progress bar.

        Raises:
            ValueError: The file was made from other inputs, an image cannot be read, or there is no region.
        """
        fingerprint = self.fingerprint(dataset, progress=progress) if cache_file is not None else {}
        if cache_file is not None and Path(cache_file).exists():
            return TeacherEmbeddings.load(cache_file, fingerprint)
        images = read_regions(dataset, self, range(len(dataset)), num_workers)
        bar = tqdm(images, desc="Embedding regions", total=len(dataset), unit="image", disable=not progress)
        if not len(dataset):
            raise ValueError("The dataset has no image, so there is nothing to embed: give a split with images.")
        embeddings = TeacherEmbeddings.from_rows(
            embed_images(_raise_if_broken(bar), self, batch_size), fingerprint, dtype
        )
        if cache_file is not None:
            embeddings.save(cache_file)
        return embeddings

    @torch.no_grad()
    def embed_crops(self, crops: Tensor) -> Tensor:
        """Embed crops in the precision of the teacher, also within autocast.

        Args:
            crops: (N, S, S, 3) uint8 crops.

        Returns:
            (N, D) unit embeddings in fp32, on the device of the teacher.
        """
        parameter = next(self.vision_model.parameters())
        if not len(crops):
            return torch.empty(0, self.columns, device=parameter.device)
        with torch.autocast(parameter.device.type, enabled=False):
            embeds = self.vision_model(pixel_values=normalize_crops(crops, parameter)).image_embeds
        return F.normalize(embeds.float(), dim=-1)

    def rows(self, crops: Tensor, classes: Tensor) -> Tensor:
        """Return the embeddings (N, D) of crops (N, S, S, 3), as `RegionSource` requires; classes are not used."""
        return self.embed_crops(crops)

    def fingerprint(
        self, dataset: Dataset, remember: str | Path | None = None, progress: bool = True
    ) -> dict[str, str]:
        """Return hashes of the dataset (`data`), the current weights (`teacher`) and the crop settings (`crops`).

        Args:
            dataset: Dataset of the regions.
            remember: File that stores the hash of the dataset, see `train.storage.fingerprints.data_fingerprint`.
            progress: Whether to show a progress bar.
        """
        crops = {"image_size": self.image_size, "keep_aspect": self.keep_aspect, "grey": GRAY}
        return {
            "data": data_fingerprint(dataset, remember, progress),
            "teacher": model_fingerprint(self.vision_model),
            "crops": settings_fingerprint(crops),
        }


def _raise_if_broken(images: Iterable[ImageRegions]) -> Iterator[ImageRegions]:
    """Yield images; raise a `ValueError` at one that cannot be read."""
    for image in images:
        if image.broken is not None:
            raise ValueError(image.broken)
        yield image


class OnlineTeacher:
    """Teacher that embeds the regions of the augmented images of each batch.

    Args:
        teacher: The teacher. It is moved to the device of the batches.
    """

    def __init__(self, teacher: RegionTeacher):
        self.teacher = teacher

    @torch.no_grad()
    def embed(self, batch: Mapping[str, Any]) -> list[Tensor]:
        """Embed the regions of a batch, which are cropped on the device of the batch.

        Args:
            batch: Batch with `images`, B arrays (h, w, 3) uint8; `segmentation`, (B, H, W) segment ids, padded to the
                right and bottom; `segment_ids`, B tensors (N,); and `image_ids`, B names.

        Returns:
            For each image the unit embeddings (N, D) in fp32 of its regions, on the device of the batch.

        Raises:
            KeyError: The batch has no `images`: create the collator with `keep_images=True`.
            ValueError: A segment has no pixel; the message names its image.
        """
        self.teacher.vision_model.to(batch["segmentation"].device)
        crops = [self._crops(batch, position) for position in range(len(batch["images"]))]
        embeds = [self.teacher.embed_crops(part) for part in torch.cat(crops).split(_CROPS_PER_PASS)]
        return list(torch.cat(embeds).split([len(of_image) for of_image in crops]))

    def _crops(self, batch: Mapping[str, Any], position: int) -> Tensor:
        ids = batch["segmentation"][position]
        image = torch.as_tensor(batch["images"][position]).to(ids.device)
        ids = ids[: image.shape[0], : image.shape[1]]
        wanted = batch["segment_ids"][position]
        try:
            return crop_regions(image, ids, wanted, self.teacher.image_size, self.teacher.keep_aspect)
        except ValueError as error:
            name = batch["image_ids"][position]
            raise ValueError(f"Image {name!r}, segments {wanted.tolist()}: {error}") from error
