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
"""Configuration of a closed-vocabulary segmenter whose regions are named by an image-text model."""

from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict
from transformers import CONFIG_MAPPING, AutoConfig
from transformers.configuration_utils import PreTrainedConfig

from .argument_checks import check_number, check_whole_number, shown
from .configuration_gkc import (
    VocabularyConfigMixin,
    copy_config,
    create_nested_config,
    raise_value_errors,
    remove_origin,
    require,
)
from .remote_code import CodeSavingMixin

CLASS_SCORES = ("segmenter", "regions", "both")


@raise_value_errors
@strict
class GKCZeroShotConfig(CodeSavingMixin, VocabularyConfigMixin, PreTrainedConfig):
    """Configuration of `GKCForZeroShotSegmentation`.

    Args:
        segmenter_config: Configuration of the segmenter, of a model type of transformers with queries, or its fields.
        tower_config: Configuration of the image-text model, or its fields. For an image encoder without a text
            encoder, as CLIP's ResNet and ConvNeXt of this library, `text_config` is needed too.
        text_config: Configuration of the text encoder; default: that of `tower_config`.
        source_vocabulary: Names of the segmenter's classes, one list of names (label, then synonyms) per class.
        class_scores: Source of the class scores: `segmenter`, the segmenter's probabilities distributed over the
            requested classes (see `ConvexClassifier`); `regions`, similarities of region embeddings and prompts; or
            `both`, the weighted average of their logarithms.
        region_weight: Weight of the regions in that average, between 0 and 1. The default was the best of 0.3, 0.5 and
            0.7 on the drawn world (`python -m train.miniworld.zero_shot`).
        tower_image_size: Length in pixels to which the shorter side of an image is resized for the image-text model;
            default: its own image size.
        segmenter_image_size: Side in pixels of the square that a segmenter with a fixed input size takes; None if the
            segmenter takes images of any size.
        image_mean, image_std: Normalization of `pixel_values`, that of the segmenter.
        tower_mean, tower_std: Normalization of the image-text model.
        task_tokens: Token ids of the task, an input of OneFormer.
        prompt_reduction: As in `GKCConfig`.
        vocabulary, vocabulary_is_thing, vocabulary_colors, vocabulary_templates, vocabulary_num_prompts: As in
            `GKCConfig`.

    Raises:
        ValueError: If the values do not define a valid model; the message says what to change.
    """

    model_type = "gkc_zero_shot"
    sub_configs: ClassVar[dict] = {"segmenter_config": AutoConfig, "tower_config": AutoConfig}
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["query_embeds", "content_sizes"]

    segmenter_config: dict | PreTrainedConfig | None = None
    tower_config: dict | PreTrainedConfig | None = None
    text_config: dict | PreTrainedConfig | None = None
    source_vocabulary: list[list[str]] | None = None
    class_scores: str = "both"
    region_weight: float | int = 0.3
    tower_image_size: int | None = None
    segmenter_image_size: int | None = None
    image_mean: list[float] | tuple[float, ...] = (0.485, 0.456, 0.406)
    image_std: list[float] | tuple[float, ...] = (0.229, 0.224, 0.225)
    tower_mean: list[float] | tuple[float, ...] = (0.48145466, 0.4578275, 0.40821073)
    tower_std: list[float] | tuple[float, ...] = (0.26862954, 0.26130258, 0.27577711)
    task_tokens: list[int] | None = None
    prompt_reduction: str = "mean"
    logit_scale_init_value: float | int = 0.0
    vocabulary: list[list[str]] | None = None
    vocabulary_is_thing: list[bool | None] | None = None
    vocabulary_colors: list[list[int] | None] | None = None
    vocabulary_templates: list[list[str] | None] | None = None
    vocabulary_num_prompts: int = 0

    def __post_init__(self, **kwargs):
        self.segmenter_config = _resolve("segmenter_config", self.segmenter_config, "mask2former")
        self.tower_config = _resolve("tower_config", self.tower_config, "clip")
        own = getattr(self.tower_config, "text_config", None)
        if self.text_config is not None:
            self.text_config = _resolve("text_config", self.text_config, "clip_text_model")
        elif own is not None:
            self.text_config = copy_config(own)
        self._check_vocabulary()
        super().__post_init__(**kwargs)
        self._check()

    def check_settings(self) -> None:
        """Check the settings that `from_pretrained` can change.

        Raises:
            ValueError: `class_scores` is unknown, `region_weight` does not lie between 0 and 1, or an image size is
                not positive.
        """
        require(
            self.class_scores in CLASS_SCORES,
            f"`class_scores` must be one of {', '.join(CLASS_SCORES)}, got {shown(self.class_scores)}.",
        )
        check_number("region_weight", self.region_weight, 0, 1)
        for name in ("tower_image_size", "segmenter_image_size"):
            if getattr(self, name) is not None:
                check_whole_number(name, getattr(self, name), 1)

    def _check(self):
        self.check_settings()
        require(
            self.text_config is not None,
            f"A {self.tower_config.model_type!r} has no text encoder of its own: give `text_config`.",
        )
        for name in ("image_mean", "image_std", "tower_mean", "tower_std"):
            values = getattr(self, name)
            require(len(values) == 3, f"`{name}` must have three values, got {shown(values)}.")
            for value in values:
                check_number(name, value, 1e-6 if name.endswith("std") else -1000)
        stored = len(self.source_vocabulary or [])
        require(
            stored < self.projection_dim,
            f"A text space of width {self.projection_dim} holds at most {self.projection_dim - 1} classes of the "
            f"segmenter, got {stored}: use an image-text model with wider embeddings.",
        )

    @property
    def projection_dim(self) -> int:
        """Dimension D of the image-text embedding space."""
        if hasattr(self.tower_config, "text_config"):
            own = getattr(self.tower_config, "projection_dim", None)
            return own or getattr(self.text_config, "projection_size", self.text_config.hidden_size)
        return self.text_config.projection_dim


def _resolve(field: str, config: dict | PreTrainedConfig | None, default: str) -> PreTrainedConfig:
    """Create a nested configuration from its fields, or copy it, so that models do not share it."""
    if isinstance(config, PreTrainedConfig):
        return copy_config(config)
    require(
        config is None or isinstance(config, dict),
        f"`{field}` must be a configuration or a dict, got {shown(config)}.",
    )
    values: dict[str, Any] = remove_origin(config or {})
    model_type = values.pop("model_type", default)
    require(
        isinstance(model_type, str) and model_type in CONFIG_MAPPING,
        f"`{field}` has the unknown model_type {shown(model_type)}.",
    )
    return create_nested_config(field, CONFIG_MAPPING[model_type], values)


AutoConfig.register(GKCZeroShotConfig.model_type, GKCZeroShotConfig, exist_ok=True)

__all__ = ["CLASS_SCORES", "GKCZeroShotConfig"]
