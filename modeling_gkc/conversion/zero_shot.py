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
"""Combination of a closed-vocabulary segmenter and an image-text model as an open-vocabulary segmenter.

from modeling_gkc.conversion import open_segmenter

model, processor = open_segmenter(segmenter, clip, tokenizer, segmenter_settings, clip_settings)
"""

from collections.abc import Mapping
from typing import Any

from torch import nn
from transformers import CLIPTextModelWithProjection, PreTrainedModel, PreTrainedTokenizerBase

from ..configuration_gkc_zero_shot import GKCZeroShotConfig
from ..modeling_gkc_zero_shot import GKCForZeroShotSegmentation
from ..processing_gkc import GKCProcessor
from ..region_tokens import check_tower
from ..vocabulary import Vocabulary, VocabularyLike
from .clip import check_tokenizer
from .mask2former import CONVERSION_TEMPLATES, image_processor_from_mask2former, named_vocabulary

# Classes that predict class logits and mask logits of queries, by model type.
SEGMENTERS = ("mask2former", "maskformer", "oneformer", "eomt", "eomt_dinov3", "gkc")
# Segmenters whose position embeddings fit images of one size only.
FIXED_SIZE_SEGMENTERS = ("eomt", "eomt_dinov3")
DEFAULT_TOWER_SETTINGS = {"siglip": {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}}
ONEFORMER_TASK = "the task is panoptic"


def open_segmenter(
    segmenter: PreTrainedModel,
    tower: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    segmenter_settings: Mapping[str, Any],
    tower_settings: Mapping[str, Any] | None = None,
    *,
    text_model: CLIPTextModelWithProjection | None = None,
    class_names: VocabularyLike | None = None,
    class_scores: str | None = None,
    task_tokenizer: PreTrainedTokenizerBase | None = None,
) -> tuple[GKCForZeroShotSegmentation, GKCProcessor]:
    """Make an open-vocabulary segmenter of a closed-vocabulary segmenter and an image-text model.

    Nothing is trained. The weights are copied from the given models.

    Args:
        segmenter: A model of one of the types in `SEGMENTERS`.
        tower: An image-text model of one of the types in `region_tokens.REGION_POOLING`; for CLIP's ResNet and
            ConvNeXt of this library the image encoder.
        tokenizer: Tokenizer of the image-text model.
        segmenter_settings: Content of the segmenter's `preprocessor_config.json`.
        tower_settings: Content of the image-text model's `preprocessor_config.json`, of which the normalization is
            used; default: that of the published models.
        text_model: Text encoder, if `tower` has none.
        class_names: Names of the segmenter's classes in their order; default: those of its configuration.
        class_scores: As in `GKCZeroShotConfig`; default: its default.
        task_tokenizer: Tokenizer of a OneFormer.

    Returns:
        The model, in evaluation mode, which stores the segmenter's classes as its vocabulary, and its processor.

    Raises:
        ValueError: A model is of an unsupported type, image and text embeddings have different widths, the tokenizer
            does not fit, or the classes have no names or equal embeddings.
    """
    kind, tower_kind = segmenter.config.model_type, tower.config.model_type
    if kind not in SEGMENTERS:
        raise ValueError(
            f"A {kind!r} does not predict class logits and mask logits of queries: use a segmenter of the types "
            f"{', '.join(SEGMENTERS)}."
        )
    check_tower(tower.config)
    own_text = getattr(tower.config, "text_config", None)
    if own_text is None and text_model is None:
        raise ValueError(f"A {tower_kind!r} has no text encoder of its own: give `text_model`.")
    text_config = text_model.config if own_text is None else own_text
    check_tokenizer(tokenizer, text_config)
    vocabulary = segmenter_vocabulary(segmenter, class_names)
    image_processor = image_processor_from_mask2former(segmenter_settings)
    side = segmenter.config.image_size if kind in FIXED_SIZE_SEGMENTERS else None
    if side is not None:  # also where the source splits images into squares
        image_processor.size = {"shortest_edge": side, "longest_edge": side}
    tower_values = tower_settings or DEFAULT_TOWER_SETTINGS.get(tower_kind, {})
    optional = {
        "tower_mean": tower_values.get("image_mean"),
        "tower_std": tower_values.get("image_std"),
        "text_config": text_config if own_text is None else None,
        "class_scores": class_scores,
        "segmenter_image_size": side,
    }
    if kind == "oneformer":
        if task_tokenizer is None:
            raise ValueError("A OneFormer reads its task as text: give its tokenizer as `task_tokenizer`.")
        tokens = task_tokenizer(
            ONEFORMER_TASK, padding="max_length", max_length=segmenter.config.task_seq_len, truncation=True
        )
        optional["task_tokens"] = tokens["input_ids"]
    config = GKCZeroShotConfig(
        segmenter_config=segmenter.config,
        tower_config=tower.config,
        source_vocabulary=[list(names) for names in vocabulary.names],
        image_mean=list(image_processor.image_mean),
        image_std=list(image_processor.image_std),
        **{name: value for name, value in optional.items() if value is not None},
    )
    width = _image_width(tower)
    if width != config.projection_dim:
        raise ValueError(
            f"The image-text model embeds images in {width} and texts in {config.projection_dim} dimensions: use the "
            "text encoder of the same model."
        )
    model = GKCForZeroShotSegmentation(config)
    model.segmenter.load_state_dict(segmenter.state_dict())
    if own_text is None:
        model.tower.vision_model.load_state_dict(tower.state_dict())
        model.tower.text_model.load_state_dict(text_model.state_dict())
    else:
        model.tower.load_state_dict(tower.state_dict())
    processor = GKCProcessor(image_processor, tokenizer, CONVERSION_TEMPLATES)
    model.set_vocabulary(vocabulary, processor)
    model.classifier.set_source(nn.Identity(), model.vocabulary_embeds, model.vocabulary_class_ids)
    scale = getattr(tower, "logit_scale", None)
    if scale is not None:
        model.classifier.region_scale.copy_(scale.detach().exp().squeeze())
    return model.eval(), processor


def segmenter_vocabulary(segmenter: PreTrainedModel, class_names: VocabularyLike | None = None) -> Vocabulary:
    """Return the vocabulary of a segmenter's classes, see `mask2former.source_vocabulary`.

    Raises:
        ValueError: As in `mask2former.source_vocabulary`, or a GKC stores no vocabulary.
    """
    config = segmenter.config
    if config.model_type == "gkc":
        if segmenter.vocabulary is None:
            raise ValueError("The GKC checkpoint stores no vocabulary: store one by `model.set_vocabulary(...)`.")
        if class_names is None:
            return segmenter.vocabulary
        return named_vocabulary(class_names, len(segmenter.vocabulary))
    return named_vocabulary(class_names, config.num_labels, config.id2label)


def _image_width(tower: PreTrainedModel) -> int:
    """Return the width of the image embeddings."""
    config = tower.config
    if getattr(config, "projection_dim", None):
        return config.projection_dim
    return config.vision_config.hidden_size


__all__ = ["SEGMENTERS", "open_segmenter", "segmenter_vocabulary"]
