"""Caches of a dataset's regions that `python -m train.cache` wrote, opened as a recipe requires."""

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from datasets import Dataset
from torch import Tensor

from configuration import Recipe
from modeling_gkc.vocabulary import Vocabulary

from ..data.prepared import VOCABULARY_NAME, read_manifest
from ..storage.shards import MANIFEST, RegionStore
from .clip_towers import CLIPTowers
from .precompute import cache_folder, fingerprint_file
from .region_rows import RegionSource

DATASET_VOCABULARY = "dataset"  # value of `data.vocabulary` that stands for the vocabulary of the dataset's folder


@dataclass(frozen=True)
class JoinedLookup:
    """Lookup of regions in the first of several stores that contains their image.

    Attributes:
        stores: At least one store.
        columns: Number of leading columns to return; None returns all.
    """

    stores: Sequence[RegionStore]
    columns: int | None = None

    def lookup(self, image_ids: Sequence[str], segment_ids: Sequence[Tensor]) -> list[Tensor]:
        """Return the rows (N, D) of each image's segments (N,).

        Raises:
            KeyError: No store contains a segment; the message names it and its image.
        """
        images = zip(image_ids, segment_ids, strict=True)
        return [self._lookup_image(image_id, ids)[:, : self.columns] for image_id, ids in images]

    def _lookup_image(self, image_id: str, segment_ids: Tensor) -> Tensor:
        for store in self.stores[:-1]:
            try:
                return store.lookup([image_id], [segment_ids])[0]
            except KeyError:
                continue
        return self.stores[-1].lookup([image_id], [segment_ids])[0]


@dataclass(frozen=True)
class RegionCaches:
    """Caches of a recipe's dataset.

    Attributes:
        recipe: Recipe that names the dataset, the vocabulary and the CLIP.
        towers: Towers of the recipe's CLIP; None if the recipe names none.
        splits: Stored splits of the dataset, from which the fingerprints of the caches are computed.
        vocabulary: Classes of the dataset.
        trained_vocabulary: Classes that are trained on.
    """

    recipe: Recipe
    towers: CLIPTowers | None
    splits: Mapping[str, Dataset]
    vocabulary: Vocabulary
    trained_vocabulary: Vocabulary

    def require_towers(self, setting_without_clip: str) -> CLIPTowers:
        """Return the towers of the recipe's CLIP.

        Args:
            setting_without_clip: Setting with which the recipe needs no CLIP, for the error message.

        Raises:
            ValueError: The recipe names no CLIP.
        """
        if self.towers is None:
            raise ValueError(
                f"The recipe needs a teacher but names no CLIP: give model.clip=FOLDER, or set {setting_without_clip}."
            )
        return self.towers

    def open(self, kind: type[RegionStore], source: RegionSource, columns: int | None = None) -> JoinedLookup:
        """Open the caches of one kind for all splits.

        Args:
            kind: Class of the store.
            source: Source of the rows; the caches must have its fingerprint.
            columns: Number of leading columns to return; None returns all.

        Raises:
            ValueError: A cache is missing or was made from other inputs; the message contains the command that
                writes it.
        """
        dataset_path = self.recipe.data.dataset
        stores = []
        for split, dataset in self.splits.items():
            folder = cache_folder(dataset_path, split, kind.kind)
            if not (folder / MANIFEST).exists():
                command = self._command(kind, split)
                raise ValueError(f"There are no {kind.holds} in {folder}: create them with `{command}`.")
            stores.append(kind.open(folder, source.fingerprint(dataset, fingerprint_file(dataset_path, split))))
        if len(stores) > 1:
            self._check_distinct_images()
        return JoinedLookup(stores, columns)

    def _command(self, kind: type[RegionStore], split: str) -> str:
        """Return the command that writes a cache."""
        if self.recipe.teacher.source == "labels" and not kind.has_vocabulary:
            return read_manifest(self.recipe.data.dataset)["command"]
        dataset, vocabulary = self.recipe.data.dataset, self.recipe.data.vocabulary
        command = ["python", "-m", "train.cache", kind.kind, dataset, "--clip", self.recipe.model.clip]
        command += ["--split", split]
        if kind.has_vocabulary:
            own = vocabulary in (None, DATASET_VOCABULARY)
            command += ["--vocabulary", str(Path(dataset) / VOCABULARY_NAME) if own else vocabulary]
        return shlex.join(command)

    def _check_distinct_images(self) -> None:
        """Raise a `ValueError` if two splits share an image id, because rows are looked up by image id."""
        first, second = (set(dataset["image_id"][:]) for dataset in self.splits.values())
        if common := sorted(first & second):
            raise ValueError(
                f"The splits {' and '.join(self.splits)} share {len(common)} image ids, such as {common[0]!r}: give "
                "every image a unique id, or set data.eval_split=none."
            )
