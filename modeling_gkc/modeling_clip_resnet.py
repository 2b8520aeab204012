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
"""CLIP's ResNet image tower (Radford et al., 2021, section 2.4), as backbone and as full image model.

It differs from a plain ResNet in three ways: a stem of three convolutions with average pooling, strides realised by
average pooling before the last convolution of a block and of its shortcut ("anti-aliased" strides), and attention
instead of average pooling at the end.

Letters in the comments: B images, C channels, (H, W) input size, (h, w) size of the last feature map, D projection.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoBackbone, AutoModel
from transformers import initialization as init
from transformers.backbone_utils import BackboneMixin
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BackboneOutput
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel
from transformers.utils import ModelOutput, logging
from transformers.utils.generic import can_return_tuple
from transformers.utils.import_utils import is_tracing

from .attention import eager_attention
from .configuration_gkc import CLIPResNetConfig
from .remote_code import CodeRegistrationMixin

logger = logging.get_logger(__name__)


@dataclass
class CLIPResNetVisionOutput(ModelOutput):
    """Output of `CLIPResNetVisionModel`.

    Attributes:
        image_embeds: (B, D) image embeddings in CLIP's image-text space, not normalised.
        last_hidden_state: (B, C, h, w) feature map of the last stage, stride 32.
        dense_embeds: (B, D, h, w) the attention pooling asked at every position instead of at the mean; given with
            `output_dense_embeds=True`.
        hidden_states: stem and stage feature maps, (B, C_i, h_i, w_i) of strides 4, 4, 8, 16, 32; given with
            `output_hidden_states=True`.
        attentions: one tensor, (B, heads, 1 + h*w, 1 + h*w) weights of the attention pooling with dense embeddings,
            else (B, heads, 1, 1 + h*w); the first row and column are the mean's. Given with `output_attentions=True`.
    """

    image_embeds: Tensor | None = None
    last_hidden_state: Tensor | None = None
    dense_embeds: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


def channels_last(pixel_values: Tensor) -> Tensor:
    """Images (B, 3, H, W) with the channels of a pixel side by side in memory, where convolutions are faster so."""
    if pixel_values.device.type not in ("cpu", "cuda"):
        return pixel_values
    return pixel_values.contiguous(memory_format=torch.channels_last)


def in_dtype_of(module: nn.Module, pixel_values: Tensor) -> Tensor:
    """Images in the floating-point type of the module's first weights, which are the ones that take them."""
    dtype = next((weight.dtype for weight in module.parameters() if weight.is_floating_point()), pixel_values.dtype)
    return pixel_values.to(dtype) if pixel_values.is_floating_point() else pixel_values


class CLIPResNetConvLayer(nn.Module):
    """Convolution, BatchNorm, and ReLU if `activation`."""

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: int, stride: int = 1, activation: bool = True
    ):
        super().__init__()
        self.convolution = nn.Conv2d(
            in_channels, out_channels, kernel_size, stride=stride, padding=kernel_size // 2, bias=False
        )
        self.normalization = nn.BatchNorm2d(out_channels)
        self.activation = nn.ReLU() if activation else nn.Identity()

    def forward(self, hidden_states: Tensor) -> Tensor:
        if self._is_cheaper_folded(hidden_states):
            return self.activation(self._folded(hidden_states))
        return self.activation(self.normalization(self.convolution(hidden_states)))

    def _is_cheaper_folded(self, hidden_states: Tensor) -> bool:
        """Whether training is cheaper with BatchNorm in the weights: less work, and a map less to keep for gradients.

        Only where BatchNorm's statistics are fixed, and both modules are what they seem: adapters and offloading work
        by being called. Not in mixed precision, where the factors' gradients would be summed from rounded numbers.
        """
        if not self.training or torch.is_autocast_enabled(hidden_states.device.type):
            return False
        convolution, normalization = self.convolution, self.normalization
        if type(convolution) is not nn.Conv2d or type(normalization) is not nn.BatchNorm2d or normalization.training:
            return False
        if _has_hooks(convolution) or _has_hooks(normalization):
            return False
        pixels = hidden_states.shape[-2] * hidden_states.shape[-1] // math.prod(convolution.stride)
        return pixels >= convolution.weight[0].numel()

    def _folded(self, hidden_states: Tensor) -> Tensor:
        """Convolution with the normalisation's factors in its weights: the map before it is not kept for gradients."""
        convolution, normalization = self.convolution, self.normalization
        dtype = convolution.weight.dtype
        precision = torch.promote_types(dtype, torch.float32)
        scale = (
            normalization.weight.to(precision) * (normalization.running_var.to(precision) + normalization.eps).rsqrt()
        )
        bias = normalization.bias - normalization.running_mean * scale
        weight = convolution.weight * scale[:, None, None, None]
        return F.conv2d(
            hidden_states, weight.to(dtype), bias.to(dtype), stride=convolution.stride, padding=convolution.padding
        )


def _has_hooks(module: nn.Module) -> bool:
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or hasattr(module, "_hf_hook")
    )


class CLIPResNetStem(nn.Module):
    """Three convolutions and an average pooling: (B, 3, H, W) -> (B, width, H/4, W/4)."""

    def __init__(self, config: CLIPResNetConfig):
        super().__init__()
        half = config.width // 2
        self.layers = nn.Sequential(
            CLIPResNetConvLayer(config.num_channels, half, 3, stride=2),
            CLIPResNetConvLayer(half, half, 3),
            CLIPResNetConvLayer(half, config.width, 3),
        )
        self.pooler = nn.AvgPool2d(2)

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.pooler(self.layers(pixel_values))


class CLIPResNetBottleneck(GradientCheckpointingLayer):
    """Bottleneck block whose stride is an average pooling in the branch and in the shortcut."""

    expansion = 4
    _recompute = False

    def __init__(self, in_channels: int, channels: int, stride: int):
        super().__init__()
        out_channels = channels * self.expansion
        self.reduce = CLIPResNetConvLayer(in_channels, channels, 1)
        self.spatial = CLIPResNetConvLayer(channels, channels, 3)
        self.pooler = nn.AvgPool2d(stride) if stride > 1 else nn.Identity()
        self.expand = CLIPResNetConvLayer(channels, out_channels, 1, activation=False)
        self.shortcut = None
        if stride > 1 or in_channels != out_channels:
            self.shortcut = CLIPResNetConvLayer(in_channels, out_channels, 1, activation=False)

    @property
    def gradient_checkpointing(self) -> bool:
        """Whether the backward pass computes this block again.

        Never while BatchNorm learns its statistics: a second forward pass would count the batch twice.
        """
        return self._recompute and not self.reduce.normalization.training

    @gradient_checkpointing.setter
    def gradient_checkpointing(self, enable: bool) -> None:
        self._recompute = enable

    def forward(self, hidden_states: Tensor) -> Tensor:
        residual = hidden_states
        if self.shortcut is not None:
            residual = self.shortcut(self.pooler(residual))
        hidden_states = self.expand(self.pooler(self.spatial(self.reduce(hidden_states))))
        return (hidden_states + residual).relu_()  # the sum is this block's own


class CLIPResNetEncoder(nn.Module):
    """Stem and four stages; returns all five feature maps."""

    def __init__(self, config: CLIPResNetConfig):
        super().__init__()
        self.stem = CLIPResNetStem(config)
        self.stages = nn.ModuleList()
        in_channels = config.width
        for index, depth in enumerate(config.depths):
            channels = config.width * 2**index
            blocks = []
            for block in range(depth):
                stride = 2 if index > 0 and block == 0 else 1
                blocks.append(CLIPResNetBottleneck(in_channels, channels, stride))
                in_channels = channels * CLIPResNetBottleneck.expansion
            self.stages.append(nn.Sequential(*blocks))

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, ...]:
        hidden_states = (self.stem(channels_last(in_dtype_of(self.stem, pixel_values))),)
        for stage in self.stages:
            hidden_states += (stage(hidden_states[-1]),)
        return hidden_states


class CLIPResNetAttentionPooling(nn.Module):
    """Multi-head attention of the mean feature (or of every position) over all positions and the mean."""

    is_causal = False

    def __init__(self, config: CLIPResNetConfig):
        super().__init__()
        self.config = config
        self.num_heads = config.num_attention_heads
        self.grid_size = config.image_size // 32
        width = config.hidden_size
        self.position_embedding = nn.Parameter(torch.empty(self.grid_size**2 + 1, width))
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.out_proj = nn.Linear(width, config.projection_dim)

    def forward(self, hidden_states: Tensor, dense: bool = False) -> tuple[Tensor, Tensor | None]:
        """Pools (B, C, h, w) to (B, 1, D), or to (B, 1 + h*w, D) if `dense`; the first row is the image embedding.

        Returns:
            The embeddings, and their weights (B, heads, 1 or 1 + h*w, 1 + h*w) where the attention implementation has
            them.
        """
        height, width = hidden_states.shape[-2:]
        tokens = hidden_states.flatten(2).transpose(1, 2)  # (B, h*w, C)
        tokens = torch.cat([tokens.mean(dim=1, keepdim=True), tokens], dim=1)
        tokens = tokens + self._positions(height, width)
        queries = tokens if dense else tokens[:, :1]
        query, key, value = (
            projection(states).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for projection, states in ((self.q_proj, queries), (self.k_proj, tokens), (self.v_proj, tokens))
        )  # (B, heads, tokens, C / heads)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention)
        attended, weights = attend(self, query, key, value, None, scaling=query.shape[-1] ** -0.5)
        return self.out_proj(attended.flatten(2)), weights

    def embed_regions(self, feature_map: Tensor, masks: Tensor) -> Tensor:
        """Embed regions: the query of the whole map's mean attends to the positions inside each mask.

        Args:
            feature_map: (B, C, h, w) last feature map of the tower.
            masks: (B, Q, h, w) bool.

        Returns:
            (B, Q, D) embeddings, not normalized; an empty mask attends to nothing, which leaves the output's bias.
        """
        positions = self._positions(*feature_map.shape[-2:])
        tokens = feature_map.flatten(2).transpose(1, 2)  # (B, h*w, C)
        queries = tokens.mean(dim=1, keepdim=True) + positions[0]
        tokens = tokens + positions[1:]
        query, key, value = (
            projection(states).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for projection, states in ((self.q_proj, queries), (self.k_proj, tokens), (self.v_proj, tokens))
        )  # (B, heads, 1 or h*w, C / heads)
        masks = masks.flatten(2)[:, None]  # (B, 1, Q, h*w)
        is_empty = ~masks.any(dim=-1, keepdim=True)  # a softmax over nothing would be NaN
        query = query.expand(-1, -1, masks.shape[2], -1)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention)
        attended, _ = attend(self, query, key, value, masks | is_empty, scaling=query.shape[-1] ** -0.5)
        return self.out_proj(attended.flatten(2).masked_fill(is_empty[:, 0], 0))

    def _positions(self, height: int, width: int) -> Tensor:
        """Positional table for a map of another size: the mean's row is kept, the grid's rows are resized."""
        if (height, width) == (self.grid_size, self.grid_size):
            return self.position_embedding
        mean, grid = self.position_embedding[:1], self.position_embedding[1:]
        grid = grid.T.unflatten(1, (self.grid_size, self.grid_size))[None]  # (1, C, grid, grid)
        grid = F.interpolate(grid, size=(height, width), mode="bilinear", align_corners=False)
        return torch.cat([mean, grid[0].flatten(1).T])


class GKCModelMixin(CodeRegistrationMixin):
    """What all models here share: how they are loaded and initialised, and what a call may ask for."""

    @classmethod
    def from_pretrained(cls, *args, **kwargs):
        """Loads a checkpoint; pickled weights can run code, so they are read only with `use_safetensors=False`."""
        return super().from_pretrained(*args, **({"use_safetensors": True} | kwargs))

    @classmethod
    def is_custom_code(cls) -> bool:
        """False: `_init_weights` leaves loaded weights alone, so transformers need not skip modules on its behalf."""
        return False

    def resize_token_embeddings(self, *args, **kwargs):
        """Not possible: words are text to be encoded, not rows of a table."""
        raise ValueError(
            f"{type(self).__name__} has no token table that could be resized: any words can be given as text, and the "
            "frozen text tower reads CLIP's own tokens."
        )

    def requested_outputs(self, output_hidden_states: bool | None, output_attentions: bool | None) -> dict[str, bool]:
        """What a call asks for; where it says nothing, what the configuration says.

        Attention weights are left out, with a warning, where the implementation does not have them.
        """
        config = self.config
        output_hidden_states = config.output_hidden_states if output_hidden_states is None else output_hidden_states
        output_attentions = config.output_attentions if output_attentions is None else output_attentions
        if output_attentions and config._attn_implementation == "sdpa":
            output_attentions = False
            if not is_tracing():
                logger.warning_once(
                    "Attention weights exist only in eager attention, not in 'sdpa', and are left out: call "
                    "`model.set_attn_implementation('eager')`, or load with `attn_implementation='eager'`."
                )
        return {"output_hidden_states": output_hidden_states, "output_attentions": output_attentions}


class CLIPResNetPreTrainedModel(GKCModelMixin, PreTrainedModel):
    """Weight initialisation and loading."""

    config_class = CLIPResNetConfig
    config: CLIPResNetConfig
    base_model_prefix = "clip_resnet"
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    _supports_sdpa = True
    _supports_attention_backend = True
    _no_split_modules = ["CLIPResNetBottleneck", "CLIPResNetStem", "CLIPResNetAttentionPooling"]

    def get_input_embeddings(self) -> nn.Module:
        """The stem: what first turns pixels into features."""
        return self.encoder.stem

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replaces the stem by a module that maps (B, 3, H, W) to (B, width, H/4, W/4)."""
        self.encoder.stem = value

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        super()._init_weights(module)
        if isinstance(module, nn.Conv2d):
            init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(module, CLIPResNetAttentionPooling):
            std = module.q_proj.in_features**-0.5
            init.normal_(module.position_embedding, std=std)
            for projection in (module.q_proj, module.k_proj, module.v_proj, module.out_proj):
                init.normal_(projection.weight, std=std)


class CLIPResNetBackbone(BackboneMixin, CLIPResNetPreTrainedModel):
    """CLIP's ResNet without its attention pooling; feature maps of strides 4, 8, 16, 32."""

    has_attentions = False

    def __init__(self, config: CLIPResNetConfig):
        super().__init__(config)
        self.num_features = config.hidden_sizes
        self.encoder = CLIPResNetEncoder(config)
        self.post_init()

    @can_return_tuple
    def forward(
        self, pixel_values: Tensor, output_hidden_states: bool | None = None, output_attentions: bool | None = None
    ) -> BackboneOutput:
        """Computes the feature maps named in `config.out_features`.

        Args:
            pixel_values: (B, 3, H, W) normalised images of any size of at least 32 x 32.
            output_hidden_states: Also return the stem's and all stages' feature maps; default: as configured.
            output_attentions: Accepted for the common call of backbones; there is no attention here.
        """
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        hidden_states = self.encoder(pixel_values)
        return BackboneOutput(
            feature_maps=tuple(hidden_states[index] for index in self.out_indices),
            hidden_states=hidden_states if output_hidden_states else None,
        )


class CLIPResNetVisionModel(CLIPResNetPreTrainedModel):
    """CLIP's full ResNet image model: image -> embedding in the image-text space."""

    def __init__(self, config: CLIPResNetConfig):
        super().__init__(config)
        self.encoder = CLIPResNetEncoder(config)
        self.attention_pooling = CLIPResNetAttentionPooling(config)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        pixel_values: Tensor,
        output_dense_embeds: bool = False,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
    ) -> CLIPResNetVisionOutput:
        """Embeds images.

        Args:
            pixel_values: (B, 3, H, W) images normalised with CLIP's mean and deviation, of any size of at least
                32 x 32.
            output_dense_embeds: Also return the embedding at every position of the last feature map.
            output_hidden_states: Also return the stem's and all stages' feature maps; default: as configured.
            output_attentions: Also return the weights of the attention pooling; default: as configured. SDPA has
                none, as a warning says.
        """
        requested = self.requested_outputs(output_hidden_states, output_attentions)
        hidden_states = self.encoder(pixel_values)
        last_hidden_state = hidden_states[-1]
        embeds, attention = self.attention_pooling(last_hidden_state, dense=output_dense_embeds)
        dense_embeds = None
        if output_dense_embeds:
            dense_embeds = embeds[:, 1:].transpose(1, 2).unflatten(2, last_hidden_state.shape[-2:])
        return CLIPResNetVisionOutput(
            image_embeds=embeds[:, 0],
            last_hidden_state=last_hidden_state,
            dense_embeds=dense_embeds,
            hidden_states=hidden_states if requested["output_hidden_states"] else None,
            attentions=(attention,) if requested["output_attentions"] else None,
        )


AutoBackbone.register(CLIPResNetConfig, CLIPResNetBackbone, exist_ok=True)
AutoModel.register(CLIPResNetConfig, CLIPResNetVisionModel, exist_ok=True)

__all__ = [
    "CLIPResNetAttentionPooling",
    "CLIPResNetBackbone",
    "CLIPResNetPreTrainedModel",
    "CLIPResNetVisionModel",
    "CLIPResNetVisionOutput",
    "GKCModelMixin",
    "channels_last",
    "in_dtype_of",
]
