# Copyright 2026 The GKC Authors.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""`EncodedVocabulary`: classes with their text embeddings, encoded once for many images.

Letters: N names, K classes, V void classes, D text-embedding width.
"""

import dataclasses
import json
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .atomic_files import atomic_path
from .class_embeddings import check_class_embeds, count_classes, equal_classes
from .configuration_gkc import PROMPT_REDUCTIONS
from .file_checksums import EMPTY_CHECKSUM, verify_checksum, write_checksum
from .label_text import shown
from .prompt_templates import TemplatesLike
from .vocabulary import UNKNOWN_WORDS_HINT, Vocabulary, VocabularyLike

FILE_FORMAT = "gkc-class-embeddings-2"
# Files with void classes or a reduction, which readers of the older format would ignore.
EXTENDED_FILE_FORMAT = "gkc-class-embeddings-3"
PROBE_PROMPTS = 16
SAME_ENCODER_COSINE = 0.995
# Largest difference of the length of an embedding from 1: rounding in bfloat16 has relative errors of up to 2^-8.
UNIT_LENGTH_TOLERANCE = 1e-2
MAX_LISTED_GROUPS = 10


@dataclass(frozen=True, eq=False)
class EncodedVocabulary:
    """Vocabulary with the text embeddings of its names.

    Three classes hold text embeddings. `GKCClassEmbeddings`, the output of `model.get_class_embeddings`, holds the
    tensors that `forward` takes, without names. `train.teacher.text_bank.TextBank` holds one embedding per name, for
    training losses. This class holds embeddings and vocabulary together, as predictions need them.

    Args:
        vocabulary: K + V classes, the V void classes last.
        class_embeds: (N, D) L2-normalized embeddings of the names.
        class_ids: (N,) class of each name, 0..K+V-1.
        void_ids: Classes whose pixels become void, K..K+V-1.
        reduction: How the logits of several names of a class are reduced to one: `mean`, `max` or `embedding_mean`;
            None for `config.prompt_reduction` of the model.

    Raises:
        TypeError: `vocabulary` is not a `Vocabulary`, or `void_ids` is not a tuple.
        ValueError: Embeddings are not finite or not normalized; embeddings, class ids and vocabulary do not match; the
            void classes are not the last classes or are all classes; or the reduction is unknown.

    Example:
        >>> encoded = EncodedVocabulary.encode("dog; sofa, couch; lamp", model, processor)
        >>> outputs = model(pixel_values, **encoded.model_inputs())
        >>> encoded.save("furniture.safetensors", model)
    """

    vocabulary: Vocabulary
    class_embeds: Tensor
    class_ids: Tensor
    void_ids: tuple[int, ...] = ()
    reduction: str | None = None
    names_per_class: Tensor = field(init=False, repr=False)

    def __post_init__(self):
        if not isinstance(self.vocabulary, Vocabulary):
            raise TypeError(
                f"`vocabulary` must be a Vocabulary, got {shown(self.vocabulary)}: encode words by "
                "`EncodedVocabulary.encode(words, model, processor)`."
            )
        check_class_embeds(self.class_embeds, read=True)
        lengths = self.class_embeds.float().norm(dim=-1)
        if not torch.allclose(lengths, torch.ones_like(lengths), atol=UNIT_LENGTH_TOLERANCE):
            raise ValueError(
                f"`class_embeds` must be L2-normalized, got lengths from {lengths.min():.3g} to {lengths.max():.3g}: "
                "divide each row by its length."
            )
        if not isinstance(self.void_ids, tuple | list | range):
            raise TypeError(f"`void_ids` must be a tuple of class ids, got {shown(self.void_ids)}.")
        num_classes = count_classes(self.class_ids, len(self.class_embeds))
        if num_classes != len(self.vocabulary):
            raise ValueError(
                f"The embeddings are of {num_classes} classes, but the vocabulary has {len(self.vocabulary)} classes."
            )
        num_shown = num_classes - len(self.void_ids)
        if list(self.void_ids) != list(range(num_shown, num_classes)) or num_shown < 1:
            raise ValueError(
                f"`void_ids` must be the last of {num_classes} classes and not all of them, got {list(self.void_ids)}."
            )
        if self.reduction not in (None, *PROMPT_REDUCTIONS):
            raise ValueError(
                f"`reduction` must be one of {', '.join(PROMPT_REDUCTIONS)}, got {shown(self.reduction)}."
            )
        object.__setattr__(self, "names_per_class", self.class_ids.bincount(minlength=num_classes))

    @classmethod
    def encode(
        cls,
        vocabulary: VocabularyLike,
        model: Any,
        processor: Any,
        *,
        prompt_templates: TemplatesLike | None = None,
        reduction: str | None = None,
        distinct: bool = False,
    ) -> "EncodedVocabulary":
        """Encode a vocabulary with a model, which caches prompts and encodes only new ones.

        Args:
            vocabulary: Classes in any form that `Vocabulary.parse` accepts.
            model: A `GKCForOpenVocabSegmentation`.
            processor: Its `GKCProcessor`.
            prompt_templates: Prompt templates; by default those of the processor.
            reduction: Reduction of several names of a class, as for the constructor.
            distinct: As for `check_distinct`.

        Raises:
            ValueError: As for `GKCProcessor` and `check_distinct`.

        Warns:
            UserWarning: As for `GKCProcessor` and `check_distinct`.
        """
        vocabulary = Vocabulary.parse(vocabulary)
        prompts = processor(text=vocabulary, prompt_templates=prompt_templates, return_tensors="pt")
        embeddings = model.get_class_embeddings(**prompts.to(input_device(model)))
        encoded = cls(vocabulary, embeddings.class_embeds, embeddings.class_ids, reduction=reduction)
        encoded.check_distinct(processor, distinct)
        return encoded

    @classmethod
    def from_model(cls, model: Any) -> "EncodedVocabulary | None":
        """Return the vocabulary stored in the checkpoint of a model, None if there is none."""
        vocabulary = model.vocabulary
        if vocabulary is None:
            return None
        return cls(vocabulary, model.vocabulary_embeds, model.vocabulary_class_ids)

    @property
    def labels(self) -> list[str]:
        """First names of the K classes, without void classes."""
        return self.vocabulary.labels[: len(self.vocabulary) - len(self.void_ids)]

    def model_inputs(self) -> dict[str, Any]:
        """Return the arguments of the model's `forward` that select this vocabulary."""
        return {
            "class_embeds": self.class_embeds,
            "class_ids": self.class_ids,
            "names_per_class": self.names_per_class,
            "prompt_reduction": self.reduction,
        }

    def with_is_thing_from(self, other: Vocabulary | None) -> "EncodedVocabulary":
        """Return this vocabulary with the thing/stuff kinds of another, see `Vocabulary.with_is_thing_from`."""
        vocabulary = self.vocabulary.with_is_thing_from(other)
        return self if vocabulary is self.vocabulary else dataclasses.replace(self, vocabulary=vocabulary)

    def with_void(
        self,
        void_labels: VocabularyLike | None,
        model: Any,
        processor: Any,
        *,
        prompt_templates: TemplatesLike | None = None,
    ) -> "EncodedVocabulary":
        """Return a copy with void classes added; only these are encoded.

        Args:
            void_labels: V classes in any form that `Vocabulary.parse` accepts; None adds none.
            model: Model that encoded the other classes.
            processor: Its `GKCProcessor`.
            prompt_templates: Prompt templates; by default those of the processor.

        Raises:
            ValueError: As for `encode` and `Vocabulary.with_void`, or the vocabulary has void classes already.
        """
        if void_labels is None:
            return self
        if self.void_ids:
            raise ValueError("The vocabulary has void classes already: pass all void classes in one call.")
        joined, void_ids = self.vocabulary.with_void(void_labels)
        # Parsing `void_labels` a second time would repeat its warnings.
        added = slice(len(self.vocabulary), None)
        void = Vocabulary.from_stored(joined.names[added], templates=joined.templates and joined.templates[added])
        encoded = EncodedVocabulary.encode(void, model, processor, prompt_templates=prompt_templates)
        return dataclasses.replace(
            self,
            vocabulary=joined,
            class_embeds=torch.cat([self.class_embeds, encoded.class_embeds]),
            class_ids=torch.cat([self.class_ids, encoded.class_ids + len(self.vocabulary)]),
            void_ids=tuple(void_ids),
        )

    def check_distinct(self, processor: Any, distinct: bool = False) -> None:
        """Check that the classes have different embeddings.

        Classes count as equal if their names have the same embeddings up to rounding, or if the tokenizer knows none
        of their words: "hammer" and "claw hammer" may then differ only in the number of unknown tokens.

        Args:
            processor: The `GKCProcessor` that tokenized the prompts.
            distinct: Whether any two equal classes raise an error, as training and evaluation require. By default only
                a vocabulary whose classes are all equal does, and other equal classes cause a warning.

        Raises:
            ValueError: Classes are equal.

        Warns:
            UserWarning: Some classes are equal.
        """
        equal = equal_classes(self.class_embeds, self.class_ids)
        unknown = processor.unknown_classes(self.vocabulary) if equal or distinct else []
        groups = [group for group in equal if not set(group) <= set(unknown)]
        if distinct and len(unknown) > 1:
            groups.append(unknown)
        if not groups:
            return
        labels = self.vocabulary.labels
        listed = "; ".join(" = ".join(repr(labels[index]) for index in group) for group in groups[:MAX_LISTED_GROUPS])
        more = len(groups) - MAX_LISTED_GROUPS
        listed += f"; and {more} more groups" if more > 0 else ""
        message = f"These classes have equal embeddings, so that the checkpoint cannot tell them apart: {listed}."
        if distinct or len(groups[0]) == len(self.vocabulary):
            raise ValueError(f"{message} {UNKNOWN_WORDS_HINT}")
        warnings.warn(f"{message} Results assign one of them arbitrarily.", UserWarning, stacklevel=3)

    def save(self, path: str | Path, model: Any) -> None:
        """Write a safetensors file of the embeddings, with names, kinds, colors and void classes in its header.

        Args:
            path: File to write.
            model: The `GKCForOpenVocabSegmentation` that encoded the names. The file identifies its text encoder by
                some embeddings.

        Raises:
            IsADirectoryError: The path is a folder.
            FileNotFoundError: The folder of the file does not exist.
        """
        tensors = {"probe": _probe(model), "class_embeds": self.class_embeds, "class_ids": self.class_ids}
        vocabulary = json.dumps(dataclasses.asdict(self.vocabulary), ensure_ascii=False)
        metadata = {"format": FILE_FORMAT, "vocabulary": vocabulary, **EMPTY_CHECKSUM}
        if self.void_ids or self.reduction is not None:
            extension = {"num_void": len(self.void_ids), "reduction": self.reduction}
            metadata |= {"format": EXTENDED_FILE_FORMAT, "extension": json.dumps(extension)}
        if Path(path).is_dir():
            raise IsADirectoryError(f"{path} is a folder: give the name of a file, such as words.safetensors.")
        if not Path(path).absolute().parent.is_dir():
            raise FileNotFoundError(f"The folder {Path(path).absolute().parent} does not exist: create it first.")
        with atomic_path(path) as temporary:
            save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, temporary, metadata)
            write_checksum(temporary)

    @classmethod
    def load(cls, path: str | Path, model: Any) -> "EncodedVocabulary":
        """Read a file that `save` wrote, to the device of the model.

        Args:
            path: File to read.
            model: The `GKCForOpenVocabSegmentation` that will use the vocabulary.

        Raises:
            FileNotFoundError: The file does not exist.
            IsADirectoryError: The path is a folder.
            ValueError: The file is damaged, has another format, or was written with another text encoder.
        """
        if not Path(path).exists():
            raise FileNotFoundError(f"{path} does not exist: write it with `gkc embed`.")
        if Path(path).is_dir():
            raise IsADirectoryError(f"{path} is a folder: give the file that `gkc embed` wrote.")
        try:
            with safe_open(path, framework="pt", device=str(input_device(model))) as file:
                metadata = file.metadata() or {}
                if metadata.get("format") not in (FILE_FORMAT, EXTENDED_FILE_FORMAT):
                    raise ValueError(f"{path} is not a file of class embeddings: write one with `gkc embed`.")
                verify_checksum(path, "write it again with `gkc embed`.")
                probe, embeds, class_ids = (file.get_tensor(name) for name in ("probe", "class_embeds", "class_ids"))
            vocabulary = Vocabulary.from_stored(**json.loads(metadata["vocabulary"]))
            extension = json.loads(metadata.get("extension", '{"num_void": 0, "reduction": null}'))
            num_classes = count_classes(class_ids, len(embeds))
            void_ids = tuple(range(num_classes - extension["num_void"], num_classes))
        except (SafetensorError, KeyError, TypeError) as error:
            raise ValueError(f"{path} is not a file of class embeddings: {error}") from error
        if num_classes != len(vocabulary):
            raise ValueError(
                f"{path} holds embeddings of {num_classes} classes, but names of {len(vocabulary)} classes."
            )
        own = _probe(model)
        if (
            probe.shape != own.shape
            or not F.cosine_similarity(probe.float(), own.float(), dim=-1).min() >= SAME_ENCODER_COSINE
        ):
            raise ValueError(
                f"{path} was written with the text encoder of another model: write it again with `gkc embed --model`."
            )
        return cls(vocabulary, embeds, class_ids, void_ids, extension["reduction"])


def _probe(model: Any) -> Tensor:
    """Embed fixed token sequences as (16, D), which identify a text encoder in any precision."""
    config = model.config.text_config
    length = min(8, config.max_position_embeddings)
    steps = torch.arange(PROBE_PROMPTS * length).unflatten(0, (PROBE_PROMPTS, length))
    tokens = (steps * 7919 + 1) % config.vocab_size
    # The default of SigLIP's configuration lies outside of its vocabulary.
    end_token = min(config.eos_token_id, config.vocab_size - 1)
    tokens[tokens == end_token] -= 1
    tokens[:, -1] = end_token
    return model.embed_prompts(tokens.to(input_device(model)))


def input_device(model: Any) -> torch.device:
    """Return the device of the model's inputs; the CPU for an offloaded model, whose inputs accelerate moves."""
    return torch.device("cpu") if model.device.type == "meta" else model.device


__all__ = ["EncodedVocabulary", "input_device"]
