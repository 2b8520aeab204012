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
"""Open-vocabulary segmentation: the image path `GKCModel`, and `GKCForOpenVocabSegmentation` with classification.

Letters: B images, Q queries, C hidden size, D text-embedding width, K classes, P prompts (P >= K because of synonyms
and templates), L tokens of a prompt, S decoder stages = decoder_layers + 1, N segments of an image, (H, W) padded
input size.
"""

from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoBackbone, CLIPTextModelWithProjection
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_utils import PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_BACKBONE_MAPPING
from transformers.utils.generic import can_return_tuple

from .argument_checks import check_whole_number
from .class_embeddings import GKCClassEmbeddings, TextEmbeddingCache, average_class_embeds, reduce_prompt_logits
from .classifiers import CLASSIFIER_CLASSES, ClassPrompts
from .configuration_gkc import BACKBONE_STRIDES, CLIPConvNextConfig, CLIPResNetConfig, GKCConfig
from .inference import OptimizedGKC
from .loss_gkc import GKCCriterion, MaskParts, Matches
from .mask_decoder import GKCMaskDecoder, GKCMaskDecoderStage, pool_inside_masks, pool_under_masks, predict_masks
from .modeling_clip_convnext import CLIPConvNextHead
from .modeling_clip_resnet import CLIPResNetAttentionPooling, channels_last, in_dtype_of
from .modeling_outputs import GKCForOpenVocabSegmentationOutput, GKCModelOutput, GKCStageOutput
from .open_vocabulary import OpenVocabularyMixin
from .padding import (
    check_pixel_values,
    content_sizes_of,
    full_content_sizes,
    hide_padding,
    pad_to_stride,
    run_by_padded_size,
)
from .pixel_decoder import GKCPixelDecoder
from .pretrained_model import GKCPreTrainedModel
from .remote_code import register_segmentation_model
from .weight_renaming import CHECKPOINT_RENAMINGS


class GKCModel(GKCPreTrainedModel):
    """Image path of the segmenter: backbone, pixel decoder and mask decoder, which predict masks without classes."""

    def __init__(self, config: GKCConfig):
        super().__init__(config)
        self.backbone = _make_backbone(config.backbone_config)
        self.pixel_decoder = GKCPixelDecoder(config, self.backbone.channels)
        self.mask_decoder = GKCMaskDecoder(config)
        self.region_head = None
        if config.classifier == "fc_clip":
            self.region_head = _REGION_HEADS[config.backbone_config.model_type](self.backbone.config)
            self.region_head.config = config  # for the attention implementation
        self.post_init()
        self.freeze_clip()
        self.train(self.training)

    @property
    def num_channels(self) -> int:
        """Number of image channels that the backbone expects."""
        return getattr(self.backbone.config, "num_channels", 3)

    @property
    def num_pooled_features(self) -> int:
        """Number F of features pooled under a mask: mask features, or the backbone's strides 8, 16 and 32."""
        if self.config.class_feature == "query+mask_features":
            return self.config.mask_feature_size
        return sum(self.backbone.channels[1:])

    def train(self, mode: bool = True) -> "GKCModel":
        """Set the training mode; frozen BatchNorm of the backbone stays in evaluation mode."""
        super().train(mode)
        if self.config.freeze_backbone_batch_norm:
            for module in self.backbone.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module.eval()
        return self

    def get_input_embeddings(self) -> nn.Module:
        """Return the backbone's input embeddings, the first module that is applied to the images."""
        return self.backbone.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the backbone's input embeddings."""
        self.backbone.set_input_embeddings(value)

    @can_return_tuple
    def forward(
        self,
        pixel_values: Tensor,
        pixel_mask: Tensor | None = None,
        output_stages: bool | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        original_sizes: Tensor | None = None,
    ) -> GKCModelOutput:
        """Predict the masks of images.

        Args:
            pixel_values: (B, 3, H, W) normalized images, which are cast to the dtype of the weights.
            pixel_mask: (B, H, W) mask, 1 inside the image and 0 in the padding at the right and the bottom; default:
                no padding. In evaluation mode, images of different padded sizes are computed separately, so that no
                result depends on the other images of the batch; a compiled or exported model takes images of one
                padded size at a time. In training, the padding is part of the input and of the losses, as in
                Mask2Former.
            output_stages: Whether to return all S stages instead of only the last; default: only in training.
            output_hidden_states: Whether to return the hidden states of backbone and decoders; default: the value of
                the configuration. In evaluation mode, all images must have the same padded size.
            output_attentions: Whether to return the mask decoder's attention weights; default: the value of the
                configuration. In evaluation mode, all images must have the same padded size. With SDPA there are
                none, and a warning is logged.
            original_sizes: Accepted for the call `model(**inputs)` and ignored; post-processing uses it.

        Returns:
            The output of the last stage, and of all stages if requested.

        Raises:
            ValueError: If the backbone's maps do not have the strides 4, 8, 16 and 32, the mask does not fit the
                images or is empty, or hidden states or attentions of images of different padded sizes are requested.
        """
        requested = self.requested_outputs(output_hidden_states, output_attentions)
        check_pixel_values(pixel_values, self.num_channels)
        output_stages = self.training if output_stages is None else output_stages
        segment = partial(self._segment, output_stages=output_stages, **requested)
        if pixel_mask is None:
            return segment(pixel_values)
        pixel_values, pixel_mask, _ = pad_to_stride(pixel_values, pixel_mask)
        content_sizes = content_sizes_of(pixel_mask)
        output = segment(pixel_values) if self.training else run_by_padded_size(segment, pixel_values, content_sizes)
        output.content_sizes = content_sizes
        return output

    def _segment(
        self, pixel_values: Tensor, output_stages: bool, output_hidden_states: bool, output_attentions: bool
    ) -> GKCModelOutput:
        """Predict the masks of images of one padded size, without a pixel mask."""
        pixel_values = in_dtype_of(self.backbone, pixel_values)
        feature_maps = self.backbone(channels_last(pixel_values), return_dict=True).feature_maps
        _check_strides(pixel_values.shape, feature_maps)
        decoded = self.pixel_decoder(feature_maps)
        levels = decoded.multi_scale_features
        resized = [
            F.interpolate(decoded.mask_features, size=level.shape[-2:], mode="bilinear", align_corners=False)
            for level in levels
        ]
        stages = self.mask_decoder(levels, resized, decoded.position_embeddings, output_attentions)
        outputs = tuple(
            self._stage_output(stage, decoded.mask_features, resized[-1], feature_maps)
            for stage in (stages if output_stages else stages[-1:])
        )
        if self.config.ensemble != "none" and not self.training:
            outputs[-1].region_embeds = self._region_embeds(stages[-1], resized[0], feature_maps[-1])
        output = GKCModelOutput(**outputs[-1], stages=outputs if output_stages else None)
        if self.training:
            output.mask_features = decoded.mask_features
        if output_hidden_states:
            output.encoder_hidden_states = tuple(feature_maps)
            output.pixel_decoder_hidden_states = tuple(levels)
            output.transformer_decoder_hidden_states = tuple(stage.queries for stage in stages)
        if output_attentions:
            output.attentions = tuple(stage.self_attention for stage in stages[1:])
            output.cross_attentions = tuple(stage.cross_attention for stage in stages[1:])
        return output

    def _stage_output(
        self,
        stage: GKCMaskDecoderStage,
        mask_features: Tensor,
        finest_mask_features: Tensor,
        feature_maps: tuple[Tensor, ...],
    ) -> GKCModelOutput:
        """Compute the mask logits of a stage, and the features pooled under its masks if they are classified."""
        pooled = is_empty = None
        mask_logits = predict_masks(stage.mask_embeds, mask_features)
        if self.config.class_feature == "query+mask_features":
            pooled, is_empty = pool_inside_masks(mask_logits > 0, mask_features)
        elif self.config.class_feature != "query":
            masks = predict_masks(stage.mask_embeds, finest_mask_features).detach()
            pooled, is_empty = pool_under_masks(masks, feature_maps[1:])
        return GKCModelOutput(
            last_hidden_state=stage.query_features,
            masks_queries_logits=mask_logits,
            pooled_features=pooled,
            mask_is_empty=is_empty,
            mask_embeds=stage.mask_embeds if self.training else None,
        )

    @torch.no_grad()
    def _region_embeds(
        self, stage: GKCMaskDecoderStage, coarsest_mask_features: Tensor, feature_map: Tensor
    ) -> Tensor:
        """Compute CLIP's embeddings (B, Q, D) of the regions of a stage from the backbone's last map (B, C, h, w)."""
        masks = predict_masks(stage.mask_embeds, coarsest_mask_features) > 0
        region_embeds = self.region_head.embed_regions(feature_map, masks)
        if self.config.ensemble_on_valid_mask:
            region_embeds = region_embeds * masks.flatten(2).any(dim=-1)[..., None]
        return region_embeds


# Heads of CLIP's image encoders by the model type of the backbone.
_REGION_HEADS = {
    CLIPResNetConfig.model_type: CLIPResNetAttentionPooling,
    CLIPConvNextConfig.model_type: CLIPConvNextHead,
}


def _make_backbone(config: PreTrainedConfig) -> PreTrainedModel:
    """Create the backbone, with its default attention implementation if it does not support SDPA.

    Raises:
        ValueError: If a timm model does not have the requested levels.
    """
    supported = getattr(MODEL_FOR_BACKBONE_MAPPING.get(type(config), None), "_supports_sdpa", True)
    if config._attn_implementation == "sdpa" and not supported:
        config._attn_implementation = None
    try:
        return AutoBackbone.from_config(config, trust_remote_code=False)
    except IndexError as error:
        if config.model_type != "timm_backbone":
            raise
        raise ValueError(
            f"The timm model {config.backbone!r} does not have the levels `out_indices` {config.out_indices}: set "
            "`out_indices` of the `backbone_config` to its last four levels, [-4, -3, -2, -1]."
        ) from error


def _check_strides(image_shape: torch.Size, feature_maps: Sequence[Tensor]) -> None:
    """Check that the feature maps have the strides 4, 8, 16 and 32; their sizes may be rounded up or down."""
    for stride, feature_map in zip(BACKBONE_STRIDES, feature_maps, strict=True):
        sides = zip(feature_map.shape[2:], image_shape[2:], strict=True)
        if any(abs(cells * stride - side) >= stride for cells, side in sides):
            sizes = [tuple(other.shape[2:]) for other in feature_maps]
            raise ValueError(
                "The backbone must return feature maps of strides 4, 8, 16 and 32, but it returns maps of "
                f"{sizes} for images of {tuple(image_shape[2:])}: use a hierarchical backbone and its four stages "
                "as `out_features`."
            )


class GKCForOpenVocabSegmentation(OpenVocabularyMixin, GKCPreTrainedModel):
    r"""Open-vocabulary segmentation model: image path, frozen CLIP text encoder, and classifier by text embeddings.

    For adapters such as PEFT's LoRA, give the target modules as a pattern, for example
    `target_modules=r".*\.mask_decoder\..*\.(q_proj|v_proj)"`. Plain module names also match projections of the text
    tower, whose adapters would not train, because the text encoder runs without gradients.

    Args:
        config: Configuration of the model.

    Raises:
        ValueError: If the end-of-text token of the text encoder is not in its token table, or the backbone does not
            exist or does not have the requested levels.
    """

    def __init__(self, config: GKCConfig):
        super().__init__(config)
        text = config.text_config
        # The first conversions of OpenAI's weights have 2, which stands for the largest token.
        check_whole_number("text_config.eos_token_id", text.eos_token_id, 0, max(text.vocab_size - 1, 2))
        self.model = GKCModel(config)
        self.classifier = CLASSIFIER_CLASSES[config.classifier](config, self.model.num_pooled_features)
        self.text_model = CLIPTextModelWithProjection._from_config(config.text_config)
        stored = config.vocabulary_num_prompts
        self.register_buffer("vocabulary_embeds", torch.zeros(stored, config.projection_dim) if stored else None)
        self.register_buffer("vocabulary_class_ids", torch.zeros(stored, dtype=torch.long) if stored else None)
        self.criterion = GKCCriterion(config)
        self.text_cache = TextEmbeddingCache()
        self.post_init()
        self.freeze_clip()
        self.train(self.training)

    @classmethod
    def from_pretrained(cls, *args, **kwargs):
        """Load a checkpoint of this or an earlier version as in transformers."""
        kwargs["key_mapping"] = dict(CHECKPOINT_RENAMINGS) | (kwargs.get("key_mapping") or {})
        loaded = super().from_pretrained(*args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        # Otherwise the model would be saved with the parameter names of the earlier version.
        old_names = {pattern for pattern, _ in CHECKPOINT_RENAMINGS}
        model._weight_conversions = [
            conversion for conversion in model._weight_conversions if not old_names & {*conversion.source_patterns}
        ]
        return loaded

    def train(self, mode: bool = True) -> "GKCForOpenVocabSegmentation":
        """Set the training mode; the frozen text encoder stays in evaluation mode."""
        super().train(mode)
        self.text_model.eval()
        return self

    def optimize_for_inference(
        self,
        dtype: torch.dtype | None = None,
        compile: bool = True,
        sizes: Sequence[tuple[int, int]] = (),
        batch_size: int = 1,
    ) -> OptimizedGKC:
        """Return a faster copy of this model for inference.

        BatchNorm is folded into the convolutions, weights that only the losses of earlier stages use are removed, and
        the image path is compiled. Compilation takes one to two minutes for each image size and batch size, so that
        `compile=False` is faster for images of many sizes. In fp32, results differ by at most 1e-4.

        Args:
            dtype: Dtype of weights and computation, such as `torch.bfloat16`; default: that of this model.
            compile: Whether to use torch.compile, on CUDA with CUDA graphs. If compilation fails, a warning is logged
                and the model runs uncompiled.
            sizes: Image sizes (height, width) in pixels that are compiled at once instead of at their first call.
            batch_size: Number of images in a call, for the compilation of `sizes`.

        Returns:
            The optimized model. This model is not changed.

        Raises:
            ValueError: If an argument is invalid.

        Example:
            `model = model.optimize_for_inference(torch.bfloat16, sizes=[(512, 512)])`
        """
        return OptimizedGKC(self, dtype, compile, sizes, batch_size)

    @can_return_tuple
    def forward(
        self,
        pixel_values: Tensor,
        pixel_mask: Tensor | None = None,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        class_ids: Tensor | None = None,
        name_ids: Tensor | None = None,
        class_embeds: Tensor | None = None,
        mask_labels: Sequence[Tensor] | None = None,
        class_labels: Sequence[Tensor] | None = None,
        prompt_reduction: str | None = None,
        output_stages: bool | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        names_per_class: Tensor | None = None,
        prompts_per_name: Tensor | None = None,
        original_sizes: Tensor | None = None,
    ) -> GKCForOpenVocabSegmentationOutput:
        """Segment images into the classes of a vocabulary.

        The vocabulary is given as `input_ids` or as `class_embeds`; by default the one stored in the checkpoint is
        used.

        Args:
            pixel_values: (B, 3, H, W) normalized images, which are cast to the dtype of the weights and padded to
                multiples of 32 if necessary.
            pixel_mask: (B, H, W) mask, 1 inside the image and 0 in the padding at the right and the bottom, as in
                `GKCModel.forward`.
            input_ids: (P, L) token ids of the prompts.
            attention_mask: (P, L) mask of the tokens, 0 at padding.
            class_ids: (P,) class of each prompt; default: each prompt is a class of its own.
            name_ids: (P,) name of each prompt of `input_ids`; the embeddings of the prompts of a name, which differ
                by their templates, are averaged.
            class_embeds: (P, D) prompt embeddings computed by `get_class_embeddings`.
            mask_labels: Binary masks (N, H, W) of the segments of each image, of the size of `pixel_values`, as a list
                or as one tensor. Together with `class_labels` they give the loss.
            class_labels: Classes (N,) of the segments of each image.
            prompt_reduction: `mean`, `max` or `embedding_mean`; default: `config.prompt_reduction`.
            output_stages: Whether to return all decoder stages; default: only in training. With labels they are
                always returned.
            output_hidden_states: As in `GKCModel.forward`.
            output_attentions: As in `GKCModel.forward`.
            names_per_class: (K,) number of names of each class, from `get_class_embeddings`; needed only in compiled
                and exported graphs.
            prompts_per_name: (N,) number of prompts of each name; needed only in compiled and exported graphs.
            original_sizes: Accepted for the call `model(**inputs)` and ignored; post-processing uses it.

        Returns:
            Class and mask logits, with labels also losses and matches.

        Raises:
            ValueError: If `input_ids` and `class_embeds` are given together, or neither is given and the checkpoint
                stores no vocabulary; if labels or masks do not fit the images; or if hidden states or attentions of
                images of different padded sizes are requested.
        """
        if (mask_labels is None) != (class_labels is None):
            raise ValueError("`mask_labels` and `class_labels` must be given together.")
        has_labels = mask_labels is not None
        prompts = self.resolve_vocabulary(
            input_ids=input_ids,
            attention_mask=attention_mask,
            class_ids=class_ids,
            name_ids=name_ids,
            class_embeds=class_embeds,
            prompt_reduction=prompt_reduction,
            names_per_class=names_per_class,
            prompts_per_name=prompts_per_name,
        )
        check_pixel_values(pixel_values, self.model.num_channels)
        image_size = pixel_values.shape[-2:]
        pixel_values, pixel_mask, mask_labels = pad_to_stride(pixel_values, pixel_mask, mask_labels)
        wants_stages = has_labels or (self.training if output_stages is None else output_stages)
        requested = {"output_hidden_states": output_hidden_states, "output_attentions": output_attentions}
        segments = self.model(pixel_values, pixel_mask, output_stages=wants_stages, return_dict=True, **requested)
        content_sizes = segments.content_sizes
        if content_sizes is None:
            content_sizes = full_content_sizes(pixel_values, image_size)

        stages = None
        if wants_stages:
            stages = tuple(self._classify(stage, prompts, index) for index, stage in enumerate(segments.stages))
        last = stages[-1] if wants_stages else self._classify(segments, prompts)
        loss, loss_dict, matches = None, None, None
        if has_labels:
            loss, loss_dict, matches = self._losses(
                stages, mask_labels, class_labels, content_sizes, segments.mask_features
            )
        return GKCForOpenVocabSegmentationOutput(
            loss=loss,
            loss_dict=loss_dict,
            class_queries_logits=last.class_queries_logits,
            masks_queries_logits=last.masks_queries_logits,
            query_embeds=last.query_embeds,
            content_sizes=content_sizes,
            mask_features=segments.mask_features,
            stages=stages,
            matches=matches,
            **segments.states(),
        )

    def _classify(self, stage: GKCModelOutput, prompts: ClassPrompts, index: int = -1) -> GKCStageOutput:
        """Classify the queries of a stage."""
        logits, query_embeds = self.classifier(stage, prompts, index)
        return GKCStageOutput(
            class_queries_logits=logits,
            masks_queries_logits=stage.masks_queries_logits,
            query_embeds=query_embeds,
            query_features=stage.last_hidden_state,
            mask_embeds=stage.mask_embeds,
        )

    def _losses(
        self,
        stages: tuple[GKCStageOutput, ...],
        mask_labels: Sequence[Tensor],
        class_labels: Sequence[Tensor],
        content_sizes: Tensor | None,
        mask_features: Tensor | None,
    ) -> tuple[Tensor, dict[str, Tensor], list[Matches]]:
        """Compute the total loss, the losses by name, and the matches of each stage and image."""
        masks = [stage.masks_queries_logits for stage in stages]
        if content_sizes is not None and not self.training:
            masks = [hide_padding(stage, content_sizes) for stage in masks]
        losses, matches = self.criterion(
            [stage.class_queries_logits for stage in stages],
            masks,
            mask_labels,
            class_labels,
            mask_parts=MaskParts.from_stages(stages, mask_features),
        )
        return self.criterion.total(losses), losses, matches


register_segmentation_model(GKCConfig, GKCForOpenVocabSegmentation)

__all__ = [
    "GKCClassEmbeddings",
    "GKCForOpenVocabSegmentation",
    "GKCForOpenVocabSegmentationOutput",
    "GKCModel",
    "GKCModelOutput",
    "GKCPreTrainedModel",
    "GKCStageOutput",
    "OptimizedGKC",
    "average_class_embeds",
    "reduce_prompt_logits",
]
