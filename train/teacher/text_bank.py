"""Text embeddings of a vocabulary, encoded once before training.

Letters: P prompts (all names of all classes), K classes, D width of the image-text space.
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

_WORDS_PER_PASS = 256


@dataclass(frozen=True)
class TextBank:
    """Unit text embeddings of all prompts of a vocabulary.

    Attributes:
        words: P prompts, class by class, the name of a class before its synonyms.
        class_ids: (P,) class of each prompt.
        embeds: (P, D) unit vectors.
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
        """Encode every word once; several prompt templates of a word are averaged."""
        # One word may belong to several classes; the processor takes each once, whatever its case.
        distinct = list({word.casefold(): word for word in vocabulary.flat_names}.values())
        parts = [distinct[start : start + _WORDS_PER_PASS] for start in range(0, len(distinct), _WORDS_PER_PASS)]
        embeds = []
        for part in tqdm(parts, desc="Embedding words", unit=f"{_WORDS_PER_PASS} words", disable=not progress):
            encoded = EncodedVocabulary.encode(part, model, processor)
            embeds.append(average_class_embeds(encoded.class_embeds, encoded.class_ids).float().cpu())
        position = {word.casefold(): index for index, word in enumerate(distinct)}
        rows = [position[word.casefold()] for word in vocabulary.flat_names]
        return cls(tuple(vocabulary.flat_names), torch.tensor(vocabulary.class_ids), torch.cat(embeds)[rows])

    @cached_property
    def name_prompts(self) -> Tensor:
        """(K,) position of the name of each class, which is the first of its prompts."""
        return torch.searchsorted(self.class_ids, torch.arange(self.num_classes, device=self.class_ids.device))

    @cached_property
    def num_classes(self) -> int:
        """Number of classes, K."""
        return int(self.class_ids[-1]) + 1

    def to(self, device: torch.device | str) -> "TextBank":
        """Copy the bank to a device."""
        return replace(self, class_ids=self.class_ids.to(device), embeds=self.embeds.to(device))
