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
"""Configurations of the segmentation model (`GKCConfig`) and of CLIP's ResNet and ConvNeXt image encoders."""

import copy
import functools
import re
from collections.abc import Callable
from typing import Any, ClassVar, TypeVar

import torch
from huggingface_hub.dataclasses import strict
from huggingface_hub.errors import StrictDataclassError
from transformers import CONFIG_MAPPING, AutoConfig, CLIPTextConfig, ConvNextConfig
from transformers.activations import ACT2FN
from transformers.backbone_utils import BackboneConfigMixin
from transformers.configuration_utils import PreTrainedConfig

from .argument_checks import check_number, check_whole_number, shown
from .label_text import normalize_label
from .remote_code import CodeSavingMixin

CLASSIFIERS = ("projection", "convex_combination", "fc_clip")
CLASS_FEATURES = ("query", "pooled", "query+pooled", "query+mask_features")
ENSEMBLES = ("none", "average", "geometric")
PROMPT_REDUCTIONS = ("mean", "max", "embedding_mean")
DEFORMABLE_ATTENTION_KERNELS = ("grid_sample", "embedding_bag", "triton")
BACKBONE_STRIDES = (4, 8, 16, 32)
NUM_FEATURE_LEVELS = 3
GROUP_NORM_GROUPS = 32
LAST_FOUR = [-4, -3, -2, -1]


def require(condition: bool, message: str) -> None:
    """Raise a ValueError with this message if a condition is not met."""
    if not condition:
        raise ValueError(message)


def _require_positive(config: PreTrainedConfig, names: tuple[str, ...], part: str = "") -> None:
    """Check that fields are whole numbers from 1 to their limit in `_LIMITS`."""
    for name in names:
        value = getattr(config, name)
        is_number = isinstance(value, int) and not isinstance(value, bool)
        require(is_number, f"`{part}{name}` must be a whole number, got {shown(value)}.")
        require(value > 0, f"`{part}{name}` must be positive, got {shown(value)}.")
        limit = _LIMITS.get(name, MAX_WIDTH)
        require(value <= limit, f"`{part}{name}` must be at most {limit}, got {shown(value)}.")


def _check_common(config: PreTrainedConfig, part: str = "") -> None:
    """Check fields common to all configurations, which transformers uses unchecked to build, save and print models."""
    dtype = config.dtype
    require(
        dtype is None or (isinstance(dtype, torch.dtype) and dtype.is_floating_point),
        f"`{part}dtype` must be a floating-point type such as 'float32', got {shown(dtype)}.",
    )
    attention = config._attn_implementation
    require(
        # A name with a "/" would load code from the Hub.
        attention is None or (isinstance(attention, str) and "/" not in attention),
        f"`{part}attn_implementation` must be a name such as 'sdpa', got {shown(attention)}.",
    )
    quantization = getattr(config, "quantization_config", None)
    require(
        quantization is None or isinstance(quantization, dict) or hasattr(quantization, "to_dict"),
        f"`{part}quantization_config` must be an object of settings, got {shown(quantization)}.",
    )


# Far larger than any trained model: a damaged file is rejected before a model of that size is built.
MAX_WIDTH = 2**16
MAX_LAYERS = 256
_LIMITS = {
    "decoder_layers": MAX_LAYERS,
    "encoder_layers": MAX_LAYERS,
    "num_hidden_layers": MAX_LAYERS,
    "encoder_num_points": 1024,
    "num_channels": 1024,
    "vocab_size": 2**24,
    "train_num_points": 2**24,
}
_CONFIG = TypeVar("_CONFIG", bound=type)
# Errors that transformers raises for values of unexpected types.
_ERRORS_OF_VALUES = (StrictDataclassError, ArithmeticError, AttributeError, LookupError, RecursionError, TypeError)


def raise_value_errors(config_class: _CONFIG) -> _CONFIG:
    """Decorate a configuration class to raise a one-line ValueError for any invalid value."""
    init = config_class.__init__

    @functools.wraps(init)
    def checked_init(self: PreTrainedConfig, *args, **kwargs) -> None:
        _check_id2label(kwargs)
        try:
            init(self, *args, **kwargs)
        except _ERRORS_OF_VALUES as error:
            raise ValueError(_describe_error(config_class, error, kwargs)) from error

    config_class.__init__ = checked_init
    return config_class


def _check_id2label(values: dict[str, Any]) -> None:
    labels = values.get("id2label")
    is_map = isinstance(labels, dict) and all(
        re.fullmatch(r"\d{1,9}", str(key)) and isinstance(name, str) for key, name in labels.items()
    )
    require(labels is None or is_map, f"`id2label` must map class ids to names, got {shown(labels)}.")
    if values.get("num_labels") is not None:
        check_whole_number("num_labels", values["num_labels"], 0, _LIMITS["vocab_size"])


def _describe_error(config_class: type, error: Exception, values: dict[str, Any]) -> str:
    named = re.match(r"Validation error for field '(\w+)'", str(error))
    if named is None:
        cause = error.__cause__ if isinstance(error, StrictDataclassError) and error.__cause__ else error
        # An unpaired surrogate could not be printed.
        reason = " ".join(str(cause).split())[:300].encode("utf-8", "backslashreplace").decode()
        return f"Invalid values for {config_class.__name__}: {type(cause).__name__}: {reason}"
    name = named[1]
    field = config_class.__dataclass_fields__.get(name)
    kind = str(getattr(field.type, "__name__", field.type) if isinstance(field.type, type) else field.type)
    return f"`{name}` must be of the type {kind}, got {shown(values.get(name))}."


@raise_value_errors
@strict
class CLIPResNetConfig(CodeSavingMixin, BackboneConfigMixin, PreTrainedConfig):
    r"""Configuration of CLIP's ResNet image encoder, used as a backbone and as a complete image model.

    The defaults are those of RN50 (Radford et al., *Learning Transferable Visual Models From Natural Language
    Supervision*, 2021, table 19). The other published towers are
    RN101 `depths=[3, 4, 23, 3], projection_dim=512`;
    RN50x4 `width=80, depths=[4, 6, 10, 6], num_attention_heads=40, image_size=288, projection_dim=640`;
    RN50x16 `width=96, depths=[6, 8, 18, 8], num_attention_heads=48, image_size=384, projection_dim=768`;
    RN50x64 `width=128, depths=[3, 15, 36, 10], num_attention_heads=64, image_size=448, projection_dim=1024`.

    Args:
        width: Number of output channels of the stem; stage i (0..3) has `4 * width * 2**i` channels.
        depths: Number of bottleneck blocks in each of the four stages.
        num_attention_heads: Number of heads of the attention pooling, which has `32 * width` channels.
        image_size: Side in pixels of the square training images. It determines the number of position embeddings of
            the attention pooling, `(image_size // 32) ** 2 + 1`; they are resized for other input sizes.
        projection_dim: Dimension D of the image-text embedding space.
        num_channels: Number of channels of the input image.
        out_features, out_indices: Stages that the backbone returns, among `stem`, `stage1` .. `stage4` (strides 4, 4,
            8, 16, 32). Default: the four stages.

    Raises:
        ValueError: If the values do not define a valid model; the message says what to change.
    """

    model_type = "clip_resnet"

    width: int = 64
    depths: list[int] | tuple[int, ...] = (3, 4, 6, 3)
    num_attention_heads: int = 32
    image_size: int = 224
    projection_dim: int = 1024
    num_channels: int = 3

    def __post_init__(self, **kwargs):
        self.depths = list(self.depths)
        self._check()
        kwargs.pop("stage_names", None)  # stored for other readers of the file, but not a field
        self.stage_names = ["stem", "stage1", "stage2", "stage3", "stage4"]
        out_features = kwargs.pop("out_features", None)
        out_indices = kwargs.pop("out_indices", None)
        if out_features is None and out_indices is None:
            out_features = self.stage_names[1:]
        self.set_output_features_output_indices(out_features=out_features, out_indices=out_indices)
        super().__post_init__(**kwargs)

    def _check(self):
        _require_positive(self, ("width", "num_attention_heads", "image_size", "projection_dim", "num_channels"))
        require(
            len(self.depths) == 4 and all(type(depth) is int and 0 < depth <= MAX_LAYERS for depth in self.depths),
            f"`depths` must be four positive numbers of blocks, one per stage, of at most {MAX_LAYERS}, got "
            f"{shown(self.depths)}.",
        )
        require(self.width % 2 == 0, f"`width` must be even (the stem starts with half of it), got {self.width}.")
        require(
            self.hidden_size % self.num_attention_heads == 0,
            f"The pooled width 32 * `width` = {self.hidden_size} must be divisible by "
            f"`num_attention_heads` = {self.num_attention_heads}.",
        )
        require(self.image_size >= 32, f"`image_size` must be at least 32, the tower's stride, got {self.image_size}.")

    @property
    def hidden_sizes(self) -> list[int]:
        """Numbers of output channels of the stem and of the four stages."""
        return [self.width] + [4 * self.width * 2**stage for stage in range(4)]

    @property
    def hidden_size(self) -> int:
        """Number of channels of the last stage, which is the input of the attention pooling."""
        return 32 * self.width


@raise_value_errors
@strict
class CLIPConvNextConfig(CodeSavingMixin, ConvNextConfig):
    r"""Configuration of a CLIP ConvNeXt image encoder of OpenCLIP, used as a backbone and as a complete image model.

    The defaults are those of `convnext_large_d_320`. `convnext_base_w_320` has `hidden_sizes=[128, 256, 512, 1024],
    depths=[3, 3, 27, 3], projection_dim=640, projection_hidden_dim=None`.

    Args:
        hidden_sizes: Number of channels of each of the four stages.
        depths: Number of blocks in each of the four stages.
        projection_dim: Dimension D of the image-text embedding space.
        projection_hidden_dim: Hidden width of the two-layer perceptron that maps the pooled features to D; None for a
            single linear layer.
        image_size: Side in pixels of the square training images. The tower accepts images of any size.
        layer_norm_eps: Epsilon of the normalization after pooling; that of all other layers is 1e-6.
        hidden_act: Activation of the blocks and of the projection.
        out_features, out_indices: Stages that the backbone returns, among `stem`, `stage1` .. `stage4` (strides 4, 4,
            8, 16, 32). Default: the four stages.

    The other fields are those of transformers' `ConvNextConfig`.

    Raises:
        ValueError: If the values do not define a valid model; the message says what to change.
    """

    model_type = "clip_convnext"

    hidden_sizes: list[int] | tuple[int, ...] = (192, 384, 768, 1536)
    depths: list[int] | tuple[int, ...] = (3, 3, 27, 3)
    image_size: int = 320
    layer_norm_eps: float = 1e-6
    projection_dim: int = 768
    projection_hidden_dim: int | None = 1536

    def __post_init__(self, **kwargs):
        self.hidden_sizes, self.depths = list(self.hidden_sizes), list(self.depths)
        self._check()
        kwargs.pop("stage_names", None)  # stored for other readers of the file, but not a field
        if kwargs.get("out_features") is None and kwargs.get("out_indices") is None:
            kwargs["out_features"] = ["stage1", "stage2", "stage3", "stage4"]
        super().__post_init__(**kwargs)

    def _check(self):
        _require_positive(self, ("image_size", "projection_dim", "num_channels"))
        for name, limit in (("hidden_sizes", MAX_WIDTH), ("depths", MAX_LAYERS)):
            values = getattr(self, name)
            require(
                len(values) == 4 and all(type(value) is int and 0 < value <= limit for value in values),
                f"`{name}` needs four positive whole numbers up to {limit}, one per stage, got {shown(values)}.",
            )
        if self.projection_hidden_dim is not None:
            _require_positive(self, ("projection_hidden_dim",))
        require(self.num_stages == 4, f"`num_stages` must be 4, got {shown(self.num_stages)}.")
        require(self.patch_size == 4, f"`patch_size` must be 4, the stride of the stem, got {shown(self.patch_size)}.")
        require(
            self.hidden_act in ACT2FN,
            f"`hidden_act` must be an activation of transformers, got {shown(self.hidden_act)}.",
        )
        check_number("layer_norm_eps", self.layer_norm_eps, 0, 1)
        check_number("drop_path_rate", self.drop_path_rate, 0, 1)
        check_number("layer_scale_init_value", self.layer_scale_init_value, 0, 1)
        check_number("initializer_range", self.initializer_range, 0)


class VocabularyConfigMixin:
    """Mixin of configurations whose checkpoint stores a vocabulary.

    The configuration has the fields `source_vocabulary`, `prompt_reduction`, `vocabulary`, `vocabulary_is_thing`,
    `vocabulary_colors`, `vocabulary_templates` and `vocabulary_num_prompts` of `GKCConfig`.
    """

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs):
        """Create a configuration from a dict of its fields, some of them overridden by `kwargs`.

        Args:
            config_dict: Fields of the configuration.
            kwargs: Fields to override.

        Returns:
            The configuration.

        Raises:
            ValueError: If `num_labels`, `id2label` or `label2id` contradicts the stored vocabulary, whose embeddings
                would not change with them.
        """
        _check_id2label(config_dict)
        _check_id2label(kwargs)
        stored = None if "vocabulary" in kwargs else config_dict.get("vocabulary")
        if isinstance(kwargs.get("id2label"), dict):
            kwargs["id2label"] = {int(index): name for index, name in kwargs["id2label"].items()}  # as JSON has them
        is_valid = isinstance(stored, list) and all(
            isinstance(names, list) and names and isinstance(names[0], str) for names in stored
        )
        if stored and is_valid:  # otherwise the constructor raises the error
            _check_given_labels([names[0] for names in stored], config_dict, kwargs)
        return super().from_dict(config_dict, **kwargs)

    def _check_vocabulary(self):
        stored = self.vocabulary or []
        for field in ("vocabulary", "source_vocabulary"):
            for index, names in enumerate(getattr(self, field) or []):
                require(bool(names), f"`{field}` has no name for class {index}: give at least one.")
                for name in names:
                    _require_label(name, f"`{field}`, class {index}")
        for name in ("vocabulary_is_thing", "vocabulary_colors", "vocabulary_templates"):
            require(
                getattr(self, name) is None or len(getattr(self, name)) == len(stored),
                f"`{name}` needs one entry for each of the {len(stored)} stored classes.",
            )
        check_whole_number("vocabulary_num_prompts", self.vocabulary_num_prompts, 0, _LIMITS["vocab_size"])
        require(
            self.vocabulary_num_prompts >= len(stored),
            f"`vocabulary_num_prompts` = {self.vocabulary_num_prompts} cannot be less than the {len(stored)} stored "
            "classes; use `model.set_vocabulary(...)` instead of writing `vocabulary` by hand.",
        )
        require(
            bool(stored) or not self.vocabulary_num_prompts,
            f"`vocabulary_num_prompts` = {self.vocabulary_num_prompts}, but `vocabulary` stores no class.",
        )
        if stored and self.id2label is not None:
            ids = sorted(map(str, self.id2label))
            require(
                ids == sorted(map(str, range(len(stored))))
                and all(isinstance(v, str) for v in self.id2label.values()),
                f"`id2label` must name the {len(stored)} stored classes 0..{len(stored) - 1}, got "
                f"{shown(self.id2label)}: use `model.set_vocabulary(...)`, which writes both.",
            )

    def __post_init__(self, **kwargs):
        if self.vocabulary is not None and self.id2label is None:
            self.id2label = {index: names[0] for index, names in enumerate(self.vocabulary)}
            self.label2id = {name: index for index, name in self.id2label.items()}
        super().__post_init__(**kwargs)
        if self.vocabulary is not None:
            self.label2id = {name: index for index, name in self.id2label.items()}
        require(
            self.prompt_reduction in PROMPT_REDUCTIONS,
            f"`prompt_reduction` must be one of {', '.join(PROMPT_REDUCTIONS)}, got {self.prompt_reduction!r}.",
        )
        stored = self.vocabulary or []
        require(
            not stored or self.num_labels == len(stored),
            f"`num_labels` or `id2label` gives {self.num_labels} classes, but `vocabulary` stores {len(stored)}; use "
            "`model.set_vocabulary(...)` to store others.",
        )


@raise_value_errors
@strict
class GKCConfig(CodeSavingMixin, VocabularyConfigMixin, PreTrainedConfig):
    r"""Configuration of `GKCForOpenVocabSegmentation`.

    The defaults are the R-50 model of *Global Knowledge Calibration for Fast Open-Vocabulary Segmentation* (Han, Liu
    et al., ICCV 2023): CLIP's RN50 image encoder as backbone, RN50's text encoder, and the decoders of Mask2Former
    (Cheng et al., *Masked-attention Mask Transformer for Universal Image Segmentation*, CVPR 2022), whose published
    values are the defaults of the decoders, matcher and losses.

    Args:
        backbone_config: Configuration of any transformers `AutoBackbone` that returns four feature maps of strides 4,
            8, 16 and 32, as an object or a dict with `model_type`. If a dict selects no stages, the last four are
            used. Default: `CLIPResNetConfig()`, CLIP RN50. Models of timm (`timm_backbone`) need timm.
        text_config: `CLIPTextConfig` or dict of the frozen text encoder. Default: RN50's text encoder (hidden size
            512, 8 heads, 12 layers, context length 77, D = 1024).
        hidden_size: Width C of both decoders.
        mask_feature_size: Number of channels of the mask features.
        encoder_layers, encoder_ffn_dim, encoder_num_points: Number of deformable attention layers of the pixel
            decoder, their feed-forward width, and the number of sampling points per head and level (Zhu et al.,
            *Deformable DETR*, ICLR 2021).
        decoder_layers, decoder_ffn_dim: Number of layers of the mask decoder and their feed-forward width.
        num_attention_heads: Number of heads of every attention in both decoders.
        num_queries: Number of segment queries Q.
        dropout: Dropout probability in both decoders.
        deformable_attention: Kernel of the pixel decoder's attention, `grid_sample`, `embedding_bag` or `triton`.
            Default: the fastest for the device (see `multi_scale_deformable_attention`).
        classifier: Open-vocabulary classifier of the queries: `projection`, a learned projection into the text
            embedding space with cosine similarities, or `convex_combination` of the text embeddings of the classes of
            a closed-vocabulary head (Norouzi et al., *Zero-Shot Learning by Convex Combination of Semantic
            Embeddings*, ICLR 2014; see `ConvexClassifier`), as created by `from_mask2former`. The latter needs
            `class_feature="query"` and compares classes by their nearest names for both `mean` and `max` as
            `prompt_reduction`. `fc_clip` is the classifier of FC-CLIP (see `FCCLIPClassifier`), as created by
            `from_fc_clip`; it needs `class_feature="query+mask_features"` and a CLIP image encoder as backbone, whose
            head is part of the model.
        source_vocabulary: Classes of the closed-vocabulary head, at most D - 1, or classes that `fc_clip` was trained
            on (seen classes); one list of names per class.
        class_feature: Feature that is classified: the `query` (the main setting of the paper), backbone features
            `pooled` under the predicted mask, `query+pooled`, or `query+mask_features`, the query and the mask
            features averaged inside the predicted mask.
        ensemble: Combination of the class probabilities of `classifier="fc_clip"` with those of CLIP's frozen head, in
            evaluation only: `none` uses the learned classifier alone, `average` is the weighted arithmetic mean,
            `geometric` the weighted geometric mean. FC-CLIP's published scores need `geometric`. A patent application
            (US 2025/0045929) describes the geometric ensembling of such features: check whether you may use it.
        ensemble_alpha, ensemble_beta: Weights of CLIP's head for seen and for other classes, from 0 to 1.
        ensemble_on_valid_mask: Whether to leave CLIP's head out for queries whose mask contains no position of CLIP's
            feature map.
        prompt_reduction: Reduction of the prompts of a class to one logit: `mean` or `max` of their logits, or
            `embedding_mean`, the logit of their mean embedding.
        logit_scale_init_value: Initial logarithm of the logit scale, ln(1 / 0.07) as in CLIP; the scale is clamped
            at 100.
        class_weight, mask_weight, dice_weight: Weights of the losses and of the matching costs.
        no_object_weight: Weight of the no-object class in the cross-entropy.
        train_num_points, oversample_ratio, importance_sample_ratio: Point sampling of the mask losses (Kirillov et
            al., *PointRend*, CVPR 2020).
        freeze_backbone_batch_norm: Whether to keep the backbone's BatchNorm statistics fixed in training, as in
            Mask2Former's ResNet recipes.
        vocabulary: Vocabulary stored with the checkpoint, one list of names (label, then synonyms) per class; written
            by `set_vocabulary`.
        vocabulary_is_thing: For each stored class, whether it is countable (a thing), uncountable (stuff), or unknown
            (None).
        vocabulary_colors: For each stored class its color in overlays, (red, green, blue) in 0..255, or None; written
            by `set_vocabulary`.
        vocabulary_templates: For each stored class its own prompt templates, or None; written by `set_vocabulary`.
        vocabulary_num_prompts: Number of stored prompt embeddings P; written by `set_vocabulary`.

    Raises:
        ValueError: If the values do not define a valid model; the message says what to change.
    """

    model_type = "gkc"
    sub_configs: ClassVar[dict] = {"backbone_config": AutoConfig, "text_config": CLIPTextConfig}
    # As for Mask2Former, transformers' Trainer gathers only class logits and mask logits as predictions.
    keys_to_ignore_at_inference: ClassVar[list[str]] = [
        "query_embeds",
        "content_sizes",
        "loss_dict",
        "mask_features",
        "stages",
        "matches",
        "encoder_hidden_states",
        "pixel_decoder_hidden_states",
        "transformer_decoder_hidden_states",
        "attentions",
        "cross_attentions",
    ]

    backbone_config: dict | PreTrainedConfig | None = None
    text_config: dict | PreTrainedConfig | None = None
    hidden_size: int = 256
    mask_feature_size: int = 256
    encoder_layers: int = 6
    encoder_ffn_dim: int = 1024
    encoder_num_points: int = 4
    decoder_layers: int = 9
    decoder_ffn_dim: int = 2048
    num_attention_heads: int = 8
    num_queries: int = 100
    dropout: float | int = 0.0
    deformable_attention: str | None = None
    classifier: str = "projection"
    source_vocabulary: list[list[str]] | None = None
    class_feature: str = "query"
    ensemble: str = "none"
    ensemble_alpha: float | int = 0.4
    ensemble_beta: float | int = 0.8
    ensemble_on_valid_mask: bool = False
    prompt_reduction: str = "mean"
    logit_scale_init_value: float | int = 2.6592
    class_weight: float | int = 2.0
    mask_weight: float | int = 5.0
    dice_weight: float | int = 5.0
    no_object_weight: float | int = 0.1
    train_num_points: int = 12544
    oversample_ratio: float | int = 3.0
    importance_sample_ratio: float | int = 0.75
    freeze_backbone_batch_norm: bool = True
    vocabulary: list[list[str]] | None = None
    vocabulary_is_thing: list[bool | None] | None = None
    vocabulary_colors: list[list[int] | None] | None = None
    vocabulary_templates: list[list[str] | None] | None = None
    vocabulary_num_prompts: int = 0

    def __post_init__(self, **kwargs):
        self.backbone_config = _resolve_backbone_config(self.backbone_config)
        self.text_config = _resolve_text_config(self.text_config)
        self._check_vocabulary()
        super().__post_init__(**kwargs)
        self._check()

    @property
    def projection_dim(self) -> int:
        """Dimension D of the image-text embedding space, that of the text encoder."""
        return self.text_config.projection_dim

    def _check(self):
        for config, part in (
            (self, ""),
            (self.backbone_config, "backbone_config."),
            (self.text_config, "text_config."),
        ):
            _check_common(config, part)
        self._check_sizes()
        self._check_backbone()
        self._check_text()
        self._check_losses()
        self._check_classifier()
        require(
            self.class_feature in CLASS_FEATURES,
            f"`class_feature` must be one of {', '.join(CLASS_FEATURES)}, got {self.class_feature!r}.",
        )

    def _check_text(self):
        names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
        _require_positive(self.text_config, (*names, "max_position_embeddings", "projection_dim"), "text_config.")
        text = self.text_config
        require(
            text.hidden_act in ACT2FN,
            f"`text_config.hidden_act` must be an activation of transformers, got {shown(text.hidden_act)}.",
        )
        check_number("text_config.layer_norm_eps", text.layer_norm_eps, 0, 1)
        check_number("text_config.attention_dropout", text.attention_dropout or 0, 0, 1)
        for name in ("initializer_range", "initializer_factor"):
            check_number(f"text_config.{name}", getattr(text, name), 0)
        check_whole_number("text_config.eos_token_id", text.eos_token_id, 0)

    def _check_sizes(self):
        sizes = ("hidden_size", "mask_feature_size", "encoder_layers", "encoder_ffn_dim", "encoder_num_points")
        _require_positive(self, (*sizes, "decoder_layers", "decoder_ffn_dim", "num_attention_heads", "num_queries"))
        require(
            self.hidden_size % self.num_attention_heads == 0,
            f"`hidden_size` = {self.hidden_size} must be divisible by `num_attention_heads` = "
            f"{self.num_attention_heads}.",
        )
        require(
            self.hidden_size % GROUP_NORM_GROUPS == 0,
            f"`hidden_size` = {self.hidden_size} must be a multiple of {GROUP_NORM_GROUPS}, the number of groups of "
            "the pixel decoder's normalization.",
        )
        check_number("dropout", self.dropout, 0)
        require(self.dropout < 1, f"`dropout` must be in [0, 1), got {self.dropout}.")
        check_number("logit_scale_init_value", self.logit_scale_init_value, -100, 100)
        require(
            self.deformable_attention in (None, *DEFORMABLE_ATTENTION_KERNELS),
            f"`deformable_attention` must be None or one of {', '.join(DEFORMABLE_ATTENTION_KERNELS)}, got "
            f"{self.deformable_attention!r}.",
        )

    def _check_classifier(self):
        require(
            self.classifier in CLASSIFIERS,
            f"`classifier` must be one of {', '.join(CLASSIFIERS)}, got {self.classifier!r}.",
        )
        self._check_ensemble()
        if self.classifier == "projection":
            require(
                self.source_vocabulary is None,
                "`source_vocabulary` needs `classifier='convex_combination'` or `classifier='fc_clip'`.",
            )
        if self.classifier == "convex_combination":
            self._check_convex_combination()

    def _check_ensemble(self):
        require(
            self.ensemble in ENSEMBLES,
            f"`ensemble` must be one of {', '.join(ENSEMBLES)}, got {self.ensemble!r}.",
        )
        check_number("ensemble_alpha", self.ensemble_alpha, 0, 1)
        check_number("ensemble_beta", self.ensemble_beta, 0, 1)
        if self.classifier != "fc_clip":
            require(self.ensemble == "none", "`ensemble` needs `classifier='fc_clip'`.")
            return
        require(
            self.class_feature == "query+mask_features",
            f"`classifier='fc_clip'` needs `class_feature='query+mask_features'`, got {self.class_feature!r}.",
        )
        backbone = self.backbone_config
        require(
            isinstance(backbone, CLIPResNetConfig | CLIPConvNextConfig),
            f"`classifier='fc_clip'` needs a CLIP image encoder as backbone, 'clip_resnet' or 'clip_convnext', got "
            f"{backbone.model_type!r}.",
        )
        require(
            backbone.projection_dim == self.projection_dim,
            f"`backbone_config.projection_dim` = {backbone.projection_dim} must be that of the text encoder, "
            f"{self.projection_dim}: `classifier='fc_clip'` compares both with the same words.",
        )

    def _check_convex_combination(self):
        require(
            self.class_feature == "query",
            f"`classifier='convex_combination'` needs `class_feature='query'`, got {self.class_feature!r}.",
        )
        require(
            bool(self.source_vocabulary) and all(self.source_vocabulary),
            "`classifier='convex_combination'` needs the names of the head's classes as `source_vocabulary`: use "
            "`modeling_gkc.conversion.from_mask2former`, which sets them.",
        )
        require(
            len(self.source_vocabulary) < self.projection_dim,
            f"A text space of width {self.projection_dim} holds at most {self.projection_dim - 1} source classes, got "
            f"{len(self.source_vocabulary)}: use a text encoder with a larger `projection_dim`.",
        )

    def _check_backbone(self):
        config = self.backbone_config
        if not isinstance(config, BackboneConfigMixin):
            raise ValueError(
                f"`backbone_config` of type {config.model_type!r} is no backbone: use one that transformers' "
                "AutoBackbone knows and that gives maps of strides 4, 8, 16 and 32, such as 'clip_resnet', 'resnet', "
                "'swin' or 'convnext'."
            )
        # Models of timm have no stage names before they are built.
        if stage_names := getattr(config, "stage_names", None):
            field, stages, choice = "out_features", config.out_features, f"the four stages of {stage_names}"
        else:
            field, stages, choice = "out_indices", config.out_indices, f"its last four levels, {LAST_FOUR}"
        if stages is None or len(stages) != 4 or "stem" in stages:
            raise ValueError(
                f"The backbone must return four feature maps (strides 4, 8, 16, 32), but `{field}` is {stages}; set "
                f"`{field}` to {choice}."
            )

    def _check_losses(self):
        _require_positive(self, ("train_num_points",))
        weights = ("class_weight", "mask_weight", "dice_weight", "no_object_weight")
        for name in weights:
            require(getattr(self, name) >= 0, f"`{name}` must not be negative, got {getattr(self, name)}.")
            check_number(name, getattr(self, name), 0)
        require(self.oversample_ratio >= 1, f"`oversample_ratio` must be at least 1, got {self.oversample_ratio}.")
        check_number("oversample_ratio", self.oversample_ratio, 1, 1000)
        require(
            0 <= self.importance_sample_ratio <= 1,
            f"`importance_sample_ratio` must lie between 0 and 1, got {self.importance_sample_ratio}.",
        )


def _check_given_labels(labels: list[str], config_dict: dict[str, Any], given: dict[str, Any]) -> None:
    """Check that labels given to `from_pretrained` agree with the vocabulary that the checkpoint stores.

    Args:
        labels: Labels of the stored vocabulary.
        config_dict: The stored fields, whose `id2label` may have other names.
        given: The overriding fields.

    Raises:
        ValueError: As in `GKCConfig.from_dict`.
    """
    shown = {int(index): name for index, name in (config_dict.get("id2label") or dict(enumerate(labels))).items()}
    allowed = {
        "num_labels": [len(labels)],
        "id2label": [shown, dict(enumerate(labels))],
        "label2id": [{name: index for index, name in shown.items()}, {name: i for i, name in enumerate(labels)}],
    }
    for field, values in allowed.items():
        value = given.get(field)
        if value is not None and value not in values:
            some = ", ".join(labels[:5]) + (", ..." if len(labels) > 5 else "")
            raise ValueError(
                f"`{field}` cannot be changed while loading: the checkpoint stores embeddings of {len(labels)} "
                f"classes ({some}), which would not change. Load it without `{field}`, then call "
                "`model.set_vocabulary(words, processor)`."
            )


def _resolve_backbone_config(config: dict | PreTrainedConfig | None) -> PreTrainedConfig:
    if config is None:
        return CLIPResNetConfig()
    if isinstance(config, PreTrainedConfig):
        return copy_config(config)
    require(
        isinstance(config, dict),
        f"`backbone_config` must be the configuration of a backbone or a dict of its fields, got {shown(config)}.",
    )
    values = remove_origin(config)
    model_type = values.pop("model_type", CLIPResNetConfig.model_type)
    if model_type == CLIPResNetConfig.model_type:
        return create_nested_config("backbone_config", CLIPResNetConfig, values)
    require(
        isinstance(model_type, str) and model_type in CONFIG_MAPPING,
        f"`backbone_config` has the unknown model_type {model_type!r}; use one that transformers' AutoBackbone knows, "
        "such as 'clip_resnet', 'resnet', 'swin' or 'convnext'.",
    )
    config = create_nested_config("backbone_config", CONFIG_MAPPING[model_type], values)
    if isinstance(config, BackboneConfigMixin) and not {"out_features", "out_indices"} & values.keys():
        if stage_names := getattr(config, "stage_names", None):
            config.out_features = stage_names[-4:]
        else:
            config.out_indices = LAST_FOUR
    return config


def _resolve_text_config(config: dict | PreTrainedConfig | None) -> CLIPTextConfig:
    if config is None:
        return CLIPTextConfig(projection_dim=1024)
    if isinstance(config, CLIPTextConfig):
        return copy_config(config)
    require(
        isinstance(config, dict),
        f"`text_config` must be a CLIPTextConfig or a dict of its fields, got {type(config).__name__}; for a CLIP "
        "model's config pass its `text_config`.",
    )
    values = {key: value for key, value in remove_origin(config).items() if key != "model_type"}
    return create_nested_config("text_config", CLIPTextConfig, values)


def create_nested_config(
    field: str, config_class: Callable[..., PreTrainedConfig], values: dict[str, Any]
) -> PreTrainedConfig:
    """Create the configuration of a field of another one; errors name the field."""
    try:
        _check_id2label(values)
        return config_class(**values)
    except _ERRORS_OF_VALUES as error:
        raise ValueError(f"`{field}`: {_describe_error(config_class, error, values)}") from error
    except ValueError as error:
        raise ValueError(f"`{field}`: {error}") from error


def _require_label(name: Any, place: str) -> None:
    try:
        require(bool(normalize_label(name)), f"{place} has an empty name.")
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from error


def copy_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """Copy a configuration, so that models do not share it, without the path that it was loaded from."""
    config = copy.deepcopy(config)
    config.name_or_path = ""
    return config


def remove_origin(values: dict) -> dict:
    """Remove the path that the fields were loaded from, which a published checkpoint must not reveal.

    `auto_map` is removed too, since transformers would otherwise ask whether to run code of that folder.
    """
    return {key: value for key, value in values.items() if key not in ("_name_or_path", "name_or_path", "auto_map")}


AutoConfig.register(CLIPResNetConfig.model_type, CLIPResNetConfig, exist_ok=True)
AutoConfig.register(CLIPConvNextConfig.model_type, CLIPConvNextConfig, exist_ok=True)
AutoConfig.register(GKCConfig.model_type, GKCConfig, exist_ok=True)

__all__ = ["CLIPConvNextConfig", "CLIPResNetConfig", "GKCConfig", "VocabularyConfigMixin"]
