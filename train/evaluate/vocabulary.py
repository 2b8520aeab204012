"""The vocabulary that a model is given for a benchmark, and the benchmark's class of each of its classes."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from modeling_gkc.prompt_templates import resolve_templates
from modeling_gkc.vocabulary import Vocabulary

from ..data.benchmarks.protocol import Protocol

PROMPTS = {  # name of a way to ask: template set, and whether synonyms are asked too
    "plain": ("plain", False),
    "templates": ("vild14", False),
    "synonyms": ("plain", True),
}
REDUCTIONS = ("max", "mean", "embedding_mean")


@dataclass(frozen=True)
class BenchmarkVocabulary:
    """
    The classes that a model is asked for on a benchmark, before they are encoded.

    Attributes:
        vocabulary: The A classes that are asked for.
        class_of: (A,) int32 class of the benchmark that each of them stands for.
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
        """
        Choose the classes and names that a benchmark's protocol asks for.

        Args:
            vocabulary: The benchmark's K classes.
            protocol: Says which words stand for the background.
            prompts: `plain` names, names in the packaged sentences (`templates`), or all names (`synonyms`).
            reduction: Of several names of one class; published evaluations take `max`.

        Raises:
            ValueError: The protocol's background class is not among the K.
        """
        names = vocabulary.names if PROMPTS[prompts][1] else [[label] for label in vocabulary.labels]
        # Templates of single classes are left out, so that all classes are asked in one way.
        asked = Vocabulary.from_stored([list(synonyms) for synonyms in names], vocabulary.is_thing, vocabulary.colors)
        class_of = np.arange(len(asked), dtype=np.int32)
        if protocol.background_class is None:
            return cls(asked, class_of, prompts, reduction)
        background, words = protocol.background_class, Vocabulary.named(protocol.background_words)
        if background >= len(vocabulary):
            raise ValueError(
                f"the protocol's background is class {background}, but the data have {len(vocabulary)} classes: "
                "prepare them again with this version."
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
        """The sentences that every name is put into."""
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
