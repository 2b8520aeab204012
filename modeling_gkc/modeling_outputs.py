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
"""Outputs of the segmenter's models.

Letters: B images, Q queries, C hidden, F pooled features, D text-embedding width, K classes, S decoder stages =
decoder_layers + 1, (H, W) padded input size.
"""

from dataclasses import dataclass

from torch import Tensor
from transformers.utils import ModelOutput

from .loss_gkc import Matches


@dataclass
class GKCModelOutput(ModelOutput):
    """Output of the image path.

    Attributes:
        last_hidden_state: (B, Q, C) normalized queries of the last stage.
        masks_queries_logits: (B, Q, H/4, W/4) mask logits of the last stage.
        pooled_features: (B, Q, F) backbone features pooled under the last stage's masks; only if
            `config.class_feature` asks for them.
        mask_is_empty: (B, Q) whether the last stage's mask holds no pixel; only with `pooled_features`.
        region_embeds: (B, Q, D) embeddings of the last stage's regions by the CLIP head of the backbone, not
            normalized; zero where `config.ensemble_on_valid_mask` leaves them out. Only if `config.ensemble` asks for
            them, and not in training.
        mask_embeds: (B, Q, mask_feature_size) embeddings of the last stage; in training only, as the next.
        mask_features: (B, mask_feature_size, H/4, W/4), whose products with `mask_embeds` are the mask logits.
        stages: for each of the S stages the same values but the last, if asked for.
        content_sizes: (B, 2) height and width in pixels of each image inside its padded input; with `pixel_mask`.
        encoder_hidden_states: four maps (B, C_i, h_i, w_i) of the backbone, of strides 4, 8, 16, 32; this and the next
            two with `output_hidden_states=True`.
        pixel_decoder_hidden_states: three maps (B, C, h, w) of strides 32, 16, 8.
        transformer_decoder_hidden_states: S times (B, Q, C), the queries before the first layer and after each.
        attentions: for each layer of the mask decoder (B, heads, Q, Q) weights of its self-attention; this and the
            next with `output_attentions=True`.
        cross_attentions: for each layer (B, heads, Q, h*w) weights over the map of stride 32, 16 or 8, in turn.
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
        """Return the hidden states and attentions that were asked for, by name."""
        return {name: value for name, value in self.items() if name.endswith(("hidden_states", "attentions"))}


@dataclass
class GKCStageOutput(ModelOutput):
    """Predictions of one decoder stage, for losses.

    Attributes:
        class_queries_logits: (B, Q, K + 1) class logits, the last column no-object.
        masks_queries_logits: (B, Q, H/4, W/4) mask logits.
        query_embeds: (B, Q, D) L2-normalized embeddings that are classified.
        query_features: (B, Q, C) normalized queries.
        mask_embeds: (B, Q, mask_feature_size), whose products with the output's `mask_features` are the mask logits;
            in training only.
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
        loss: Scalar, weighted sum of `loss_dict`; given with labels.
        class_queries_logits: (B, Q, K + 1) class logits, the last column no-object. These and the mask logits come
            next in `to_tuple()`, as Mask2Former's do.
        masks_queries_logits: (B, Q, H/4, W/4) mask logits.
        query_embeds: (B, Q, D) L2-normalized embeddings of the queries in the text space; (B, Q, 2 * D) where
            `config.ensemble` adds those of CLIP, which are zero for regions that it leaves out.
        content_sizes: (B, 2) height and width in pixels of each image inside its padded input; None when the whole
            input is image. Post-processing cuts the padding off with it.
        loss_dict: Unweighted losses by name; `_0`, `_1`, ... mark stages before the last.
        mask_features: (B, mask_feature_size, H/4, W/4), see `GKCStageOutput.mask_embeds`; in training only.
        stages: the S stages' predictions, in training or with `output_stages=True`.
        matches: for each stage and image the matched (queries, segments); given with labels.
        encoder_hidden_states, pixel_decoder_hidden_states, transformer_decoder_hidden_states, attentions,
            cross_attentions: as in `GKCModelOutput`, if asked for.
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
