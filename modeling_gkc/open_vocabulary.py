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
"""Text methods of the segmentation models: encode, store and resolve vocabularies, and classify queries by them.

Letters: B images, Q queries, D text-embedding width, K classes, N names, P prompts (P >= N >= K because of templates
and synonyms), L tokens of a prompt.
"""

import copy

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils.generic import can_return_tuple
from transformers.utils.import_utils import is_tracing

from .class_embeddings import (
    GKCClassEmbeddings,
    average_class_embeds,
    average_templates,
    check_class_embeds,
    check_prompts,
    count_classes,
    has_adapters,
    weights_state,
)
from .classifiers import ClassPrompts
from .configuration_gkc import PROMPT_REDUCTIONS
from .encoded_vocabulary import EncodedVocabulary
from .vocabulary import Vocabulary, VocabularyLike

PROMPTS_PER_PASS = 256


class OpenVocabularyMixin:
    """Mixin with the text methods of the segmentation models.

    The model must have a `text_model`, a `text_cache`, a `classifier`, and the buffers `vocabulary_embeds` and
    `vocabulary_class_ids`.
    """

    @can_return_tuple
    def get_text_features(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, **kwargs
    ) -> BaseModelOutputWithPooling:
        """Return the output of the text encoder, in the form of the method of this name of transformers' CLIP.

        Args:
            input_ids: (P, L) token ids of the prompts.
            attention_mask: (P, L) mask of the tokens, 0 at padding.
            **kwargs: Further arguments of `CLIPTextModelWithProjection.forward`, such as `output_hidden_states`.

        Returns:
            The output of the text encoder, whose `pooler_output` (P, D) are the projected embeddings before
            normalization. `embed_prompts` returns the normalized embeddings.
        """
        output = self.text_model(input_ids=input_ids, attention_mask=attention_mask, return_dict=True, **kwargs)
        return BaseModelOutputWithPooling(
            last_hidden_state=output.last_hidden_state,
            pooler_output=output.text_embeds,
            hidden_states=output.hidden_states,
            attentions=output.attentions,
        )

    def embed_prompts(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Encode prompts with the frozen text encoder.

        Embeddings of earlier calls are taken from `self.text_cache`. Compiled and exported graphs encode all prompts
        in one pass and do not use the cache.

        Args:
            input_ids: (P, L) token ids of the prompts.
            attention_mask: (P, L) mask of the tokens, 0 at padding.

        Returns:
            (P, D) L2-normalized embeddings.
        """
        if is_tracing(input_ids):
            with torch.no_grad():
                return self._encode_pass(input_ids, attention_mask)
        # Cached tensors are created outside of inference mode, because its tensors cannot be used in training.
        with torch.inference_mode(False), torch.no_grad():
            state = None if has_adapters(self.text_model) else self._text_state(input_ids.device.type)
            if state is None:
                return self._encode_prompts(input_ids, attention_mask)
            return self.text_cache.embed(input_ids, attention_mask, self._encode_prompts, state)

    def _encode_prompts(self, input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
        """Encode prompts in passes of 256, which bounds the memory."""
        masks = [None] * len(input_ids) if attention_mask is None else attention_mask.split(PROMPTS_PER_PASS)
        passes = zip(input_ids.split(PROMPTS_PER_PASS), masks, strict=False)
        return torch.cat([self._encode_pass(ids, mask) for ids, mask in passes])

    def _encode_pass(self, input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
        return F.normalize(self.get_text_features(input_ids, attention_mask, return_dict=True).pooler_output, dim=-1)

    def _text_state(self, device: str) -> tuple | None:
        """Return what text embeddings depend on except for the prompt: autocast settings and weights.

        Returns:
            A hashable state, or None if the weights cannot be inspected.
        """
        weights = weights_state(self.text_model)
        if weights is None:
            return None
        return torch.is_autocast_enabled(device), torch.get_autocast_dtype(device), weights

    def get_class_embeddings(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        class_ids: Tensor | None = None,
        name_ids: Tensor | None = None,
        names_per_class: Tensor | None = None,
        prompts_per_name: Tensor | None = None,
    ) -> GKCClassEmbeddings:
        """Encode a vocabulary once for many calls of `forward`.

        Args:
            input_ids: (P, L) token ids of the prompts.
            attention_mask: (P, L) mask of the tokens, 0 at padding.
            class_ids: (P,) class of each prompt, 0..K-1; default: each name is a class of its own.
            name_ids: (P,) name of each prompt, 0..N-1; the embeddings of the prompts of a name, which differ by their
                templates, are averaged. Default: each prompt is a name of its own.
            names_per_class: (K,) number of names of each class, as counted by `GKCProcessor`; needed only in compiled
                and exported graphs.
            prompts_per_name: (N,) number of prompts of each name; needed only in compiled and exported graphs.

        Returns:
            The embeddings (N, D) of the names, the class of each, and the number of names of each class.

        Raises:
            ValueError: If the ids do not fit each other, or a class or a name has no prompt.
        """
        check_prompts(input_ids, attention_mask)
        with torch.inference_mode(False), torch.no_grad():  # as for `embed_prompts`
            embeds = self.embed_prompts(input_ids, attention_mask)
            if name_ids is not None:
                embeds, class_ids = average_templates(embeds, class_ids, name_ids, prompts_per_name)
            if class_ids is None:
                class_ids = torch.arange(len(embeds), device=embeds.device)
                names_per_class = torch.ones_like(class_ids)
            else:
                num_classes = count_classes(class_ids, len(embeds), counts=names_per_class)
                class_ids = class_ids.clone()
                if names_per_class is None:
                    names_per_class = class_ids.bincount(minlength=num_classes)
        return GKCClassEmbeddings(class_embeds=embeds, class_ids=class_ids, names_per_class=names_per_class)

    def set_vocabulary(self, vocabulary: VocabularyLike, processor) -> None:
        """Store a vocabulary in the model and its configuration, including `config.id2label`.

        Args:
            vocabulary: Vocabulary in any form that `GKCProcessor` accepts: a list of names, a nested list of synonyms,
                a string such as "dog; sofa, couch", the name of a packaged vocabulary such as "ade20k_150", a file, or
                a `Vocabulary`.
            processor: `GKCProcessor` of this checkpoint.

        Raises:
            ValueError: If `Vocabulary` rejects the names, or the text encoder gives two classes the same embedding.
        """
        vocabulary = Vocabulary.parse(vocabulary)
        encoded = EncodedVocabulary.encode(vocabulary, self, processor, distinct=True)
        # Copy the configuration, because other models may share it and do not have this vocabulary.
        self.config = copy.deepcopy(self.config)
        self.vocabulary_embeds = encoded.class_embeds
        self.vocabulary_class_ids = encoded.class_ids
        self.config.vocabulary = [list(names) for names in vocabulary.names]
        self.config.vocabulary_is_thing = vocabulary.is_thing and list(vocabulary.is_thing)
        self.config.vocabulary_colors = vocabulary.colors and [color and list(color) for color in vocabulary.colors]
        self.config.vocabulary_templates = vocabulary.templates and list(vocabulary.templates)
        self.config.vocabulary_num_prompts = len(encoded.class_ids)
        self.config.id2label = {index: names[0] for index, names in enumerate(vocabulary.names)}
        self.config.label2id = {name: index for index, name in self.config.id2label.items()}

    @property
    def vocabulary(self) -> Vocabulary | None:
        """Vocabulary that is stored in the checkpoint, or None."""
        config = self.config
        if config.vocabulary is None:
            return None
        fields = (config.vocabulary_is_thing, config.vocabulary_colors, config.vocabulary_templates)
        return Vocabulary.from_stored(config.vocabulary, *fields)

    @property
    def temperature(self) -> Tensor:
        """Factor of the class logits, clamped at 100 as in CLIP."""
        return self.classifier.temperature

    def class_logits(self, query_embeds: Tensor, class_embeds: Tensor) -> Tensor:
        """Compute the logits of query embeddings for prompts, with each prompt as a class of its own.

        Logits are computed in fp32 at least, because the temperature of up to 100 amplifies rounding errors.

        Args:
            query_embeds: (B, Q, D) L2-normalized embeddings of the queries.
            class_embeds: (P, D) L2-normalized embeddings of the prompts.

        Returns:
            (B, Q, P + 1) logits; the last column is no-object.
        """
        prompts = ClassPrompts(class_embeds, None, len(class_embeds), "max")
        return self.classifier.classify_embeds(query_embeds, prompts)

    def classify(
        self,
        query_embeds: Tensor,
        class_embeds: Tensor,
        class_ids: Tensor | None = None,
        prompt_reduction: str | None = None,
        names_per_class: Tensor | None = None,
    ) -> Tensor:
        """Classify the queries of an earlier output by another vocabulary, without running the image path again.

        Args:
            query_embeds: (B, Q, D) query embeddings of an earlier output.
            class_embeds: (P, D) prompt embeddings computed by `get_class_embeddings`.
            class_ids: (P,) class of each prompt; default: each prompt is a class of its own.
            prompt_reduction: `mean`, `max` or `embedding_mean`; default: `config.prompt_reduction`.
            names_per_class: (K,) number of names of each class, from `get_class_embeddings`; needed only in compiled
                and exported graphs.

        Returns:
            (B, Q, K + 1) class logits; the last column is no-object.

        Raises:
            ValueError: As in `forward`.
        """
        prompts = self.resolve_vocabulary(
            class_ids=class_ids,
            class_embeds=class_embeds,
            prompt_reduction=prompt_reduction,
            names_per_class=names_per_class,
        )
        return self.classifier.classify_embeds(query_embeds, prompts)

    def resolve_vocabulary(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        class_ids: Tensor | None = None,
        name_ids: Tensor | None = None,
        class_embeds: Tensor | None = None,
        prompt_reduction: str | None = None,
        names_per_class: Tensor | None = None,
        prompts_per_name: Tensor | None = None,
    ) -> ClassPrompts:
        """Encode the given prompts, or look up the stored vocabulary; arguments and errors as in `forward`."""
        reduction = prompt_reduction or self.config.prompt_reduction
        if reduction not in PROMPT_REDUCTIONS:
            raise ValueError(f"`prompt_reduction` must be one of {', '.join(PROMPT_REDUCTIONS)}, got {reduction!r}.")
        if input_ids is not None and class_embeds is not None:
            raise ValueError("Give the vocabulary as `input_ids` or as `class_embeds`, not both.")
        if input_ids is not None:
            class_embeds, class_ids, names_per_class = self.get_class_embeddings(
                input_ids, attention_mask, class_ids, name_ids, names_per_class, prompts_per_name
            ).to_tuple()
        elif name_ids is not None or attention_mask is not None:
            raise ValueError("`attention_mask` and `name_ids` need `input_ids`: give these, too.")
        if class_embeds is None:
            if class_ids is not None:
                raise ValueError("`class_ids` need `input_ids` or `class_embeds`: give one of them, too.")
            if self.vocabulary_embeds is None:
                raise ValueError(
                    "There is no vocabulary: give `input_ids`, which `GKCProcessor(text=...)` returns, or "
                    "`class_embeds`, or store a vocabulary with `model.set_vocabulary(...)`."
                )
            class_embeds, class_ids = self.vocabulary_embeds, self.vocabulary_class_ids
            num_classes = len(self.config.vocabulary)
            if num_classes == self.config.vocabulary_num_prompts:  # in the order of the classes
                class_ids = None
        else:
            check_class_embeds(class_embeds, self.config.projection_dim)
            num_classes = len(class_embeds)
            if class_ids is not None:
                num_classes = count_classes(class_ids, len(class_embeds), counts=names_per_class)
                if num_classes == len(class_embeds):  # one name per class, in any order
                    class_embeds, class_ids = class_embeds[class_ids.argsort()], None
        if class_ids is not None and reduction == "embedding_mean":
            class_embeds, class_ids = average_class_embeds(class_embeds, class_ids, num_classes), None
        return ClassPrompts(class_embeds, class_ids, num_classes, reduction)


__all__ = ["OpenVocabularyMixin"]
