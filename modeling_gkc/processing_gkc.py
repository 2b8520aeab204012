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
"""`GKCProcessor`: prepare images and class names for the model, and post-process its outputs."""

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
from .label_text import shown
from .post_processing import PostProcessingMixin
from .prompt_templates import TemplatesLike, fill_template, resolve_templates
from .remote_code import CodeSavingMixin
from .segmentation_maps import MapLike
from .vocabulary import UNKNOWN_WORDS_HINT, Vocabulary, VocabularyLike

MAX_LISTED_WORDS = 20
UNLIMITED = 10**6  # tokenizers without a maximum length report a larger number
# Tokenizer arguments that a call accepts; the others would change the meaning of `class_ids` or are of no use here.
TEXT_SETTINGS = ("padding", "truncation", "max_length", "padding_side", "pad_to_multiple_of", "add_special_tokens")
KINDS_OF_SETTINGS = ("images_kwargs", "text_kwargs", "common_kwargs")


class GKCProcessorKwargs(ProcessingKwargs, total=False):
    """Keyword arguments of `GKCProcessor.__call__`, flat or grouped by modality."""

    images_kwargs: GKCImageProcessorKwargs


class GKCProcessor(CodeSavingMixin, PostProcessingMixin, ProcessorMixin):
    """Processor that combines a `GKCImageProcessor` with the tokenizer of the text encoder.

    Args:
        image_processor: A `GKCImageProcessor`.
        tokenizer: Tokenizer of the text encoder.
        prompt_templates: Name of a template set of `modeling_gkc.prompt_templates` ("plain", "photo", "vild14",
            "fc_clip"), or a list of sentences with one `{}` each. Every class name is inserted into every template;
            "a" before the `{}` becomes "an" before a vowel sound. Default: "plain", the name alone, as in the
            published evaluation of GKC (Han, Liu et al., ICCV 2023).

    Raises:
        ValueError: If no template is given, the template set is unknown, or a template does not contain exactly one
            `{}`.
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
        """Prepare images, class names, or both.

        Args:
            images: One image or a batch of B images, see `GKCImageProcessor`.
            text: The K classes in any form that `Vocabulary.parse` accepts: "dog; sofa, couch; lamp", ["dog",
                ["sofa", "couch"], "lamp"], "ade20k_150", a file, or a `Vocabulary`, whose classes may have their own
                prompt templates.
            return_tensors: "pt", "np", or None for lists.
            void_labels: V additional classes, in the same forms, for regions that belong to none of the K classes.
                They get the class ids K..K+V-1; pass these to `post_process_*` as `void_label_ids`.
            prompt_templates: Templates of this call, which replace the processor's, in the same forms.
            segmentation_maps: Annotations of the images for training, see `GKCImageProcessor.preprocess`.
            instance_id_to_semantic_id: Class of each value in the maps, see `GKCImageProcessor.preprocess`.
            kwargs: Arguments of the image processor and of the tokenizer: `padding` (True, "longest", "max_length" or
                False; default: to the longest prompt), `truncation`, `max_length`, `padding_side`,
                `pad_to_multiple_of` and `add_special_tokens`, as in transformers' tokenizers. They may be grouped as
                `images_kwargs`, `text_kwargs` and `common_kwargs`.

        Returns:
            For images: `pixel_values` (B, 3, H, W), `pixel_mask` (B, H, W), 1 inside the image and 0 in the padding,
            and `original_sizes` (B, 2), (height, width) in pixels of the upright images, for the `target_sizes` of
            post-processing; with maps also `mask_labels` and `class_labels`. For text: the P prompts, ordered by
            class, name and template: `input_ids` and `attention_mask` (P, L), padded at the right, `class_ids` (P,)
            in 0..K+V-1 and `names_per_class` (K+V,); if a name has several templates, also `name_ids` (P,) in 0..N-1,
            the name of each prompt, and `prompts_per_name` (N,).

        Raises:
            ValueError: If neither images nor text are given; if `Vocabulary` rejects the labels; if a label has no
                token or contains a special token; if two labels have the same tokens; if the tokenizer knows no word
                of `text` or none of `void_labels`; if a label has more tokens than `max_length` or the tokenizer's
                `model_max_length` (prompts are truncated only with `truncation=True`); if `GKCImageProcessor` rejects
                the images or maps; or if `return_tensors` is unknown.
            TypeError: If an argument is unknown, or if image arguments are given without images.

        Warns:
            UserWarning: If the tokenizer does not know a word, or if a name belongs to several classes.
        """
        if images is None and text is None:
            raise ValueError("Give `images`, `text`, or both.")
        if text is None and (void_labels is not None or prompt_templates is not None):
            raise ValueError("`void_labels` and `prompt_templates` need `text`: give it too.")
        images_settings, text_settings = self._split_settings(kwargs)
        for settings in (images_settings, text_settings):
            return_tensors = settings.pop("return_tensors", None) or return_tensors
        check_return_tensors(return_tensors)
        if images is None and images_settings:
            raise TypeError(f"Image settings need `images`: give images, or remove {', '.join(images_settings)}.")
        device = images_settings.get("device")
        data = {}
        if images is not None:
            annotations = (segmentation_maps, instance_id_to_semantic_id)
            data.update(self.image_processor(images, *annotations, **images_settings, return_tensors="pt"))
        elif segmentation_maps is not None or instance_id_to_semantic_id is not None:
            raise ValueError("`segmentation_maps` need `images`: give them too.")
        if text is not None:
            vocabulary, void_ids = Vocabulary.parse(text).with_void(void_labels)
            templates = self.prompt_templates if prompt_templates is None else prompt_templates
            data.update(self._encode(vocabulary, void_ids, resolve_templates(templates), **text_settings))
        if return_tensors is not None and isinstance(data.get("input_ids"), list):
            raise ValueError("Prompts of different lengths cannot form a tensor without padding: set `padding=True`.")
        return as_batch(data, return_tensors, device)

    def _split_settings(self, settings: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """Split the arguments of a call into those of images and those of text.

        Padding arguments that were stored with the tokenizer are the defaults of the latter.

        Raises:
            TypeError: If an argument is unknown.
            ValueError: If an argument is given twice, or a group of arguments is not a dict.
        """
        groups = {name: settings.pop(name, None) or {} for name in KINDS_OF_SETTINGS}
        for name, group in groups.items():
            if not isinstance(group, Mapping):
                raise ValueError(f"`{name}` must be a dict of settings, got {shown(group)}.")
        known = {"images_kwargs": set(GKCImageProcessorKwargs.__annotations__), "text_kwargs": set(TEXT_SETTINGS)}
        known["text_kwargs"].add("return_tensors")
        known["common_kwargs"] = known["images_kwargs"] | known["text_kwargs"]
        split = {}
        for kind in ("images_kwargs", "text_kwargs"):
            twice = groups[kind].keys() & settings.keys()
            if twice:
                raise ValueError(
                    f"Give {', '.join(sorted(twice))} either in `{kind}` or as a separate argument, not both."
                )
            own = {name: value for name, value in settings.items() if name in known[kind]}
            common = {name: value for name, value in groups["common_kwargs"].items() if name in known[kind]}
            split[kind] = common | dict(groups[kind]) | own
        groups["common_kwargs"] = dict(groups["common_kwargs"]) | settings
        for kind, group in groups.items():
            unknown = [name for name in group if name not in known[kind]]
            if unknown:
                raise TypeError(f"{type(self).__name__} has no argument {', '.join(map(repr, unknown))}.")
        stored = {
            name: self.tokenizer.init_kwargs.get(name) for name in ("padding", "max_length", "pad_to_multiple_of")
        }
        stored = {name: value for name, value in stored.items() if value is not None}
        return split["images_kwargs"], stored | split["text_kwargs"]

    @property
    def model_input_names(self) -> list[str]:
        """Names of the tensors that a call with images and text returns with the processor's own templates."""
        text_names = ["input_ids", "attention_mask", "class_ids", "names_per_class"]
        names = [*self.image_processor.model_input_names, *text_names]
        return names + ["name_ids", "prompts_per_name"] * (len(self.prompt_templates) > 1)

    def unknown_classes(self, vocabulary: Vocabulary) -> list[int]:
        """Return the ids of classes whose names consist of unknown tokens only.

        The text encoder gives all such classes the same embedding, so that they cannot be told apart.
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
        """Return the maximum number of tokens of a prompt."""
        if max_length is None:
            return self.tokenizer.model_max_length
        limit = check_whole_number("max_length", max_length, 1)
        if limit > self.tokenizer.model_max_length:
            raise ValueError(
                f"`max_length` must be at most {self.tokenizer.model_max_length}, the text encoder's maximum, got "
                f"{limit}."
            )
        return limit

    def _padded_length(
        self, tokens: list[list[int]], padding: bool | str | None, max_length: int | None, multiple: int | None
    ) -> int:
        """Return the length of all prompts after padding, or 0 if they are not padded."""
        if isinstance(padding, bool) or padding is None:
            padding = "do_not_pad" if padding is False else "longest"
        strategy = PaddingStrategy(padding)
        if strategy is PaddingStrategy.DO_NOT_PAD:
            return 0
        length = max(map(len, tokens))
        if strategy is PaddingStrategy.MAX_LENGTH:
            length = self._limit(max_length)
            if length > UNLIMITED:
                raise ValueError("`padding='max_length'` needs `max_length`: the tokenizer has no maximum length.")
        if multiple is None:
            return length
        multiple = check_whole_number("pad_to_multiple_of", multiple, 1)
        return -(-length // multiple) * multiple

    def _pad(self, tokens: list[list[int]], length: int, side: str | None) -> dict[str, Any]:
        """Return `input_ids` and `attention_mask` (P, length), as lists if unpadded prompts differ in length."""
        if side not in (None, "left", "right"):
            raise ValueError(f"`padding_side` must be 'right' or 'left', got {shown(side)}.")
        lengths = {len(prompt) for prompt in tokens}
        if not length and len(lengths) > 1:
            return {"input_ids": tokens, "attention_mask": [[1] * len(prompt) for prompt in tokens]}
        length = length or lengths.pop()
        if self.tokenizer.pad_token_id is None and lengths - {length}:
            raise ValueError(
                "Prompts differ in length and the tokenizer cannot pad them: set the tokenizer's `pad_token`."
            )
        input_ids = torch.full((len(tokens), length), self.tokenizer.pad_token_id or 0)
        attention_mask = torch.zeros_like(input_ids)
        for ids, mask, prompt in zip(input_ids, attention_mask, tokens, strict=True):
            place = slice(length - len(prompt), None) if side == "left" else slice(len(prompt))
            ids[place], mask[place] = torch.tensor(prompt), 1
        return {"input_ids": input_ids, "attention_mask": attention_mask}

    def _check_tokens(self, vocabulary: Vocabulary) -> None:
        """Check that names have ordinary tokens and that labels can be told apart by their tokens.

        Labels with unknown words are left to `_check_known`, since they all have the same token.

        Raises:
            ValueError: If a name has no token or a special token, or if two labels have the same tokens.
        """
        tokenizer = self.tokenizer
        tokens = tokenizer(vocabulary.flat_names, add_special_tokens=False, verbose=False)["input_ids"]
        special = set(tokenizer.all_special_ids)
        if tokenizer.unk_token_id not in (tokenizer.eos_token_id, tokenizer.bos_token_id):
            special -= {tokenizer.unk_token_id}
        tokens_of = dict(zip(vocabulary.flat_names, tokens, strict=True))
        for name, ids in tokens_of.items():
            if not ids:
                raise ValueError(
                    f"The tokenizer has no token for the label {shown(name)}: write it in other characters."
                )
            if special.intersection(ids):
                token = tokenizer.convert_ids_to_tokens(next(token for token in ids if token in special))
                raise ValueError(
                    f"The label {shown(name)} contains the tokenizer's special token {token!r}: write it in other "
                    "characters."
                )
        first: dict[tuple, int] = {}
        for index, label in enumerate(vocabulary.labels):
            ids, templates = tokens_of[label], vocabulary.templates and vocabulary.templates[index]
            if tokenizer.unk_token_id in ids:
                continue
            earlier = first.setdefault((*ids, *(templates or ())), index)
            if earlier != index:
                raise ValueError(
                    f"Labels {earlier + 1} and {index + 1} ({shown(vocabulary.labels[earlier])} and {shown(label)}) "
                    "have the same tokens, so that the text encoder cannot tell them apart: merge them into one "
                    "class, or rename one of them."
                )

    def _check_lengths(self, prompts: list[str], tokens: list[list[int]], limit: int) -> None:
        for prompt, ids in zip(prompts, tokens, strict=True):
            if len(ids) > limit:
                raise ValueError(
                    f"The prompt {shown(prompt)} has {len(ids)} tokens including start and end, but the text encoder "
                    f"takes at most {limit}: shorten it."
                )

    @property
    def _unknown_id(self) -> int | None:
        """Id of the token for unknown words, or None if the tokenizer can encode every word."""
        unknown_id = self.tokenizer.unk_token_id
        return None if unknown_id == self.tokenizer.eos_token_id else unknown_id

    def _check_known(
        self, vocabulary: Vocabulary, void_ids: list[int], prompts: list[str], tokens: list[list[int]]
    ) -> None:
        """Check that the tokenizer knows a class of each group, and warn about unknown words."""
        if not any(self._unknown_id in ids for ids in tokens):
            return
        labels, unknown = vocabulary.labels, self.unknown_classes(vocabulary)
        asked = list(range(len(vocabulary) - len(void_ids)))
        for group, place in ((asked, ""), (void_ids, "Void labels: ")):
            if group and set(group) <= set(unknown):
                raise ValueError(
                    f"{place}The text encoder knows none of these words and gives them all the same embedding: "
                    f"{list_words(labels[index] for index in group)}. {UNKNOWN_WORDS_HINT}"
                )
        message = f"The text encoder does not know these words: {list_words(self._unknown_words(prompts, tokens))}."
        if unknown:
            message += (
                " Classes without a known word all get the same embedding, so that their results are meaningless: "
                f"{list_words(labels[index] for index in unknown)}. {UNKNOWN_WORDS_HINT}"
            )
        warnings.warn(message, UserWarning, stacklevel=4)

    def _unknown_words(self, prompts: list[str], tokens: list[list[int]]) -> list[str]:
        """Return the distinct words of the prompts that the tokenizer does not know."""
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
    """Return a comma-separated list of quoted words for a message, at most the first twenty."""
    listed = [repr(word) for word in words]
    more = f" and {len(listed) - MAX_LISTED_WORDS} more" if len(listed) > MAX_LISTED_WORDS else ""
    return ", ".join(listed[:MAX_LISTED_WORDS]) + more


AutoProcessor.register(GKCConfig, GKCProcessor, exist_ok=True)

__all__ = ["GKCProcessor"]
