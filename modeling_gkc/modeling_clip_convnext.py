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
"""ConvNeXt image encoder of OpenCLIP (Liu et al., *A ConvNet for the 2020s*, CVPR 2022; Ilharco et al., *OpenCLIP*).

Stem and stages are those of transformers' ConvNeXt. Its backbone class is not used, because it normalizes every
feature map, whereas CLIP normalizes only the pooled features, in the head that maps them to the image-text space.

Letters in the comments: B images, C channels, (H, W) input size, (h, w) size of the last feature map, D projection.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import AutoBackbone, AutoModel
from transformers.activations import ACT2FN
from transformers.models.convnext.modeling_convnext import ConvNextEmbeddings, ConvNextPreTrainedModel, ConvNextStage
from transformers.utils import ModelOutput
from transformers.utils.generic import can_return_tuple

from .configuration_gkc import CLIPConvNextConfig
from .mask_decoder import pool_inside_masks
from .modeling_clip_resnet import CLIPBackboneMixin, CLIPImageEncoder, CLIPImageEncoderMixin


@dataclass
class CLIPConvNextVisionOutput(ModelOutput):
    """Output of `CLIPConvNextVisionModel`.

    Attributes:
        image_embeds: (B, D) image embeddings in CLIP's image-text space, not normalized.
        last_hidden_state: (B, C, h, w) feature map of the last stage, stride 32.
        dense_embeds: (B, D, h, w) embeddings of all positions: the head applied to each position instead of to the
            mean. Only with `output_dense_embeds=True`.
        hidden_states: Feature maps (B, C_i, h_i, w_i) of the stem and of the four stages, of strides 4, 4, 8, 16 and
            32. Only with `output_hidden_states=True`.
    """

    image_embeds: Tensor | None = None
    last_hidden_state: Tensor | None = None
    dense_embeds: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None


class CLIPConvNextHead(nn.Module):
    """Layer normalization and projection of pooled features to the image-text space."""

    def __init__(self, config: CLIPConvNextConfig):
        super().__init__()
        width, hidden = config.hidden_sizes[-1], config.projection_hidden_dim
        self.layer_norm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        if hidden is None:
            self.projection = nn.Linear(width, config.projection_dim, bias=False)
        else:
            self.projection = nn.Sequential(
                nn.Linear(width, hidden),
                ACT2FN[config.hidden_act],
                nn.Linear(hidden, config.projection_dim, bias=False),
            )

    def forward(self, pooled_features: Tensor) -> Tensor:
        """Map pooled features (..., C) to embeddings (..., D), which are not normalized."""
        return self.projection(self.layer_norm(pooled_features))

    def embed_regions(self, feature_map: Tensor, masks: Tensor) -> Tensor:
        """Embed regions by their mean features.

        Args:
            feature_map: (B, C, h, w) last feature map of the tower.
            masks: (B, Q, h, w) boolean masks of the regions.

        Returns:
            (B, Q, D) embeddings, which are not normalized. Empty masks have the embedding of zero features.
        """
        pooled_features, _ = pool_inside_masks(masks, feature_map)
        return self(pooled_features)


class CLIPConvNextEncoder(CLIPImageEncoder):
    """Stem and four stages of transformers' ConvNeXt."""

    def __init__(self, config: CLIPConvNextConfig):
        super().__init__()
        self.stem = ConvNextEmbeddings(config)
        rates = torch.linspace(0, config.drop_path_rate, sum(config.depths), device="cpu").split(config.depths)
        self.stages = nn.ModuleList()
        in_channels = config.hidden_sizes[0]
        for index, (channels, depth) in enumerate(zip(config.hidden_sizes, config.depths, strict=True)):
            stride = 2 if index else 1
            self.stages.append(
                ConvNextStage(
                    config,
                    in_channels,
                    channels,
                    stride=stride,
                    depth=depth,
                    drop_path_rates=rates[index].tolist(),
                )
            )
            in_channels = channels


class CLIPConvNextPreTrainedModel(CLIPImageEncoderMixin, ConvNextPreTrainedModel):
    """Base class of CLIP's ConvNeXt models: weight initialization and loading."""

    config_class = CLIPConvNextConfig
    config: CLIPConvNextConfig
    base_model_prefix = "clip_convnext"


class CLIPConvNextBackbone(CLIPBackboneMixin, CLIPConvNextPreTrainedModel):
    """CLIP's ConvNeXt without its head, as a backbone with unnormalized feature maps of strides 4, 8, 16 and 32."""

    def __init__(self, config: CLIPConvNextConfig):
        super().__init__(config)
        self.num_features = [config.hidden_sizes[0], *config.hidden_sizes]
        self.encoder = CLIPConvNextEncoder(config)
        self.post_init()


class CLIPConvNextVisionModel(CLIPConvNextPreTrainedModel):
    """CLIP's ConvNeXt image model, which embeds images in the image-text space."""

    def __init__(self, config: CLIPConvNextConfig):
        super().__init__(config)
        self.encoder = CLIPConvNextEncoder(config)
        self.head = CLIPConvNextHead(config)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        pixel_values: Tensor,
        output_dense_embeds: bool = False,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
    ) -> CLIPConvNextVisionOutput:
        """Embed images.

        Args:
            pixel_values: (B, 3, H, W) images of at least 32 x 32 pixels, normalized with CLIP's mean and standard
                deviation.
            output_dense_embeds: Whether to also return the embeddings of all positions of the last feature map.
            output_hidden_states: Whether to also return the feature maps of the stem and of all stages; default: the
                value of the configuration.
            output_attentions: Accepted for compatibility with other image models and ignored: there is no attention.
        """
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        hidden_states = self.encoder(pixel_values)
        last_hidden_state = hidden_states[-1]
        dense_embeds = None
        if output_dense_embeds:
            dense_embeds = self.head(last_hidden_state.movedim(1, -1)).movedim(-1, 1)
        return CLIPConvNextVisionOutput(
            image_embeds=self.head(last_hidden_state.mean(dim=(-2, -1))),
            last_hidden_state=last_hidden_state,
            dense_embeds=dense_embeds,
            hidden_states=hidden_states if output_hidden_states else None,
        )


AutoBackbone.register(CLIPConvNextConfig, CLIPConvNextBackbone, exist_ok=True)
AutoModel.register(CLIPConvNextConfig, CLIPConvNextVisionModel, exist_ok=True)

__all__ = ["CLIPConvNextBackbone", "CLIPConvNextHead", "CLIPConvNextVisionModel", "CLIPConvNextVisionOutput"]
