"""Text embeddings of a vocabulary, computed once before training.

Letters: P prompts (one for each name of each class), K classes, D width of the image-text space.
"""

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor
from tqdm.auto import tqdm

from modeling_gkc.class_embeddings import average_class_embeds
from modeling_gkc.encoded_vocabulary import EncodedVocabulary
from modeling_gkc.modeling_gkc import GKCForOpenVocabSegmentation
from modeling_gkc.processing_gkc import GKCProcessor
from modeling_gkc.vocabulary import Vocabulary

_NAMES_PER_PASS = 256


@dataclass(frozen=True)
class TextBank:
    """Unit text embeddings of all prompts of a vocabulary.

    Attributes:
        names: Name of each of the P prompts, class by class, the first name of a class before its synonyms.
        class_ids: (P,) class of each prompt.
        embeds: (P, D) unit text embeddings.
    """

    names: tuple[str, ...]
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
        """Encode every name of a vocabulary once.

        The embeddings of a name with several prompt templates are averaged.

        Args:
            vocabulary: K classes with their names.
            model: Model that provides the text encoder.
            processor: Processor that provides tokenizer and prompt templates.
            progress: Whether to show a progress bar.
        """
        # A name may belong to several classes; the processor takes each once, ignoring case.
        distinct = list({name.casefold(): name for name in vocabulary.flat_names}.values())
        parts = [distinct[start : start + _NAMES_PER_PASS] for start in range(0, len(distinct), _NAMES_PER_PASS)]
        embeds = []
        for part in tqdm(parts, desc="Embedding names", unit=f"{_NAMES_PER_PASS} names", disable=not progress):
            encoded = EncodedVocabulary.encode(part, model, processor)
            embeds.append(average_class_embeds(encoded.class_embeds, encoded.class_ids).float().cpu())
        position = {name.casefold(): index for index, name in enumerate(distinct)}
        rows = [position[name.casefold()] for name in vocabulary.flat_names]
        return cls(tuple(vocabulary.flat_names), torch.tensor(vocabulary.class_ids), torch.cat(embeds)[rows])

    @cached_property
    def name_prompts(self) -> Tensor:
        """Position (K,) of the prompt of each class's first name."""
        return torch.searchsorted(self.class_ids, torch.arange(self.num_classes, device=self.class_ids.device))

    @cached_property
    def num_classes(self) -> int:
        """Number K of classes."""
        return int(self.class_ids[-1]) + 1

    def to(self, device: torch.device | str) -> "TextBank":
        """Copy the bank to a device."""
        return replace(self, class_ids=self.class_ids.to(device), embeds=self.embeds.to(device))
