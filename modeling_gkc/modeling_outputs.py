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
"""Output classes of the segmentation models.

Letters: B images, Q queries, C hidden size, F pooled features, D text-embedding width, K classes, S decoder stages =
decoder_layers + 1, (H, W) padded input size.
"""

from dataclasses import dataclass

from torch import Tensor
from transformers.utils import ModelOutput

from .loss_gkc import Matches


@dataclass
class GKCModelOutput(ModelOutput):
    """Output of `GKCModel`, or of one of its decoder stages.

    Attributes:
        last_hidden_state: (B, Q, C) queries of the last stage after layer normalization.
        masks_queries_logits: (B, Q, H/4, W/4) mask logits of the last stage.
        pooled_features: (B, Q, F) features pooled under the masks of the last stage. None with
            `config.class_feature="query"`.
        mask_is_empty: (B, Q) boolean tensor, True where a mask of the last stage has no positive logit. Only with
            `pooled_features`.
        region_embeds: (B, Q, D) embeddings of the regions of the last stage by the backbone's CLIP head, not
            normalized. They are zero for regions excluded by `config.ensemble_on_valid_mask`. Only with
            `config.ensemble`, and not in training.
        mask_embeds: (B, Q, mask_feature_size) mask embeddings of the last stage. Only in training.
        mask_features: (B, mask_feature_size, H/4, W/4) features; their products with `mask_embeds` are the mask
            logits. Only in training.
        stages: Outputs of the S stages, with the fields up to `mask_embeds`. Only if requested.
        content_sizes: (B, 2) height and width in pixels of each image inside its padded input. Only with a
            `pixel_mask`.
        encoder_hidden_states: Four feature maps (B, C_i, h_i, w_i) of the backbone, of strides 4, 8, 16 and 32. Only
            with `output_hidden_states=True`.
        pixel_decoder_hidden_states: Three feature maps (B, C, h, w) of strides 32, 16 and 8. Only with
            `output_hidden_states=True`.
        transformer_decoder_hidden_states: Queries (B, Q, C) of the S stages before layer normalization. Only with
            `output_hidden_states=True`.
        attentions: Self-attention weights (B, heads, Q, Q) of each layer of the mask decoder. Only with
            `output_attentions=True`.
        cross_attentions: Cross-attention weights (B, heads, Q, h*w) of each layer over the map of stride 32, 16 or 8
            in turn. Only with `output_attentions=True`.
    """

    last_hidden_state: Tensor | None = None
    masks_queries_logits: Tensor | None = None
    pooled_features: Tensor | None = None
    mask_is_empty: Tensor | None = None
    region_embeds: Tensor | None = None
    mask_embeds: Tensor | None = None
    mask_features: Tensor | None = None
    stages: tuple["GKCModelOutput", ...] | None = None
    content_sizes: Tensor | None = None
    encoder_hidden_states: tuple[Tensor, ...] | None = None
    pixel_decoder_hidden_states: tuple[Tensor, ...] | None = None
    transformer_decoder_hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None
    cross_attentions: tuple[Tensor, ...] | None = None

    def states(self) -> dict[str, tuple[Tensor, ...]]:
        """Return the requested hidden states and attentions by name."""
        return {name: value for name, value in self.items() if name.endswith(("hidden_states", "attentions"))}


@dataclass
class GKCStageOutput(ModelOutput):
    """Predictions of one decoder stage, which the losses use.

    Attributes:
        class_queries_logits: (B, Q, K + 1) class logits; the last column is no-object.
        masks_queries_logits: (B, Q, H/4, W/4) mask logits.
        query_embeds: (B, Q, D) L2-normalized embeddings of the queries in the space of the text embeddings.
        query_features: (B, Q, C) queries after layer normalization.
        mask_embeds: (B, Q, mask_feature_size) mask embeddings; their products with `mask_features` of the model's
            output are the mask logits. Only in training.
    """

    class_queries_logits: Tensor | None = None
    masks_queries_logits: Tensor | None = None
    query_embeds: Tensor | None = None
    query_features: Tensor | None = None
    mask_embeds: Tensor | None = None


@dataclass
class GKCForOpenVocabSegmentationOutput(ModelOutput):
    """Output of `GKCForOpenVocabSegmentation`.

    Attributes:
        loss: Scalar, the weighted sum of `loss_dict`. Only with labels.
        class_queries_logits: (B, Q, K + 1) class logits; the last column is no-object. As in Mask2Former, these and
            the mask logits follow the loss in `to_tuple()`.
        masks_queries_logits: (B, Q, H/4, W/4) mask logits.
        query_embeds: (B, Q, D) L2-normalized embeddings of the queries in the space of the text embeddings. With
            `config.ensemble` (B, Q, 2 * D), where the second half is CLIP's embeddings of the regions, zero for
            excluded regions.
        content_sizes: (B, 2) height and width in pixels of each image inside its padded input, by which
            post-processing removes the padding. None if the input is not padded.
        loss_dict: Unweighted losses by name; the suffixes `_0`, `_1`, ... denote stages before the last. Only with
            labels.
        mask_features: (B, mask_feature_size, H/4, W/4) features, see `GKCStageOutput.mask_embeds`. Only in training.
        stages: Predictions of the S stages. Only in training, with labels or with `output_stages=True`.
        matches: Matched (queries, segments) of each stage and image. Only with labels.
        encoder_hidden_states: As in `GKCModelOutput`.
        pixel_decoder_hidden_states: As in `GKCModelOutput`.
        transformer_decoder_hidden_states: As in `GKCModelOutput`.
        attentions: As in `GKCModelOutput`.
        cross_attentions: As in `GKCModelOutput`.
    """

    loss: Tensor | None = None
    class_queries_logits: Tensor | None = None
    masks_queries_logits: Tensor | None = None
    query_embeds: Tensor | None = None
    content_sizes: Tensor | None = None
    loss_dict: dict[str, Tensor] | None = None
    mask_features: Tensor | None = None
    stages: tuple[GKCStageOutput, ...] | None = None
    matches: list[Matches] | None = None
    encoder_hidden_states: tuple[Tensor, ...] | None = None
    pixel_decoder_hidden_states: tuple[Tensor, ...] | None = None
    transformer_decoder_hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None
    cross_attentions: tuple[Tensor, ...] | None = None


__all__ = ["GKCForOpenVocabSegmentationOutput", "GKCModelOutput", "GKCStageOutput"]
