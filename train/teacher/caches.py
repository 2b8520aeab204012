"""Open the caches of a dataset's regions that `python -m train.cache` wrote, as the recipe of a run asks for them."""

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from datasets import Dataset
from torch import Tensor

from configuration import Recipe
from modeling_gkc.vocabulary import Vocabulary

from ..data.prepared import VOCABULARY_NAME
from ..storage.shards import MANIFEST, RegionStore
from .clip_towers import CLIPTowers
from .precompute import cache_folder, fingerprint_file
from .region_rows import RegionSource

DATASET_VOCABULARY = "dataset"  # value of `data.vocabulary` that stands for the vocabulary of the dataset's folder


@dataclass(frozen=True)
class JoinedLookup:
    """Looks an image up in the first of several stores that has it.

    Attributes:
        stores: At least one store.
        columns: Number of first columns that are returned; None for all.
    """

    stores: Sequence[RegionStore]
    columns: int | None = None

    def lookup(self, image_ids: Sequence[str], segment_ids: Sequence[Tensor]) -> list[Tensor]:
        """Rows (N, D) of each image's segments.

        Raises:
            KeyError: No store has them.
        """
        images = zip(image_ids, segment_ids, strict=True)
        return [self._of_image(image_id, ids)[:, : self.columns] for image_id, ids in images]

    def _of_image(self, image_id: str, segment_ids: Tensor) -> Tensor:
        for store in self.stores[:-1]:
            try:
                return store.lookup([image_id], [segment_ids])[0]
            except KeyError:
                continue
        return self.stores[-1].lookup([image_id], [segment_ids])[0]


@dataclass(frozen=True)
class RegionCaches:
    """The caches of a recipe's dataset.

    Attributes:
        recipe: Names the dataset, the vocabulary and the CLIP.
        towers: The recipe's CLIP; None where it names none.
        splits: The dataset as it is stored, which the caches are known by.
        vocabulary: Classes of the dataset.
        trained_vocabulary: Those of them that are trained.
    """

    recipe: Recipe
    towers: CLIPTowers | None
    splits: Mapping[str, Dataset]
    vocabulary: Vocabulary
    trained_vocabulary: Vocabulary

    def require_towers(self, setting_without_clip: str) -> CLIPTowers:
        """The towers of the recipe's CLIP.

        Raises:
            ValueError: There are none; the message names the setting with which none are needed.
        """
        if self.towers is None:
            raise ValueError(
                "The recipe has a teacher, but names no CLIP: give model.clip=FOLDER, or turn off what needs it with "
                f"{setting_without_clip}."
            )
        return self.towers

    def open(self, kind: type[RegionStore], source: RegionSource, columns: int | None = None) -> JoinedLookup:
        """Open the caches of one kind of all splits.

        Args:
            kind: The kind of store.
            source: What made the rows; the caches must have its fingerprint.
            columns: See `JoinedLookup`.

        Raises:
            ValueError: A cache is missing or was made from something else; the message has the command that makes it.
        """
        dataset_path = self.recipe.data.dataset
        stores = []
        for split, dataset in self.splits.items():
            folder = cache_folder(dataset_path, split, kind.kind)
            if not (folder / MANIFEST).exists():
                command = self._command(kind, split)
                raise ValueError(f"There are no {kind.holds} in {folder}: make them with `{command}`.")
            stores.append(kind.open(folder, source.fingerprint(dataset, fingerprint_file(dataset_path, split))))
        if len(stores) > 1:
            self._check_distinct_images()
        return JoinedLookup(stores, columns)

    def _command(self, kind: type[RegionStore], split: str) -> str:
        """The command that makes a cache."""
        dataset, vocabulary = self.recipe.data.dataset, self.recipe.data.vocabulary
        command = ["python", "-m", "train.cache", kind.kind, dataset, "--clip", self.recipe.model.clip]
        command += ["--split", split]
        if kind.has_vocabulary:
            own = vocabulary in (None, DATASET_VOCABULARY)
            command += ["--vocabulary", str(Path(dataset) / VOCABULARY_NAME) if own else vocabulary]
        return shlex.join(command)

    def _check_distinct_images(self) -> None:
        """Raise a `ValueError` if splits share an image id, by which alone an image is found."""
        first, second = (set(dataset["image_id"][:]) for dataset in self.splits.values())
        if common := sorted(first & second):
            raise ValueError(
                f"The splits {' and '.join(self.splits)} share {len(common)} image ids, such as {common[0]!r}: give "
                "every image its own id, or set data.eval_split=none."
            )
