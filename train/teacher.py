"""The frozen parts of CLIP, run once before training: image embeddings of all regions, text embeddings of all words.

Letters: R annotated regions of a dataset, N regions of an image, D width of the image-text space, P words, K classes.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from datasets import Dataset
from datasets import Image as ImageFeature
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm.auto import tqdm

from modeling_gkc.class_embeddings import average_class_embeds, encode_vocabulary
from modeling_gkc.modeling_gkc import GKCForOpenVocabSegmentation
from modeling_gkc.processing_gkc import GKCProcessor
from modeling_gkc.vocabulary import Vocabulary

from .data.schema import annotated_segments, read_row
from .regions import GREY, crop_region, normalize_crops

_HASHED_PICTURES = 64
_WORDS_PER_PASS = 256

RegionsOfImage = tuple[str, Tensor, Tensor]  # image id, segment ids (N,), crops or embeddings (N, ...)


@dataclass(frozen=True)
class TeacherEmbeddings:
    """Unit embeddings of a dataset's regions, found by image id and segment id.

    Attributes:
        embeddings: (R, D), the regions of an image in neighbouring rows.
        segment_ids: (R,).
        rows: for each image id its first row and the one after its last.
        fingerprint: what the embeddings were made from, see `RegionTeacher.fingerprint`.
    """

    embeddings: Tensor
    segment_ids: Tensor
    rows: dict[str, tuple[int, int]]
    fingerprint: str

    @classmethod
    def from_images(
        cls, images: Iterable[RegionsOfImage], fingerprint: str, dtype: torch.dtype
    ) -> "TeacherEmbeddings":
        """Put the embeddings of images one after the other."""
        rows, segment_ids, embeddings, start = {}, [], [], 0
        for image_id, ids, embeds in images:
            rows[image_id] = (start, start + len(ids))
            start += len(ids)
            segment_ids.append(ids)
            embeddings.append(embeds.to(dtype))
        if start == 0:
            raise ValueError("The dataset has no annotated region with a pixel: there is nothing to embed.")
        return cls(torch.cat(embeddings), torch.cat(segment_ids), rows, fingerprint)

    def lookup(self, image_ids: Sequence[str], segment_ids: Sequence[Tensor]) -> list[Tensor]:
        """Embeddings (N, D) in fp32 of each image's segments (N,).

        Raises:
            KeyError: naming the image and the segments that were not embedded.
        """
        return [self._of_image(image_id, ids.cpu()) for image_id, ids in zip(image_ids, segment_ids, strict=True)]

    def _of_image(self, image_id: str, segment_ids: Tensor) -> Tensor:
        start, stop = self.rows.get(image_id, (0, 0))
        found = segment_ids[:, None] == self.segment_ids[start:stop]
        if not found.any(dim=1).all():
            missing = segment_ids[~found.any(dim=1)].tolist()
            raise KeyError(
                f"There are no teacher embeddings of the segments {missing} of image {image_id!r}. Embed the dataset "
                "that is trained on."
            )
        return self.embeddings[start + found.nonzero()[:, 1]].float()

    def save(self, path: str | Path) -> None:
        """Write one safetensors file."""
        metadata = {"fingerprint": self.fingerprint, "rows": json.dumps(self.rows)}
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        save_file({"embeddings": self.embeddings, "segment_ids": self.segment_ids}, path, metadata)

    @classmethod
    def load(cls, path: str | Path, fingerprint: str) -> "TeacherEmbeddings":
        """Read a file written by `save`.

        Raises:
            ValueError: it was made from another dataset, by another teacher, or with other crop settings.
        """
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("fingerprint") != fingerprint:
                raise ValueError(
                    f"{path} was made from another dataset, by another teacher or with other crop settings: its "
                    f"fingerprint is {metadata.get('fingerprint')}, not {fingerprint}. Delete it to embed anew, or "
                    "name another file."
                )
            tensors = {name: file.get_tensor(name) for name in ("embeddings", "segment_ids")}
        rows = {image_id: tuple(bounds) for image_id, bounds in json.loads(metadata["rows"]).items()}
        return cls(**tensors, rows=rows, fingerprint=fingerprint)


class RegionTeacher:
    """A frozen CLIP image encoder that embeds regions: grey outside the mask, cropped, resized, CLIP-normalised.

    Args:
        vision_model: `CLIPResNetVisionModel` or transformers' `CLIPVisionModelWithProjection`.
        keep_aspect: keep the aspect ratio of a crop, with grey around it; otherwise it is stretched, as published.
    """

    def __init__(self, vision_model: nn.Module, keep_aspect: bool = False):
        self.vision_model = vision_model.eval().requires_grad_(False)
        self.image_size: int = vision_model.config.image_size
        self.keep_aspect = keep_aspect

    def embed_dataset(
        self,
        dataset: Dataset,
        cache_file: str | Path | None = None,
        batch_size: int = 256,
        dtype: torch.dtype = torch.float16,
        num_workers: int = 0,
        progress: bool = True,
    ) -> TeacherEmbeddings:
        """Embed every annotated region of the un-augmented images; crowds and segments without a pixel are left out.

        Args:
            dataset: in the schema of `train.data`.
            cache_file: read from here if it exists, else written here.
            batch_size: crops per pass.
            dtype: type in which the embeddings are kept.
            num_workers: processes that crop.
            progress: show a bar.
        """
        fingerprint = self.fingerprint(dataset)
        if cache_file is not None and Path(cache_file).exists():
            return TeacherEmbeddings.load(cache_file, fingerprint)
        crops = _RegionCrops(dataset, self.image_size, self.keep_aspect)
        loader = torch.utils.data.DataLoader(crops, batch_size=None, num_workers=num_workers)
        images = tqdm(loader, desc="Embedding regions", unit="image", disable=not progress)
        embeddings = TeacherEmbeddings.from_images(self._embed_images(images, batch_size), fingerprint, dtype)
        if cache_file is not None:
            embeddings.save(cache_file)
        return embeddings

    def _embed_images(self, images: Iterable[RegionsOfImage], batch_size: int) -> Iterator[RegionsOfImage]:
        for group in _groups_of_regions(images, batch_size):
            crops = torch.cat([crops for _, _, crops in group])
            embeds = torch.cat([self.embed_crops(part).cpu() for part in crops.split(batch_size)])
            per_image = embeds.split([len(ids) for _, ids, _ in group])
            yield from ((image_id, ids, rows) for (image_id, ids, _), rows in zip(group, per_image, strict=True))

    @torch.no_grad()
    def embed_crops(self, crops: Tensor) -> Tensor:
        """Crops (N, image_size, image_size, 3) uint8 -> unit embeddings (N, D) in fp32."""
        if not len(crops):
            return torch.empty(0, self.vision_model.config.projection_dim)
        parameter = next(self.vision_model.parameters())
        embeds = self.vision_model(pixel_values=normalize_crops(crops, parameter)).image_embeds
        return F.normalize(embeds.float(), dim=-1)

    def fingerprint(self, dataset: Dataset) -> str:
        """Hash of the teacher's weights, the crop settings and the dataset.

        Of the dataset all ids and annotations enter, but only a sample of its pictures.
        """
        digest = hashlib.sha256()
        settings = {"image_size": self.image_size, "keep_aspect": self.keep_aspect, "grey": GREY}
        digest.update(json.dumps(settings, sort_keys=True).encode())
        for name, tensor in sorted(self.vision_model.state_dict().items()):
            digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
            digest.update(tensor.cpu().reshape(-1).view(torch.uint8).numpy())
        for row in dataset.select_columns(["image_id", "segments"]):
            digest.update(json.dumps(row, sort_keys=True).encode())
        for picture in _sampled_pictures(dataset):
            digest.update(picture)
        return digest.hexdigest()[:32]


class _RegionCrops(torch.utils.data.Dataset):
    """The regions of image `index`: image id, segment ids (N,), crops (N, size, size, 3) uint8."""

    def __init__(self, dataset: Dataset, size: int, keep_aspect: bool):
        self.dataset, self.size, self.keep_aspect = dataset, size, keep_aspect

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> RegionsOfImage:
        row = self.dataset[index]
        image, ids = read_row(row)
        visible = np.intersect1d(ids, [segment["id"] for segment in annotated_segments(row)])
        crops = np.empty((len(visible), self.size, self.size, 3), dtype=np.uint8)
        for position, segment_id in enumerate(visible):
            crops[position] = crop_region(image, ids == segment_id, self.size, self.keep_aspect)
        return row["image_id"], torch.from_numpy(visible.astype(np.int64)), torch.from_numpy(crops)


def _groups_of_regions(images: Iterable[RegionsOfImage], size: int) -> Iterator[list[RegionsOfImage]]:
    """Whole images together until they have at least `size` regions."""
    group, count = [], 0
    for image in images:
        group.append(image)
        count += len(image[1])
        if count >= size:
            yield group
            group, count = [], 0
    if group:
        yield group


def _sampled_pictures(dataset: Dataset) -> Iterator[bytes]:
    """Encoded images and segmentations of rows spread over the dataset; their path where they are not embedded."""
    chosen = np.unique(np.linspace(0, len(dataset) - 1, _HASHED_PICTURES).round().astype(int))
    pictures = dataset.select_columns(["image", "segmentation"]).select(chosen.tolist())
    for column in ("image", "segmentation"):
        pictures = pictures.cast_column(column, ImageFeature(decode=False))
    for row in pictures:
        yield from (row[column]["bytes"] or row[column]["path"].encode() for column in ("image", "segmentation"))


@dataclass(frozen=True)
class TextBank:
    """Unit text embeddings of all words of a vocabulary.

    Attributes:
        words: P words, class by class, the name of a class before its synonyms.
        class_ids: (P,) class of each word.
        embeds: (P, D).
    """

    words: tuple[str, ...]
    class_ids: Tensor
    embeds: Tensor

    @classmethod
    def from_vocabulary(
        cls,
        vocabulary: Vocabulary,
        model: GKCForOpenVocabSegmentation,
        processor: GKCProcessor,
        progress: bool = True,
    ) -> "TextBank":
        """Encode every word once; with several prompt templates, the average over them."""
        # One word may belong to several classes; the processor takes each once, whatever its case.
        distinct = list({word.casefold(): word for word in vocabulary.flat_names}.values())
        parts = [distinct[start : start + _WORDS_PER_PASS] for start in range(0, len(distinct), _WORDS_PER_PASS)]
        embeds = torch.cat(
            [
                _embed_words(part, model, processor)
                for part in tqdm(parts, desc="Embedding words", unit=f"{_WORDS_PER_PASS} words", disable=not progress)
            ]
        )
        position = {word.casefold(): index for index, word in enumerate(distinct)}
        rows = [position[word.casefold()] for word in vocabulary.flat_names]
        return cls(tuple(vocabulary.flat_names), torch.tensor(vocabulary.class_ids), embeds[rows])

    @cached_property
    def name_prompts(self) -> Tensor:
        """(K,) positions of the classes' names, their first words."""
        return torch.searchsorted(self.class_ids, torch.arange(self.num_classes, device=self.class_ids.device))

    @cached_property
    def num_classes(self) -> int:
        """K."""
        return int(self.class_ids[-1]) + 1

    def to(self, device: torch.device | str) -> "TextBank":
        """The same bank on another device."""
        return replace(self, class_ids=self.class_ids.to(device), embeds=self.embeds.to(device))


def _embed_words(words: list[str], model: GKCForOpenVocabSegmentation, processor: GKCProcessor) -> Tensor:
    """(len(words), D) embeddings on the CPU."""
    encoded = encode_vocabulary(words, model, processor)
    return average_class_embeds(encoded.class_embeds, encoded.class_ids).float().cpu()
