"""Nouns of captions: which of them a step uses, and their text embeddings, encoded once.

Letters: B images, T nouns of a caption, D width of the image-text space, W different nouns.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from datasets import Dataset, IterableDataset
from torch import Tensor
from tqdm.auto import tqdm

from modeling_gkc.modeling_gkc import GKCForOpenVocabSegmentation
from modeling_gkc.processing_gkc import GKCProcessor
from modeling_gkc.vocabulary import Vocabulary

from .text_bank import TextBank

_ROWS_PER_READ = 1000


def draw_nouns(nouns: Sequence[str], dropout: float, limit: int, generator: torch.Generator) -> list[str]:
    """Leave each different noun of a caption out with probability `dropout`; of the rest take `limit` at random."""
    different = list(dict.fromkeys(nouns))
    stays = torch.rand(len(different), generator=generator, dtype=torch.float64) >= dropout
    order = torch.randperm(len(different), generator=generator).tolist()
    return [different[index] for index in order if stays[index]][:limit]


def distinct_nouns(*datasets: Dataset | IterableDataset | None) -> list[str]:
    """All nouns of datasets with a column `nouns`, sorted.

    Raises:
        ValueError: a dataset has no such column.
    """
    nouns: set[str] = set()
    for dataset in datasets:
        if dataset is not None:
            nouns.update(_nouns_of(dataset))
    return sorted(nouns)


def _nouns_of(dataset: Dataset | IterableDataset) -> Iterable[str]:
    if dataset.column_names is not None and "nouns" not in dataset.column_names:
        raise ValueError(
            "Grounding needs the nouns of the captions in a column `nouns`: make it with `python -m train.cache nouns "
            "DATASET`, or set grounding_weight=0."
        )
    reads = dataset.select_columns(["nouns"]).iter(batch_size=_ROWS_PER_READ)
    for rows in tqdm(reads, desc="Reading nouns", unit=f"{_ROWS_PER_READ} images", leave=False):
        for nouns in rows["nouns"]:
            for noun in nouns or []:  # of one caption, or lists of several
                yield from [noun] if isinstance(noun, str) else noun


@dataclass(frozen=True)
class NounBank:
    """Unit text embeddings of nouns.

    Attributes:
        nouns: W nouns, no two equal but for case.
        embeds: (W, D).
    """

    nouns: tuple[str, ...]
    embeds: Tensor

    @classmethod
    def from_nouns(
        cls, nouns: Iterable[str], model: GKCForOpenVocabSegmentation, processor: GKCProcessor
    ) -> "NounBank":
        """Encode every noun once.

        Args:
            nouns: in any case, repeated or not.
            model, processor: encode text.
        """
        different = sorted({noun.casefold() for noun in nouns})
        if not different:
            raise ValueError("There are no nouns: no caption could be grounded. Set grounding_weight=0.")
        embeds = TextBank.from_vocabulary(Vocabulary([[noun] for noun in different]), model, processor).embeds
        return cls(tuple(different), embeds)

    @cached_property
    def _rows(self) -> dict[str, int]:
        return {noun: row for row, noun in enumerate(self.nouns)}

    def embed(self, captions: Sequence[Sequence[str]]) -> tuple[Tensor, Tensor]:
        """Embeddings (B, T, D) of the nouns of captions, padded with zeros, and (B, T) bool, where nouns are.

        Raises:
            KeyError: naming nouns that the bank lacks.
        """
        unknown = sorted({noun for nouns in captions for noun in nouns if noun.casefold() not in self._rows})
        if unknown:
            raise KeyError(f"The bank of nouns lacks {unknown}: encode the nouns of the dataset that is trained on.")
        longest = max(map(len, captions), default=0)
        rows = torch.full((len(captions), longest), -1)
        for target, nouns in zip(rows, captions, strict=True):
            target[: len(nouns)] = torch.tensor([self._rows[noun.casefold()] for noun in nouns])
        rows = rows.to(self.embeds.device)
        mask = rows >= 0
        return self.embeds[rows.clamp(min=0)] * mask[..., None], mask

    def to(self, device: torch.device | str) -> "NounBank":
        """The same bank on another device."""
        return NounBank(self.nouns, self.embeds.to(device))
