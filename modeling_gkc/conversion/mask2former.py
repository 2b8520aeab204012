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
"""Conversion of transformers' Mask2Former to an open-vocabulary segmentation model."""

import copy
import re
import warnings
from collections.abc import Mapping
from typing import Any

from torch import Tensor
from transformers import CLIPTextModelWithProjection, Mask2FormerForUniversalSegmentation, PreTrainedTokenizerBase

from ..configuration_gkc import GKCConfig
from ..image_processing_gkc import GKCImageProcessor
from ..modeling_gkc import GKCForOpenVocabSegmentation
from ..processing_gkc import GKCProcessor
from ..vocabulary import Vocabulary, VocabularyLike
from ..weight_renaming import Renaming, load_strictly, rename_weight, split_packed_projection
from .clip import check_tokenizer

_NAMES: tuple[Renaming, ...] = (
    (r"^pixel_level_module\.encoder\.", "backbone."),
    (r"^pixel_level_module\.decoder\.encoder\.layers\.", "pixel_decoder.layers."),
    (r"^pixel_level_module\.decoder\.level_embed$", "pixel_decoder.level_embedding"),
    (r"^pixel_level_module\.decoder\.adapter_1\.", "pixel_decoder.lateral_projection."),
    (r"^pixel_level_module\.decoder\.layer_1\.", "pixel_decoder.output_projection."),
    (r"^pixel_level_module\.decoder\.", "pixel_decoder."),
    (r"^transformer_module\.queries_embedder\.", "mask_decoder.query_positions."),
    (r"^transformer_module\.queries_features\.", "mask_decoder.query_features."),
    (r"^transformer_module\.level_embed\.", "mask_decoder.level_embedding."),
    (r"^transformer_module\.decoder\.layernorm\.", "mask_decoder.layer_norm."),
    (
        r"^transformer_module\.decoder\.mask_predictor\.mask_embedder\.(\d)\.0\.",
        r"mask_decoder.mask_embedder.layers.\1.",
    ),
    (r"^transformer_module\.decoder\.layers\.", "mask_decoder.layers."),
)
_IMAGE_SETTINGS = (
    "do_resize",
    "size",
    "resample",
    "do_rescale",
    "rescale_factor",
    "do_normalize",
    "image_mean",
    "image_std",
    "size_divisor",
)
_LONGEST_EDGE = 1333  # of Mask2Former's image processor
# Templates of the source's class names. With other templates the probabilities only approximate those of the source.
CONVERSION_TEMPLATES = "plain"
_PLACEHOLDER = re.compile(r"LABEL_\d+$")


def from_mask2former(
    mask2former_model: Mask2FormerForUniversalSegmentation,
    text_model: CLIPTextModelWithProjection,
    tokenizer: PreTrainedTokenizerBase | None = None,
    class_names: VocabularyLike | None = None,
) -> GKCForOpenVocabSegmentation:
    """Convert a Mask2Former model to an open-vocabulary model that predicts the same masks.

    With a tokenizer no training is needed: the source's classification head is kept, and its classes are compared
    with class names in CLIP's text embedding space (`ConvexClassifier`). For the source's own class names the
    model predicts the source's probabilities; other names get the probabilities of the source classes that they are
    similar to. The source's class names are stored as the checkpoint's vocabulary.

    The names are encoded without a prompt template, and the probabilities are equal for plain names only: keep
    `prompt_templates="plain"`, the default of `GKCProcessor`. A name within a template ("a photo of a dog") has
    another embedding and is treated like other names.

    Without a tokenizer the source's head is dropped and the projection into the text embedding space is untrained.
    Use this for training on a vocabulary that differs much from the source's.

    Args:
        mask2former_model: The source model.
        text_model: CLIP text encoder that encodes the class names.
        tokenizer: Tokenizer of the text encoder.
        class_names: Names of the source's classes in their order, in any form that `Vocabulary.parse` accepts.
            Synonyms improve the recognition of other names; prompt templates of classes are ignored. Default: the
            source's `config.id2label`.

    Returns:
        The converted model, in training mode if the source is.

    Raises:
        ValueError: If the source uses an unsupported option, its classes have no names, `class_names` has another
            number of classes, the text encoder gives two of them the same embedding, or the tokenizer does not fit the
            text encoder.

    Warns:
        UserWarning: If `class_names` have prompt templates.
    """
    config = mask2former_model.config
    if config.pre_norm or config.enforce_input_projection:
        raise ValueError(
            "Mask2Former models with `pre_norm` or `enforce_input_projection` cannot be converted: use a model "
            "without them."
        )
    if tokenizer is None:
        if class_names is not None:
            raise ValueError("`class_names` need the `tokenizer` of the text encoder: give it too.")
        model = GKCForOpenVocabSegmentation(_gkc_config(config, text_model.config))
        _load_weights(model, mask2former_model, text_model)
        return model.train(mask2former_model.training)
    vocabulary = source_vocabulary(mask2former_model, class_names)
    check_tokenizer(tokenizer, text_model.config)
    model = GKCForOpenVocabSegmentation(
        _gkc_config(
            config,
            text_model.config,
            classifier="convex_combination",
            source_vocabulary=vocabulary.names,
            logit_scale_init_value=0.0,
        )
    )
    _load_weights(model, mask2former_model, text_model)
    model.set_vocabulary(vocabulary, GKCProcessor(GKCImageProcessor(), tokenizer, CONVERSION_TEMPLATES))
    model.classifier.set_source(mask2former_model.class_predictor, model.vocabulary_embeds, model.vocabulary_class_ids)
    return model.train(mask2former_model.training)


def source_vocabulary(
    mask2former_model: Mask2FormerForUniversalSegmentation, class_names: VocabularyLike | None = None
) -> Vocabulary:
    """Return the vocabulary of a Mask2Former's classes, see `named_vocabulary`.

    Args:
        mask2former_model: The source model.
        class_names: Names of its classes in their order. Default: `config.id2label`.
    """
    num_classes = mask2former_model.class_predictor.out_features - 1
    return named_vocabulary(class_names, num_classes, mask2former_model.config.id2label)


def named_vocabulary(
    class_names: VocabularyLike | None, num_classes: int, id2label: Mapping[int, str] | None = None
) -> Vocabulary:
    """Return the vocabulary of the classes of a closed-vocabulary head, without prompt templates.

    Args:
        class_names: Names of the classes in their order. Default: `id2label`.
        num_classes: Number of classes of the head, without no-object.
        id2label: Names of the classes in the configuration of the source.

    Returns:
        The vocabulary.

    Raises:
        ValueError: If there are no names, or not one for each class of the head.

    Warns:
        UserWarning: If prompt templates of `class_names` are ignored.
    """
    if class_names is None:
        id2label = id2label or {}
        class_names = [str(id2label.get(index, f"LABEL_{index}")) for index in range(num_classes)]
        if any(map(_PLACEHOLDER.match, class_names)) or len(id2label) != num_classes:
            raise ValueError(
                f"The source's configuration has no names for its {num_classes} classes: give them as `class_names`, "
                "in their order."
            )
    vocabulary = Vocabulary.parse(class_names)
    if len(vocabulary) != num_classes:
        raise ValueError(
            f"`class_names` has {len(vocabulary)} classes, but the source has {num_classes}: name each of them, in "
            "their order, without no-object."
        )
    if any(vocabulary.templates or ()):
        warnings.warn(
            "Prompt templates of `class_names` are ignored: the names of a converted head are encoded without one.",
            UserWarning,
            stacklevel=3,
        )
        vocabulary = copy.copy(vocabulary)
        vocabulary.templates = None
    return vocabulary


def image_processor_from_mask2former(settings: Mapping[str, Any]) -> GKCImageProcessor:
    """Create an image processor that prepares images like a Mask2Former's.

    Args:
        settings: Content of the source's `preprocessor_config.json`, also of the older format whose `size` is a
            number. Settings of segmentation maps are ignored.

    Returns:
        The image processor.

    Raises:
        ValueError: If `GKCImageProcessor` does not support the `size`.
    """
    kept = {key: settings[key] for key in _IMAGE_SETTINGS if settings.get(key) is not None}
    size = kept.get("size")
    if isinstance(size, int):
        kept["size"] = {"shortest_edge": size, "longest_edge": settings.get("max_size") or _LONGEST_EDGE}
    elif size is not None and set(size) == {"shortest_edge"} and settings.get("max_size"):
        kept["size"] = {**size, "longest_edge": settings["max_size"]}
    if "size_divisibility" in settings:
        kept.setdefault("size_divisor", settings["size_divisibility"])
    return GKCImageProcessor(**kept)


def _load_weights(
    model: GKCForOpenVocabSegmentation,
    mask2former_model: Mask2FormerForUniversalSegmentation,
    text_model: CLIPTextModelWithProjection,
) -> None:
    load_strictly(model.model, _renamed_weights(mask2former_model.model.state_dict()))
    model.text_model.load_state_dict(text_model.state_dict())


def _gkc_config(config, text_config, **overrides) -> GKCConfig:
    return GKCConfig(
        backbone_config=config.backbone_config,
        text_config=text_config,
        hidden_size=config.hidden_dim,
        mask_feature_size=config.mask_feature_size,
        encoder_layers=config.encoder_layers,
        encoder_ffn_dim=config.encoder_feedforward_dim,
        decoder_layers=config.decoder_layers - 1,
        decoder_ffn_dim=config.dim_feedforward,
        num_attention_heads=config.num_attention_heads,
        num_queries=config.num_queries,
        dropout=config.dropout,
        no_object_weight=config.no_object_weight,
        class_weight=config.class_weight,
        mask_weight=config.mask_weight,
        dice_weight=config.dice_weight,
        train_num_points=config.train_num_points,
        oversample_ratio=config.oversample_ratio,
        importance_sample_ratio=config.importance_sample_ratio,
        **overrides,
    )


def _renamed_weights(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename Mask2Former's weights and split the packed projections of its cross-attention."""
    weights = {}
    for name, weight in state_dict.items():
        renamed = rename_weight(name, _NAMES)
        if renamed is None:
            raise ValueError(f"The Mask2Former weight {name!r} is unknown and cannot be converted.")
        weights |= split_packed_projection(renamed, weight)
    return weights


__all__ = [
    "CONVERSION_TEMPLATES",
    "from_mask2former",
    "image_processor_from_mask2former",
    "named_vocabulary",
    "source_vocabulary",
]
