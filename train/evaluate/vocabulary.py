"""Vocabulary that prompts a model on a benchmark, and its mapping to the classes of the benchmark."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from modeling_gkc.prompt_templates import resolve_templates
from modeling_gkc.vocabulary import Vocabulary

from ..data.benchmarks.protocol import Protocol

PROMPTS = {  # kind of prompts: (template set, whether synonyms are included)
    "plain": ("plain", False),
    "templates": ("vild14", False),
    "synonyms": ("plain", True),
}
REDUCTIONS = ("max", "mean", "embedding_mean")


@dataclass(frozen=True)
class BenchmarkVocabulary:
    """Vocabulary that prompts a model on a benchmark, before it is encoded.

    Attributes:
        vocabulary: A classes. Several of them may stand for one class of the benchmark, such as the background.
        class_of: (A,) int32 class of the benchmark for each of them.
        prompts: A key of `PROMPTS`.
        reduction: How the logits of several names of a class are reduced to one, as in the model's `forward`.
    """

    vocabulary: Vocabulary
    class_of: np.ndarray
    prompts: str
    reduction: str

    @classmethod
    def from_protocol(
        cls, vocabulary: Vocabulary, protocol: Protocol, prompts: str = "plain", reduction: str = "max"
    ) -> "BenchmarkVocabulary":
        """Build the vocabulary that the protocol of a benchmark prescribes.

        Args:
            vocabulary: K classes of the benchmark.
            protocol: Protocol of the benchmark, which defines the names of the background.
            prompts: A key of `PROMPTS`: first names (`plain`), first names in the packaged template sentences
                (`templates`), or all names (`synonyms`).
            reduction: How the logits of several names of a class are reduced; published evaluations use `max`.

        Raises:
            ValueError: The background class of the protocol is not one of the K classes.
        """
        names = vocabulary.names if PROMPTS[prompts][1] else [[label] for label in vocabulary.labels]
        # Templates of single classes are dropped, so that all classes are prompted in the same way.
        asked = Vocabulary.from_stored([list(synonyms) for synonyms in names], vocabulary.is_thing, vocabulary.colors)
        class_of = np.arange(len(asked), dtype=np.int32)
        if protocol.background_class is None:
            return cls(asked, class_of, prompts, reduction)
        background, words = protocol.background_class, Vocabulary.named(protocol.background_words)
        if background >= len(vocabulary):
            raise ValueError(
                f"The background of the protocol is class {background}, but the data have {len(vocabulary)} classes: "
                "prepare the data again with this version."
            )
        if protocol.background_as == "names":
            asked.names[background] += words.labels
            return cls(asked, class_of, prompts, reduction)
        kept = [index for index in range(len(asked)) if index != background]
        names = [*(asked.names[index] for index in kept), *([label] for label in words.labels)]
        class_of = np.array([*kept, *[background] * len(words)], dtype=np.int32)
        is_thing = vocabulary.is_thing and [vocabulary.is_thing[index] for index in class_of]
        return cls(Vocabulary.from_stored(names, is_thing), class_of, prompts, reduction)

    @property
    def templates(self) -> list[str]:
        """Template sentences of the prompts of each name."""
        return resolve_templates(PROMPTS[self.prompts][0])

    def as_dict(self) -> dict[str, Any]:
        """Describe the prompts for the result file."""
        return {
            "kind": self.prompts,
            "templates": self.templates,
            "reduction": self.reduction,
            "classes_asked": len(self.vocabulary),
            "names_asked": len(self.vocabulary.flat_names),
        }
