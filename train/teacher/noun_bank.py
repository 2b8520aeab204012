"""Sampling of the nouns of captions, and their text embeddings, computed once before training.

Letters: B images, T nouns of a caption, D width of the image-text space, W distinct nouns.
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
    """Draw the nouns of a caption that a step uses.

    Args:
        nouns: Nouns of the caption; repeated ones count once.
        dropout: Probability that a noun is left out.
        limit: Largest number of nouns that are returned.
        generator: Source of randomness on the CPU.
    """
    distinct = list(dict.fromkeys(nouns))
    kept = torch.rand(len(distinct), generator=generator, dtype=torch.float64) >= dropout
    order = torch.randperm(len(distinct), generator=generator).tolist()
    return [distinct[index] for index in order if kept[index]][:limit]


def distinct_nouns(*datasets: Dataset | IterableDataset | None) -> list[str]:
    """Return all distinct nouns of datasets with a column `nouns`, sorted.

    Args:
        datasets: Datasets; None is skipped.

    Raises:
        ValueError: A dataset has no column `nouns`.
    """
    nouns: set[str] = set()
    for dataset in datasets:
        if dataset is not None:
            nouns.update(_nouns_of(dataset))
    return sorted(nouns)


def _nouns_of(dataset: Dataset | IterableDataset) -> Iterable[str]:
    """Yield the nouns of a dataset, also repeated ones."""
    if dataset.column_names is not None and "nouns" not in dataset.column_names:
        raise ValueError(
            "Grounding needs the nouns of the captions in a column `nouns`: make it with `python -m train.cache nouns "
            "DATASET`, or set grounding.weight=0."
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
        nouns: W nouns, distinct if case is ignored.
        embeds: (W, D) unit embeddings.
    """

    nouns: tuple[str, ...]
    embeds: Tensor

    @classmethod
    def from_nouns(
        cls, nouns: Iterable[str], model: GKCForOpenVocabSegmentation, processor: GKCProcessor
    ) -> "NounBank":
        """Encode every noun once.

        Args:
            nouns: Nouns; repeated ones are encoded once, ignoring case.
            model: Model that provides the text encoder.
            processor: Processor that provides tokenizer and prompt templates.

        Raises:
            ValueError: There are no nouns.
        """
        distinct = sorted({noun.casefold() for noun in nouns})
        if not distinct:
            raise ValueError("The captions of the dataset have no nouns to ground: set grounding.weight=0.")
        embeds = TextBank.from_vocabulary(Vocabulary([[noun] for noun in distinct]), model, processor).embeds
        return cls(tuple(distinct), embeds)

    @cached_property
    def _rows(self) -> dict[str, int]:
        return {noun: row for row, noun in enumerate(self.nouns)}

    def embed(self, captions: Sequence[Sequence[str]]) -> tuple[Tensor, Tensor]:
        """Look up the embeddings of the nouns of captions.

        Args:
            captions: Nouns of each of the B captions.

        Returns:
            (B, T, D) embeddings, padded with zeros, and a (B, T) bool mask, true for nouns and false for padding.

        Raises:
            KeyError: A noun is not in the bank.
        """
        unknown = sorted({noun for nouns in captions for noun in nouns if noun.casefold() not in self._rows})
        if unknown:
            raise KeyError(f"The noun bank has no embedding of {unknown}: encode the nouns of the training dataset.")
        longest = max(map(len, captions), default=0)
        rows = torch.full((len(captions), longest), -1)
        for target, nouns in zip(rows, captions, strict=True):
            target[: len(nouns)] = torch.tensor([self._rows[noun.casefold()] for noun in nouns])
        rows = rows.to(self.embeds.device)
        mask = rows >= 0
        return self.embeds[rows.clamp(min=0)] * mask[..., None], mask

    def to(self, device: torch.device | str) -> "NounBank":
        """Copy the bank to a device."""
        return NounBank(self.nouns, self.embeds.to(device))
