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
"""`GKCProcessor`: images and words to tensors, tensors to segmentations."""

import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from transformers import BatchFeature
from transformers.models.auto.processing_auto import AutoProcessor
from transformers.processing_utils import ProcessingKwargs, ProcessorMixin
from transformers.tokenization_utils_base import TruncationStrategy
from transformers.utils import PaddingStrategy

from .argument_checks import check_whole_number
from .configuration_gkc import GKCConfig
from .image_processing_gkc import GKCImageProcessorKwargs, ImageLike, as_batch, check_return_tensors
from .post_processing import PostProcessingMixin
from .prompt_templates import TemplatesLike, fill_template, resolve_templates
from .remote_code import CodeSavingMixin
from .segmentation_maps import MapLike
from .vocabulary import UNKNOWN_WORDS_HINT, Vocabulary, VocabularyLike

MAX_LISTED_WORDS = 20
UNLIMITED = 10**6  # tokenizers that know no limit give a number above
# What a call may ask of the tokenizer; all else would change what `class_ids` mean, or is of no use to the model.
TEXT_SETTINGS = ("padding", "truncation", "max_length", "padding_side", "pad_to_multiple_of", "add_special_tokens")
KINDS_OF_SETTINGS = ("images_kwargs", "text_kwargs", "common_kwargs")


class GKCProcessorKwargs(ProcessingKwargs, total=False):
    """Settings of a call of `GKCProcessor`, flat or by kind."""

    images_kwargs: GKCImageProcessorKwargs


class GKCProcessor(CodeSavingMixin, PostProcessingMixin, ProcessorMixin):
    """
    A `GKCImageProcessor` and the tokenizer of the text tower in one.

    Args:
        image_processor: A `GKCImageProcessor`.
        tokenizer: Tokenizer of the text tower.
        prompt_templates: A set of `modeling_gkc.prompt_templates` ("plain", "photo", "vild14"), or sentences with one
            `{}` each; every name is put into every one, and "a" before the `{}` becomes "an" where it should. Default
            "plain", the name alone, as in the method's published evaluation.

    Raises:
        ValueError: there is no template, no such set, or a template has not exactly one `{}`.
    """

    def __init__(self, image_processor=None, tokenizer=None, prompt_templates: TemplatesLike | None = None):
        super().__init__(image_processor, tokenizer)
        self.prompt_templates = resolve_templates("plain" if prompt_templates is None else prompt_templates)

    valid_processor_kwargs = GKCProcessorKwargs

    def __call__(
        self,
        images: ImageLike | Sequence[ImageLike] | None = None,
        text: VocabularyLike | None = None,
        return_tensors: str | None = None,
        *,
        void_labels: VocabularyLike | None = None,
        prompt_templates: TemplatesLike | None = None,
        segmentation_maps: MapLike | Sequence[MapLike] | None = None,
        instance_id_to_semantic_id: Mapping[int, int] | Sequence[Mapping[int, int]] | None = None,
        **kwargs,
    ) -> BatchFeature:
        """
        Prepare images, words, or both.

        Args:
            images: One image or B images, see `GKCImageProcessor`.
            text: The K classes in any form that `Vocabulary.parse` takes: "dog; sofa, couch; lamp", ["dog", ["sofa",
                "couch"], "lamp"], "ade20k_150", a file, or a `Vocabulary`, whose classes may have templates of their
                own.
            return_tensors: "pt", "np", or None for lists.
            void_labels: V more classes, in the same forms, for what is none of the K. They get the ids K..K+V-1; give
                these to `post_process_*` as `void_label_ids`.
            prompt_templates: Templates for this call instead of the processor's, in the same forms.
            segmentation_maps: Annotations of the images for training, see `GKCImageProcessor.preprocess`.
            instance_id_to_semantic_id: Classes of the values in the maps, see `GKCImageProcessor.preprocess`.
            kwargs: Settings of the image processor, and of the prompts: `padding` (True, "longest", "max_length" or
                False; by default to the longest), `truncation`, `max_length`, `padding_side`, `pad_to_multiple_of` and
                `add_special_tokens`, as of transformers' tokenizers. They may be grouped as `images_kwargs`,
                `text_kwargs` and `common_kwargs`.

        Returns:
            For images `pixel_values` (B, 3, H, W), `pixel_mask` (B, H, W), 1 where the image is, and `original_sizes`
            (B, 2), height and width of the upright images, for the `target_sizes` of post-processing; with maps also
            `mask_labels` and `class_labels`. For text the P prompts, class by class, name by name, template by
            template: `input_ids` and `attention_mask` (P, L), padded at the right, `class_ids` (P,) in 0..K+V-1 and
            `names_per_class` (K+V,); if a name has several templates also `name_ids` (P,) in 0..N-1, the name that
            each prompt stands for, and `prompts_per_name` (N,).

        Raises:
            ValueError: neither images nor text; labels that `Vocabulary` refuses; a label without a token or with a
                special one; two labels with the same tokens; the tokenizer knows none of the words in `text`, or none
                in `void_labels`; a label with more tokens than the tokenizer's `model_max_length` or `max_length`
                (nothing is truncated, unless `truncation=True` asks for it); images and maps that `GKCImageProcessor`
                refuses; another `return_tensors`.
            TypeError: an unknown setting, or one of images without images.

        Warns:
            UserWarning: the tokenizer does not know a word, or a name belongs to several classes.
        """
        if images is None and text is None:
            raise ValueError("give images, text, or both.")
        if text is None and (void_labels is not None or prompt_templates is not None):
            raise ValueError("`void_labels` and `prompt_templates` go with `text`: give it too.")
        images_settings, text_settings = self._split_settings(kwargs)
        for settings in (images_settings, text_settings):
            return_tensors = settings.pop("return_tensors", None) or return_tensors
        check_return_tensors(return_tensors)
        if images is None and images_settings:
            raise TypeError(f"without images there is no use for {', '.join(images_settings)}.")
        device = images_settings.get("device")
        data = {}
        if images is not None:
            annotations = (segmentation_maps, instance_id_to_semantic_id)
            data.update(self.image_processor(images, *annotations, **images_settings, return_tensors="pt"))
        elif segmentation_maps is not None or instance_id_to_semantic_id is not None:
            raise ValueError("`segmentation_maps` go with `images`: give them too.")
        if text is not None:
            vocabulary, void_ids = Vocabulary.parse(text).with_void(void_labels)
            templates = self.prompt_templates if prompt_templates is None else prompt_templates
            data.update(self._encode(vocabulary, void_ids, resolve_templates(templates), **text_settings))
        if return_tensors is not None and isinstance(data.get("input_ids"), list):
            raise ValueError("labels differ in length and make no tensor without padding: leave `padding` on.")
        return as_batch(data, return_tensors, device)

    def _split_settings(self, settings: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """
        The settings of images, and of prompts with those that the tokenizer was made with.

        Raises:
            TypeError: there is no such setting.
            ValueError: a setting is given twice, or a group is no dict.
        """
        groups = {name: settings.pop(name, None) or {} for name in KINDS_OF_SETTINGS}
        for name, group in groups.items():
            if not isinstance(group, Mapping):
                raise ValueError(f"`{name}` must be a dict of settings, got {group!r}.")
        known = {"images_kwargs": set(GKCImageProcessorKwargs.__annotations__), "text_kwargs": set(TEXT_SETTINGS)}
        known["text_kwargs"].add("return_tensors")
        known["common_kwargs"] = known["images_kwargs"] | known["text_kwargs"]
        split = {}
        for kind in ("images_kwargs", "text_kwargs"):
            twice = groups[kind].keys() & settings.keys()
            if twice:
                raise ValueError(f"{', '.join(sorted(twice))}: given in `{kind}` and beside it.")
            own = {name: value for name, value in settings.items() if name in known[kind]}
            common = {name: value for name, value in groups["common_kwargs"].items() if name in known[kind]}
            split[kind] = common | dict(groups[kind]) | own
        groups["common_kwargs"] = dict(groups["common_kwargs"]) | settings
        for kind, group in groups.items():
            unknown = [name for name in group if name not in known[kind]]
            if unknown:
                raise TypeError(f"{type(self).__name__} has no setting {', '.join(map(repr, unknown))}.")
        stored = {
            name: self.tokenizer.init_kwargs.get(name) for name in ("padding", "max_length", "pad_to_multiple_of")
        }
        stored = {name: value for name, value in stored.items() if value is not None}
        return split["images_kwargs"], stored | split["text_kwargs"]

    @property
    def model_input_names(self) -> list[str]:
        """Names of the tensors that a call with images and words returns, with the processor's own templates."""
        words = ["input_ids", "attention_mask", "class_ids", "names_per_class"]
        names = [*self.image_processor.model_input_names, *words]
        return names + ["name_ids", "prompts_per_name"] * (len(self.prompt_templates) > 1)

    def unknown_classes(self, vocabulary: Vocabulary) -> list[int]:
        """
        Classes of which the tokenizer knows no name: all their words become its token for unknown words.

        Such classes all look the same to the text encoder, whatever they are called.
        """
        tokens = self.tokenizer(vocabulary.flat_names, add_special_tokens=False, verbose=False)["input_ids"]
        unknown_ids = set() if self._unknown_id is None else {self._unknown_id}
        known = {
            class_id
            for class_id, ids in zip(vocabulary.class_ids, tokens, strict=True)
            if not unknown_ids.issuperset(ids)
        }
        return [class_id for class_id in range(len(vocabulary)) if class_id not in known]

    def _encode(
        self,
        vocabulary: Vocabulary,
        void_ids: list[int],
        templates: list[str],
        padding: bool | str | None = True,
        truncation: bool | str | None = None,
        max_length: int | None = None,
        padding_side: str | None = None,
        pad_to_multiple_of: int | None = None,
        add_special_tokens: bool | None = True,
    ) -> dict[str, Any]:
        self._check_tokens(vocabulary)
        own_templates = vocabulary.templates or [None] * len(vocabulary)
        names = list(zip(vocabulary.class_ids, vocabulary.flat_names, strict=True))
        prompts, name_ids = [], []
        for name_id, (class_id, name) in enumerate(names):
            for template in own_templates[class_id] or templates:
                prompts.append(fill_template(template, name))
                name_ids.append(name_id)
        limit = self._limit(max_length)
        strategy = TruncationStrategy(("longest_first" if truncation is True else truncation) or "do_not_truncate")
        cut = {"truncation": strategy, "max_length": limit}
        cut = {} if strategy is TruncationStrategy.DO_NOT_TRUNCATE else cut
        tokens = self.tokenizer(
            prompts, add_special_tokens=add_special_tokens is not False, verbose=False, padding=False, **cut
        )["input_ids"]
        self._check_lengths(prompts, tokens, limit)
        self._check_known(vocabulary, void_ids, prompts, tokens)
        length = self._padded_length(tokens, padding, max_length, pad_to_multiple_of)
        encoded = self._pad(tokens, length, padding_side)
        encoded["class_ids"] = torch.tensor([names[name_id][0] for name_id in name_ids])
        encoded["names_per_class"] = torch.tensor([len(class_names) for class_names in vocabulary.names])
        if len(prompts) > len(names):
            encoded["name_ids"] = torch.tensor(name_ids)
            encoded["prompts_per_name"] = encoded["name_ids"].bincount()
        return encoded

    def _limit(self, max_length: int | None) -> int:
        """Tokens that a prompt may have at most."""
        if max_length is None:
            return self.tokenizer.model_max_length
        limit = check_whole_number("max_length", max_length, 1)
        if limit > self.tokenizer.model_max_length:
            raise ValueError(
                f"`max_length` {limit} is more than the {self.tokenizer.model_max_length} tokens that the text "
                "encoder reads."
            )
        return limit

    def _padded_length(
        self, tokens: list[list[int]], padding: bool | str | None, max_length: int | None, multiple: int | None
    ) -> int:
        """Length of all prompts after padding, 0 where they are not padded."""
        if isinstance(padding, bool) or padding is None:
            padding = "do_not_pad" if padding is False else "longest"
        strategy = PaddingStrategy(padding)
        if strategy is PaddingStrategy.DO_NOT_PAD:
            return 0
        length = max(map(len, tokens))
        if strategy is PaddingStrategy.MAX_LENGTH:
            length = self._limit(max_length)
            if length > UNLIMITED:
                raise ValueError("`padding='max_length'` needs a `max_length`: the tokenizer has none of its own.")
        if multiple is None:
            return length
        multiple = check_whole_number("pad_to_multiple_of", multiple, 1)
        return -(-length // multiple) * multiple

    def _pad(self, tokens: list[list[int]], length: int, side: str | None) -> dict[str, Any]:
        """Token ids and where they are, as tensors (P, length); as lists where they are of several lengths."""
        if side not in (None, "left", "right"):
            raise ValueError(f"`padding_side` must be 'right' or 'left', got {side!r}.")
        lengths = {len(prompt) for prompt in tokens}
        if not length and len(lengths) > 1:
            return {"input_ids": tokens, "attention_mask": [[1] * len(prompt) for prompt in tokens]}
        length = length or lengths.pop()
        if self.tokenizer.pad_token_id is None and lengths - {length}:
            raise ValueError("labels differ in length and the tokenizer cannot pad them: give it a `pad_token`.")
        input_ids = torch.full((len(tokens), length), self.tokenizer.pad_token_id or 0)
        attention_mask = torch.zeros_like(input_ids)
        for ids, mask, prompt in zip(input_ids, attention_mask, tokens, strict=True):
            place = slice(length - len(prompt), None) if side == "left" else slice(len(prompt))
            ids[place], mask[place] = torch.tensor(prompt), 1
        return {"input_ids": input_ids, "attention_mask": attention_mask}

    def _check_tokens(self, vocabulary: Vocabulary) -> None:
        """
        Refuse names that the text encoder cannot read as such, and labels that it cannot tell apart.

        Labels with unknown words, which all have the same token, are no matter of this check.
        """
        tokenizer = self.tokenizer
        tokens = tokenizer(vocabulary.flat_names, add_special_tokens=False, verbose=False)["input_ids"]
        special = set(tokenizer.all_special_ids)
        if tokenizer.unk_token_id not in (tokenizer.eos_token_id, tokenizer.bos_token_id):
            special -= {tokenizer.unk_token_id}
        tokens_of = dict(zip(vocabulary.flat_names, tokens, strict=True))
        for name, ids in tokens_of.items():
            if not ids:
                raise ValueError(f"the tokenizer makes no token of the label {name!r}: write it in other characters.")
            if special.intersection(ids):
                token = tokenizer.convert_ids_to_tokens(next(token for token in ids if token in special))
                raise ValueError(
                    f"the tokenizer reads a part of the label {name!r} as its special token {token!r}: write it in "
                    "other characters."
                )
        first: dict[tuple, int] = {}
        for index, label in enumerate(vocabulary.labels):
            ids, templates = tokens_of[label], vocabulary.templates and vocabulary.templates[index]
            if tokenizer.unk_token_id in ids:
                continue
            earlier = first.setdefault((*ids, *(templates or ())), index)
            if earlier != index:
                raise ValueError(
                    f"labels {earlier + 1} and {index + 1} ({vocabulary.labels[earlier]!r} and {label!r}) have the "
                    "same tokens, so that the text encoder cannot tell them apart: make one class of them, or give "
                    "one of them another name."
                )

    def _check_lengths(self, prompts: list[str], tokens: list[list[int]], limit: int) -> None:
        for prompt, ids in zip(prompts, tokens, strict=True):
            if len(ids) > limit:
                raise ValueError(
                    f"the label {prompt!r} has {len(ids)} tokens with its start and end, but the text encoder "
                    f"reads at most {limit}: shorten it."
                )

    @property
    def _unknown_id(self) -> int | None:
        """Token of unknown words, None where the tokenizer spells every word."""
        unknown_id = self.tokenizer.unk_token_id
        return None if unknown_id == self.tokenizer.eos_token_id else unknown_id

    def _check_known(
        self, vocabulary: Vocabulary, void_ids: list[int], prompts: list[str], tokens: list[list[int]]
    ) -> None:
        """Refuse classes of which none is known, and warn of unknown words."""
        if not any(self._unknown_id in ids for ids in tokens):
            return
        labels, unknown = vocabulary.labels, self.unknown_classes(vocabulary)
        asked = list(range(len(vocabulary) - len(void_ids)))
        for group, place in ((asked, ""), (void_ids, "void labels: ")):
            if group and set(group) <= set(unknown):
                raise ValueError(
                    f"{place}The text encoder knows none of these words, which all look the same to this checkpoint: "
                    f"{list_words(labels[index] for index in group)}. {UNKNOWN_WORDS_HINT}"
                )
        message = f"The text encoder does not know these words: {list_words(self._unknown_words(prompts, tokens))}."
        if unknown:
            message += (
                " Classes named by nothing else all look the same to this checkpoint, and their results mean nothing: "
                f"{list_words(labels[index] for index in unknown)}. {UNKNOWN_WORDS_HINT}"
            )
        warnings.warn(message, UserWarning, stacklevel=4)

    def _unknown_words(self, prompts: list[str], tokens: list[list[int]]) -> list[str]:
        """Words of the prompts that become the tokenizer's token for unknown words, each once."""
        unknown_id = self._unknown_id
        suspects = dict.fromkeys(
            word.strip(".,")
            for prompt, ids in zip(prompts, tokens, strict=True)
            if unknown_id in ids
            for word in prompt.split()
        )
        return [
            word
            for word in suspects
            if unknown_id in self.tokenizer(word, add_special_tokens=False, verbose=False)["input_ids"]
        ]


def list_words(words: Iterable[str]) -> str:
    """Words for a message, in quotes, the first twenty of them."""
    listed = [repr(word) for word in words]
    more = f" and {len(listed) - MAX_LISTED_WORDS} more" if len(listed) > MAX_LISTED_WORDS else ""
    return ", ".join(listed[:MAX_LISTED_WORDS]) + more


AutoProcessor.register(GKCConfig, GKCProcessor, exist_ok=True)

__all__ = ["GKCProcessor"]
