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
"""The segmenter: image path (`GKCModel`) and open-vocabulary classification (`GKCForOpenVocabSegmentation`).

Letters: B images, Q queries, C hidden, D text-embedding width, K classes, P prompts (P >= K: synonyms, templates),
S decoder stages = decoder_layers + 1, N segments of an image, (H, W) padded input size.
"""

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    AutoBackbone,
    AutoModel,
    AutoModelForImageSegmentation,
    AutoModelForUniversalSegmentation,
    CLIPTextModelWithProjection,
)
from transformers import initialization as init
from transformers.modeling_utils import PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_UNIVERSAL_SEGMENTATION_MAPPING_NAMES
from transformers.utils import ModelOutput
from transformers.utils.generic import can_return_tuple

from .configuration_gkc import BACKBONE_STRIDES, PROMPT_REDUCTIONS, GKCConfig
from .loss_gkc import GKCCriterion, Matches
from .mask_decoder import GKCMaskDecoder, GKCMaskDecoderStage, predict_masks
from .modeling_clip_resnet import GKCLoadingMixin
from .pixel_decoder import GKCDeformableAttention, GKCPixelDecoder
from .vocabulary import Vocabulary

MAX_TEMPERATURE = 100.0
SIZE_DIVISOR = BACKBONE_STRIDES[-1]
PROMPTS_PER_PASS = 256


@dataclass
class GKCClassEmbeddings(ModelOutput):
    """Encoded vocabulary, to be cached and passed to `forward`.

    Attributes:
        class_embeds: (P, D) L2-normalised text embeddings of the prompts.
        class_ids: (P,) class of each prompt, 0..K-1.
    """

    class_embeds: Tensor | None = None
    class_ids: Tensor | None = None


@dataclass
class GKCModelOutput(ModelOutput):
    """Output of the image path.

    Attributes:
        last_hidden_state: (B, Q, C) normalised queries of the last stage.
        masks_queries_logits: (B, Q, H/4, W/4) mask logits of the last stage.
        pooled_features: (B, Q, F) backbone features pooled under the last stage's masks; only if
            `config.class_feature` asks for them.
        mask_is_empty: (B, Q) whether the last stage's mask holds no pixel; only with `pooled_features`.
        stages: for each of the S stages the same four values, if asked for.
    """

    last_hidden_state: Tensor | None = None
    masks_queries_logits: Tensor | None = None
    pooled_features: Tensor | None = None
    mask_is_empty: Tensor | None = None
    stages: tuple["GKCModelOutput", ...] | None = None


@dataclass
class GKCStageOutput(ModelOutput):
    """Predictions of one decoder stage, for losses.

    Attributes:
        class_queries_logits: (B, Q, K + 1) class logits, the last column no-object.
        masks_queries_logits: (B, Q, H/4, W/4) mask logits.
        query_embeds: (B, Q, D) L2-normalised embeddings that are classified.
        query_features: (B, Q, C) normalised queries.
    """

    class_queries_logits: Tensor | None = None
    masks_queries_logits: Tensor | None = None
    query_embeds: Tensor | None = None
    query_features: Tensor | None = None


@dataclass
class GKCForOpenVocabSegmentationOutput(ModelOutput):
    """Output of `GKCForOpenVocabSegmentation`.

    Attributes:
        loss: Scalar, weighted sum of `loss_dict`; given with labels.
        loss_dict: Unweighted losses by name; `_0`, `_1`, ... mark stages before the last.
        class_queries_logits: (B, Q, K + 1) class logits, the last column no-object.
        masks_queries_logits: (B, Q, H/4, W/4) mask logits.
        query_embeds: (B, Q, D) L2-normalised embeddings of the queries in the text space.
        content_sizes: (B, 2) height and width in pixels of each image inside its padded input; None when the whole
            input is image. Post-processing cuts the padding off with it.
        stages: the S stages' predictions, in training or with `output_stages=True`.
        matches: for each stage and image the matched (queries, segments); given with labels.
    """

    loss: Tensor | None = None
    loss_dict: dict[str, Tensor] | None = None
    class_queries_logits: Tensor | None = None
    masks_queries_logits: Tensor | None = None
    query_embeds: Tensor | None = None
    content_sizes: Tensor | None = None
    stages: tuple[GKCStageOutput, ...] | None = None
    matches: list[Matches] | None = None


class GKCWords(NamedTuple):
    """A checked vocabulary: prompts (P, D), their classes (P,) or None if each is its own, and the reduction to K."""

    embeds: Tensor
    class_ids: Tensor | None
    num_classes: int
    reduction: str


def count_classes(class_ids: Tensor, num_prompts: int) -> int:
    """The number K of classes that (P,) class ids name.

    Raises:
        ValueError: the ids are not P numbers from 0 that leave none out.
    """
    if class_ids.shape != (num_prompts,):
        raise ValueError(f"`class_ids` must have shape ({num_prompts},), got {tuple(class_ids.shape)}.")
    present = class_ids.unique().tolist()
    missing = sorted(set(range(max(present) + 1)) - set(present))
    if present[0] < 0 or missing:
        raise ValueError(
            f"`class_ids` must count from 0 and leave none out: smallest {present[0]}, missing {missing}."
        )
    return len(present)


def reduce_prompt_logits(logits: Tensor, class_ids: Tensor, reduction: str, num_classes: int | None = None) -> Tensor:
    """Reduces the logits of several prompts of a class to one.

    Args:
        logits: (..., P + 1) logits of P prompts and of no-object.
        class_ids: (P,) class of each prompt; every class 0..K-1 has at least one.
        reduction: `mean` or `max`.
        num_classes: K, if it is known and `class_ids` have been checked.

    Returns:
        (..., K + 1) logits of K classes and of no-object.

    Raises:
        ValueError: for another reduction, or if `class_ids` do not fit the logits or leave a class out.
    """
    if reduction not in ("mean", "max"):
        raise ValueError(f"Logits are reduced by 'mean' or 'max', got {reduction!r}.")
    if num_classes is None:
        num_classes = count_classes(class_ids, logits.shape[-1] - 1)
    prompts, no_object = logits[..., :-1], logits[..., -1:]
    index = class_ids.to(logits.device).expand_as(prompts)
    reduced = prompts.new_zeros(*prompts.shape[:-1], num_classes)
    reduced = reduced.scatter_reduce(-1, index, prompts, "mean" if reduction == "mean" else "amax", include_self=False)
    return torch.cat([reduced, no_object], dim=-1)


def average_class_embeds(class_embeds: Tensor, class_ids: Tensor) -> Tensor:
    """Averages (P, D) prompt embeddings of each class and normalises them: (K, D)."""
    sums = class_embeds.new_zeros(count_classes(class_ids, len(class_embeds)), class_embeds.shape[-1])
    return F.normalize(sums.index_add(0, class_ids.to(class_embeds.device), class_embeds), dim=-1)


def content_sizes_of(pixel_mask: Tensor) -> Tensor:
    """(B, 2) height and width of the images that fill the upper left of (B, H, W) masks, 1 where there is image."""
    mask = pixel_mask.bool()
    return torch.stack([mask[:, :, 0].sum(dim=1), mask[:, 0].sum(dim=1)], dim=1)


def pad_to_stride(
    pixel_values: Tensor, pixel_mask: Tensor | None, mask_labels: Sequence[Tensor] | None
) -> tuple[Tensor, Tensor | None, Sequence[Tensor] | None]:
    """Pads images and masks with zeros, right and below, to multiples of the coarsest stride.

    Args:
        pixel_values: (B, 3, H, W).
        pixel_mask: (B, H, W) or None.
        mask_labels: For each image (N, H, W), or None.

    Returns:
        Padded images, content sizes (B, 2) or None if all of the padded input is image, padded masks.

    Raises:
        ValueError: naming a sample whose masks have another size than the images.
    """
    height, width = pixel_values.shape[-2:]
    for sample, masks in enumerate(mask_labels or ()):
        if masks.shape[-2:] != (height, width):
            raise ValueError(
                f"Sample {sample}: `mask_labels` are {tuple(masks.shape[-2:])}, but `pixel_values` are "
                f"{(height, width)} (height, width): resize and pad masks as the images."
            )
    content_sizes = None if pixel_mask is None else content_sizes_of(pixel_mask)
    padding = (0, -width % SIZE_DIVISOR, 0, -height % SIZE_DIVISOR)
    if not any(padding):
        return pixel_values, content_sizes, mask_labels
    if content_sizes is None:
        content_sizes = torch.tensor([[height, width]], device=pixel_values.device).repeat(len(pixel_values), 1)
    mask_labels = None if mask_labels is None else [F.pad(masks, padding) for masks in mask_labels]
    return F.pad(pixel_values, padding), content_sizes, mask_labels


class GKCClassEmbedder(nn.Module):
    """Queries -> embeddings in the text space: one map C -> C for all stages, one map C -> D per stage."""

    def __init__(self, config: GKCConfig, num_pooled_features: int):
        super().__init__()
        width = config.hidden_size
        self.class_feature = config.class_feature
        self.pooled_projection = None
        if config.class_feature != "query":
            self.pooled_projection = nn.Sequential(
                nn.LayerNorm(num_pooled_features),
                nn.Linear(num_pooled_features, width),
                nn.ReLU(),
                nn.Linear(width, width),
            )
        self.dense = nn.Linear(width, width)
        self.stage_projections = nn.ModuleList(
            nn.Linear(width, config.projection_dim) for _ in range(config.decoder_layers + 1)
        )

    def forward(self, stage: GKCModelOutput, index: int = -1) -> Tensor:
        """(B, Q, D) L2-normalised embeddings of the stage `index`, counted as in a list."""
        hidden_states = F.relu(self.dense(self._feature(stage)))
        return F.normalize(self.stage_projections[index](hidden_states), dim=-1)

    def _feature(self, stage: GKCModelOutput) -> Tensor:
        query = stage.last_hidden_state
        if self.pooled_projection is None:
            return query
        pooled = self.pooled_projection(stage.pooled_features)
        if self.class_feature == "query+pooled":
            pooled = query + pooled
        return torch.where(stage.mask_is_empty[..., None], query, pooled)


class GKCPreTrainedModel(GKCLoadingMixin, PreTrainedModel):
    """Weight initialisation and loading."""

    config_class = GKCConfig
    config: GKCConfig
    base_model_prefix = "model"
    main_input_name = "pixel_values"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _no_split_modules = ["CLIPResNetBottleneck", "GKCPixelDecoderLayer", "GKCMaskDecoderLayer", "CLIPEncoderLayer"]

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        if isinstance(module, GKCDeformableAttention):
            _init_deformable_attention(module)
        elif isinstance(module, GKCPixelDecoder):
            init.normal_(module.level_embedding)
        elif isinstance(module, GKCMaskDecoder):
            for embedding in (module.query_features, module.query_positions, module.level_embedding):
                init.normal_(embedding.weight)
        elif isinstance(module, GKCForOpenVocabSegmentation):
            init.normal_(module.no_object_embedding)
            init.constant_(module.logit_scale, self.config.logit_scale_init_value)
            if module.vocabulary_embeds is not None:
                init.zeros_(module.vocabulary_embeds)
                init.zeros_(module.vocabulary_class_ids)
        elif isinstance(module, (nn.Linear, nn.Conv2d)):
            init.xavier_uniform_(module.weight)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif not isinstance(module, nn.Embedding):
            super()._init_weights(module)


def _init_deformable_attention(module: GKCDeformableAttention) -> None:
    """Offsets start as rings: each head looks into its own direction, its points one cell further each."""
    angles = torch.arange(module.num_heads) * (2 * math.pi / module.num_heads)
    directions = torch.stack([angles.cos(), angles.sin()], dim=-1)
    directions = directions / directions.abs().amax(dim=-1, keepdim=True)
    steps = torch.arange(1, module.num_points + 1)
    num_levels = module.sampling_offsets.out_features // (module.num_heads * module.num_points * 2)
    offsets = torch.einsum("md,r->mrd", directions, steps)[:, None].expand(-1, num_levels, -1, -1)
    init.zeros_(module.sampling_offsets.weight)
    init.copy_(module.sampling_offsets.bias, offsets.flatten())
    init.zeros_(module.attention_weights.weight)
    init.zeros_(module.attention_weights.bias)


class GKCModel(GKCPreTrainedModel):
    """The image path: backbone -> pixel decoder -> mask decoder; segments without names."""

    def __init__(self, config: GKCConfig):
        super().__init__(config)
        # The attention implementation asked of the decoders is not the backbone's: it may have none of that name.
        config.backbone_config._attn_implementation = None
        self.backbone = AutoBackbone.from_config(config.backbone_config)
        self.pixel_decoder = GKCPixelDecoder(config, self.backbone.channels)
        self.mask_decoder = GKCMaskDecoder(config)
        self.post_init()

    @property
    def num_pooled_features(self) -> int:
        """Width F of the features that are pooled under a mask: the backbone's strides 8, 16 and 32."""
        return sum(self.backbone.channels[1:])

    def train(self, mode: bool = True) -> "GKCModel":
        """Sets training mode; BatchNorm of a backbone with frozen statistics stays in evaluation mode."""
        super().train(mode)
        if self.config.freeze_backbone_batch_norm:
            for module in self.backbone.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module.eval()
        return self

    @can_return_tuple
    def forward(
        self, pixel_values: Tensor, output_stages: bool | None = None, pixel_mask: Tensor | None = None
    ) -> GKCModelOutput:
        """Segments images.

        Args:
            pixel_values: (B, 3, H, W) normalised images.
            output_stages: Give all S stages, not only the last; default: in training.
            pixel_mask: Accepted for the common call `model(**inputs)`; all of the input is looked at.
        """
        feature_maps = self.backbone(pixel_values).feature_maps
        _check_strides(pixel_values.shape, feature_maps)
        decoded = self.pixel_decoder(feature_maps)
        levels = decoded.multi_scale_features
        resized = [
            F.interpolate(decoded.mask_features, size=level.shape[-2:], mode="bilinear", align_corners=False)
            for level in levels
        ]
        stages = self.mask_decoder(levels, resized)
        output_stages = self.training if output_stages is None else output_stages
        if not output_stages:
            return self._stage_output(stages[-1], decoded.mask_features, resized[-1], feature_maps)
        outputs = tuple(
            self._stage_output(stage, decoded.mask_features, resized[-1], feature_maps) for stage in stages
        )
        return GKCModelOutput(**outputs[-1], stages=outputs)

    def _stage_output(
        self,
        stage: GKCMaskDecoderStage,
        mask_features: Tensor,
        finest_mask_features: Tensor,
        feature_maps: tuple[Tensor, ...],
    ) -> GKCModelOutput:
        pooled = is_empty = None
        if self.config.class_feature != "query":
            masks = predict_masks(stage.mask_embeds, finest_mask_features).detach()
            pooled, is_empty = pool_under_masks(masks, feature_maps[1:])
        return GKCModelOutput(
            last_hidden_state=stage.query_features,
            masks_queries_logits=predict_masks(stage.mask_embeds, mask_features),
            pooled_features=pooled,
            mask_is_empty=is_empty,
        )


def _check_strides(image_shape: torch.Size, feature_maps: Sequence[Tensor]) -> None:
    """Refuses a backbone whose maps are not of strides 4, 8, 16, 32; sizes may be rounded either way."""
    for stride, feature_map in zip(BACKBONE_STRIDES, feature_maps, strict=True):
        sides = zip(feature_map.shape[2:], image_shape[2:], strict=True)
        if any(abs(cells * stride - side) >= stride for cells, side in sides):
            sizes = [tuple(other.shape[2:]) for other in feature_maps]
            raise ValueError(
                f"The backbone must give maps of strides 4, 8, 16 and 32, but images of {tuple(image_shape[2:])} give "
                f"maps of {sizes}: use a hierarchical backbone and its four stages as `out_features`."
            )


def pool_under_masks(mask_logits: Tensor, feature_maps: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Averages feature maps under soft masks.

    Args:
        mask_logits: (B, Q, h, w) at the size of the first map.
        feature_maps: maps (B, C_i, h_i, w_i), not larger than the first.

    Returns:
        (B, Q, sum of C_i) pooled features, and (B, Q) whether a mask holds no pixel.
    """
    weights = mask_logits.sigmoid()
    pooled = []
    for feature_map in feature_maps:
        shares = F.adaptive_avg_pool2d(weights, feature_map.shape[-2:])
        shares = shares / shares.sum(dim=(-2, -1), keepdim=True).clamp(min=torch.finfo(shares.dtype).tiny)
        pooled.append(torch.einsum("bqhw,bchw->bqc", shares, feature_map))
    return torch.cat(pooled, dim=-1), (mask_logits < 0).flatten(2).all(dim=-1)


class GKCForOpenVocabSegmentation(GKCPreTrainedModel):
    """Image path, frozen CLIP text tower, and the cosine classifier between queries and words."""

    def __init__(self, config: GKCConfig):
        super().__init__(config)
        self.model = GKCModel(config)
        self.class_embedder = GKCClassEmbedder(config, self.model.num_pooled_features)
        self.text_model = CLIPTextModelWithProjection._from_config(config.text_config)
        self.text_model.requires_grad_(False)
        self.no_object_embedding = nn.Parameter(torch.empty(config.projection_dim))
        self.logit_scale = nn.Parameter(torch.tensor(float(config.logit_scale_init_value)))
        stored = config.vocabulary_num_prompts
        self.register_buffer("vocabulary_embeds", torch.zeros(stored, config.projection_dim) if stored else None)
        self.register_buffer("vocabulary_class_ids", torch.zeros(stored, dtype=torch.long) if stored else None)
        self.criterion = GKCCriterion(config)
        self.post_init()

    @classmethod
    def from_pretrained(cls, *args, **kwargs):
        """Loads a checkpoint as every transformers model; the text tower comes back frozen."""
        loaded = super().from_pretrained(*args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        model.text_model.requires_grad_(False)
        return loaded

    def train(self, mode: bool = True) -> "GKCForOpenVocabSegmentation":
        """Sets training mode; the frozen text tower stays in evaluation mode."""
        super().train(mode)
        self.text_model.eval()
        return self

    @torch.no_grad()
    def get_text_features(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """(P, D) L2-normalised embeddings of tokenised prompts (P, L); the text tower is frozen."""
        masks = [None] * len(input_ids) if attention_mask is None else attention_mask.split(PROMPTS_PER_PASS)
        embeds = [
            self.text_model(input_ids=ids, attention_mask=mask).text_embeds
            for ids, mask in zip(input_ids.split(PROMPTS_PER_PASS), masks, strict=False)
        ]
        return F.normalize(torch.cat(embeds), dim=-1)

    def get_class_embeddings(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, class_ids: Tensor | None = None
    ) -> GKCClassEmbeddings:
        """Encodes a vocabulary once, for many calls of `forward`.

        Args:
            input_ids, attention_mask: (P, L) tokenised prompts.
            class_ids: (P,) class of each prompt; default: each prompt its own class.
        """
        embeds = self.get_text_features(input_ids, attention_mask)
        if class_ids is None:
            class_ids = torch.arange(len(embeds), device=embeds.device)
        return GKCClassEmbeddings(class_embeds=embeds, class_ids=class_ids)

    def set_vocabulary(self, vocabulary, processor) -> None:
        """Stores a vocabulary with the checkpoint; `config.id2label` follows.

        Args:
            vocabulary: Words in any form `GKCProcessor` takes: list, nested list of synonyms, "dog; sofa, couch", or
                `Vocabulary`.
            processor: `GKCProcessor` of this checkpoint.
        """
        vocabulary = Vocabulary.parse(vocabulary)
        inputs = processor(text=vocabulary, return_tensors="pt").to(self.device)
        encoded = self.get_class_embeddings(**inputs)
        # A configuration of its own, so that no other model made from the same one claims these words.
        self.config = copy.deepcopy(self.config)
        self.vocabulary_embeds = encoded.class_embeds
        self.vocabulary_class_ids = encoded.class_ids
        self.config.vocabulary = [list(names) for names in vocabulary.names]
        self.config.vocabulary_is_thing = None if vocabulary.is_thing is None else list(vocabulary.is_thing)
        self.config.vocabulary_num_prompts = len(encoded.class_ids)
        self.config.id2label = {index: names[0] for index, names in enumerate(vocabulary.names)}
        self.config.label2id = {name: index for index, name in self.config.id2label.items()}

    @property
    def temperature(self) -> Tensor:
        """Factor of the cosines, clamped at 100 as in CLIP."""
        return self.logit_scale.exp().clamp(max=MAX_TEMPERATURE)

    def class_logits(self, query_embeds: Tensor, class_embeds: Tensor) -> Tensor:
        """(B, Q, P + 1) logits of normalised queries (B, Q, D) for normalised prompts (P, D) and for no-object.

        They are computed in fp32 at least: a temperature up to 100 would show the rounding of half precision.
        """
        dtype = torch.promote_types(query_embeds.dtype, torch.float32)
        with torch.autocast(query_embeds.device.type, enabled=False):
            no_object = F.normalize(self.no_object_embedding.to(dtype), dim=-1)
            targets = torch.cat([class_embeds.to(no_object), no_object[None]])
            return self.temperature.to(dtype) * query_embeds.to(dtype) @ targets.T

    @can_return_tuple
    def forward(
        self,
        pixel_values: Tensor,
        pixel_mask: Tensor | None = None,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        class_ids: Tensor | None = None,
        class_embeds: Tensor | None = None,
        mask_labels: Sequence[Tensor] | None = None,
        class_labels: Sequence[Tensor] | None = None,
        prompt_reduction: str | None = None,
        output_stages: bool | None = None,
    ) -> GKCForOpenVocabSegmentationOutput:
        """Segments images into words.

        The words come as `input_ids` or as `class_embeds`, not both; with neither, the vocabulary stored in the
        checkpoint is used.

        Args:
            pixel_values: (B, 3, H, W) normalised images; padded here to multiples of 32 where they are not.
            pixel_mask: (B, H, W), 1 where there is image, 0 in padding to the right and below. In evaluation mode
                images of different padded size are computed apart, so that no result depends on its neighbours.
            input_ids, attention_mask: (P, L) tokenised prompts.
            class_ids: (P,) class of each prompt; default: each prompt its own class.
            class_embeds: (P, D) cached prompt embeddings of `get_class_embeddings`.
            mask_labels: For each image (N, H, W) masks of 0 and 1, of the size of `pixel_values`; gives the loss
                together with `class_labels`.
            class_labels: For each image (N,) classes.
            prompt_reduction: `mean`, `max` or `embedding_mean`; default: `config.prompt_reduction`.
            output_stages: Give all decoder stages; default: in training and with labels.

        Raises:
            ValueError: if both or none of the forms of text are there, or labels do not fit.
        """
        if (mask_labels is None) != (class_labels is None):
            raise ValueError("`mask_labels` and `class_labels` must be given together.")
        has_labels = mask_labels is not None
        words = self._words(input_ids, attention_mask, class_ids, class_embeds, prompt_reduction)
        pixel_values, content_sizes, mask_labels = pad_to_stride(pixel_values, pixel_mask, mask_labels)
        wants_stages = has_labels or (self.training if output_stages is None else output_stages)
        segments = self._segment(pixel_values, content_sizes, wants_stages)

        stages = None
        if wants_stages:
            stages = tuple(self._classify(stage, index, words) for index, stage in enumerate(segments.stages))
        last = stages[-1] if wants_stages else self._classify(segments, -1, words)
        loss, loss_dict, matches = self._losses(stages, mask_labels, class_labels) if has_labels else (None,) * 3
        return GKCForOpenVocabSegmentationOutput(
            loss=loss,
            loss_dict=loss_dict,
            class_queries_logits=last.class_queries_logits,
            masks_queries_logits=last.masks_queries_logits,
            query_embeds=last.query_embeds,
            content_sizes=content_sizes,
            stages=stages,
            matches=matches,
        )

    def classify(
        self,
        query_embeds: Tensor,
        class_embeds: Tensor,
        class_ids: Tensor | None = None,
        prompt_reduction: str | None = None,
    ) -> Tensor:
        """Names segments that are already there by other words, without looking at the image again.

        Args:
            query_embeds: (B, Q, D) of an earlier output.
            class_embeds, class_ids, prompt_reduction: As in `forward`.

        Returns:
            (B, Q, K + 1) class logits, the last column no-object.
        """
        return self._name(query_embeds, self._words(None, None, class_ids, class_embeds, prompt_reduction))

    def _words(
        self,
        input_ids: Tensor | None,
        attention_mask: Tensor | None,
        class_ids: Tensor | None,
        class_embeds: Tensor | None,
        prompt_reduction: str | None,
    ) -> GKCWords:
        """The vocabulary that is asked for, checked once."""
        reduction = prompt_reduction or self.config.prompt_reduction
        if reduction not in PROMPT_REDUCTIONS:
            raise ValueError(f"`prompt_reduction` must be one of {', '.join(PROMPT_REDUCTIONS)}, got {reduction!r}.")
        embeds, class_ids, num_classes = self._prompts(input_ids, attention_mask, class_ids, class_embeds)
        if class_ids is not None and reduction == "embedding_mean":
            embeds, class_ids = average_class_embeds(embeds, class_ids), None
        return GKCWords(embeds, class_ids, num_classes, reduction)

    def _prompts(
        self,
        input_ids: Tensor | None,
        attention_mask: Tensor | None,
        class_ids: Tensor | None,
        class_embeds: Tensor | None,
    ) -> tuple[Tensor, Tensor | None, int]:
        """Prompt embeddings (P, D), their classes (P,) or None if each is its own, and the number of classes."""
        if input_ids is not None and class_embeds is not None:
            raise ValueError("Give the words as `input_ids` or as `class_embeds`, not both.")
        if input_ids is None and class_embeds is None:
            if class_ids is not None or attention_mask is not None:
                raise ValueError("`class_ids` and `attention_mask` need `input_ids` or `class_embeds` beside them.")
            return self._stored_prompts()
        if input_ids is not None:
            class_embeds = self.get_text_features(input_ids, attention_mask)
        if class_embeds.ndim != 2 or class_embeds.shape[-1] != self.config.projection_dim:
            raise ValueError(
                f"`class_embeds` must be (prompts, {self.config.projection_dim}), got {tuple(class_embeds.shape)}."
            )
        if class_ids is None:
            return class_embeds, None, len(class_embeds)
        num_classes = count_classes(class_ids, len(class_embeds))
        is_identity = class_ids.tolist() == list(range(len(class_embeds)))
        return class_embeds, None if is_identity else class_ids, num_classes

    def _stored_prompts(self) -> tuple[Tensor, Tensor | None, int]:
        if self.vocabulary_embeds is None:
            raise ValueError(
                "No words to segment into: give `input_ids` or `class_embeds` (GKCProcessor(text=...) makes them), "
                "or store a vocabulary with `model.set_vocabulary(...)`."
            )
        num_classes = len(self.config.vocabulary)
        is_identity = num_classes == self.config.vocabulary_num_prompts
        return self.vocabulary_embeds, None if is_identity else self.vocabulary_class_ids, num_classes

    def _segment(self, pixel_values: Tensor, content_sizes: Tensor | None, output_stages: bool) -> GKCModelOutput:
        """Runs the image path once per padded size, so that no image sees padding made for its neighbours.

        In training the padding is looked at, as in Mask2Former: the losses see all of it.
        """
        if content_sizes is None or self.training:
            return self.model(pixel_values, output_stages=output_stages)
        groups: dict[tuple[int, int], list[int]] = {}
        for index, (height, width) in enumerate(content_sizes.tolist()):
            if not (height and width):
                raise ValueError(f"`pixel_mask` of image {index} is empty: every image needs a pixel.")
            groups.setdefault((_round_up(height), _round_up(width)), []).append(index)
        if list(groups) == [tuple(pixel_values.shape[-2:])]:
            return self.model(pixel_values, output_stages=output_stages)
        parts = [
            self.model(pixel_values[indices, :, :height, :width], output_stages=output_stages)
            for (height, width), indices in groups.items()
        ]
        order = torch.tensor([index for indices in groups.values() for index in indices], device=pixel_values.device)
        grid = tuple(length // BACKBONE_STRIDES[0] for length in pixel_values.shape[-2:])
        if not output_stages:
            return _merge(parts, order.argsort(), grid)
        stages = tuple(
            _merge(stage, order.argsort(), grid) for stage in zip(*(part.stages for part in parts), strict=True)
        )
        return GKCModelOutput(**stages[-1], stages=stages)

    def _classify(self, stage: GKCModelOutput, index: int, words: GKCWords) -> GKCStageOutput:
        query_embeds = self.class_embedder(stage, index)
        return GKCStageOutput(
            class_queries_logits=self._name(query_embeds, words),
            masks_queries_logits=stage.masks_queries_logits,
            query_embeds=query_embeds,
            query_features=stage.last_hidden_state,
        )

    def _name(self, query_embeds: Tensor, words: GKCWords) -> Tensor:
        logits = self.class_logits(query_embeds, words.embeds)
        if words.class_ids is None:
            return logits
        return reduce_prompt_logits(logits, words.class_ids, words.reduction, words.num_classes)

    def _losses(
        self, stages: tuple[GKCStageOutput, ...], mask_labels: Sequence[Tensor], class_labels: Sequence[Tensor]
    ) -> tuple[Tensor, dict[str, Tensor], list[Matches]]:
        losses, matches = self.criterion(
            [stage.class_queries_logits for stage in stages],
            [stage.masks_queries_logits for stage in stages],
            mask_labels,
            class_labels,
        )
        return self.criterion.total(losses), losses, matches


def _round_up(length: int) -> int:
    return math.ceil(length / SIZE_DIVISOR) * SIZE_DIVISOR


def _merge(parts: Sequence[GKCModelOutput], order: Tensor, grid: tuple[int, int]) -> GKCModelOutput:
    """Puts outputs for images of different sizes together, in the images' order, on one grid of masks."""
    for part in parts:
        part.masks_queries_logits = _extend(part.masks_queries_logits, grid)
    return GKCModelOutput(**{key: torch.cat([part[key] for part in parts])[order] for key in parts[0]})


def _extend(masks: Tensor, size: tuple[int, int]) -> Tensor:
    """Continues (B, Q, h, w) masks by their border values to a larger size; resampling inside never sees the seam."""
    height, width = masks.shape[-2:]
    return F.pad(masks, (0, size[1] - width, 0, size[0] - height), mode="replicate")


AutoModel.register(GKCConfig, GKCForOpenVocabSegmentation, exist_ok=True)
AutoModelForUniversalSegmentation.register(GKCConfig, GKCForOpenVocabSegmentation, exist_ok=True)
AutoModelForImageSegmentation.register(GKCConfig, GKCForOpenVocabSegmentation, exist_ok=True)
# The image-segmentation pipeline accepts a class only by its name in this table.
MODEL_FOR_UNIVERSAL_SEGMENTATION_MAPPING_NAMES[GKCConfig.model_type] = GKCForOpenVocabSegmentation.__name__

__all__ = [
    "GKCClassEmbeddings",
    "GKCForOpenVocabSegmentation",
    "GKCForOpenVocabSegmentationOutput",
    "GKCModel",
    "GKCModelOutput",
    "GKCPreTrainedModel",
    "GKCStageOutput",
    "average_class_embeds",
    "reduce_prompt_logits",
]
