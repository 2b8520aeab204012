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
"""CLIP's ResNet image encoder as a backbone and as an image model (Radford et al., *CLIP*, ICML 2021, section 2.4).

It differs from a plain ResNet in three ways: the stem has three convolutions and average pooling; blocks downsample by
average pooling before the last convolution of the block and of its shortcut ("anti-aliased" strides); and attention
pooling replaces global average pooling.

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

from .attention import eager_attention_forward
from .configuration_gkc import CLIPResNetConfig
from .remote_code import CodeRegistrationMixin

logger = logging.get_logger(__name__)


@dataclass
class CLIPResNetVisionOutput(ModelOutput):
    """Output of `CLIPResNetVisionModel`.

    Attributes:
        image_embeds: (B, D) image embeddings in CLIP's image-text space, not normalized.
        last_hidden_state: (B, C, h, w) feature map of the last stage, stride 32.
        dense_embeds: (B, D, h, w) embeddings of all positions: the attention pooling with each position as a query
            instead of the mean. Only with `output_dense_embeds=True`.
        hidden_states: Feature maps (B, C_i, h_i, w_i) of the stem and of the four stages, of strides 4, 4, 8, 16 and
            32. Only with `output_hidden_states=True`.
        attentions: Tuple of one tensor, the weights of the attention pooling: (B, heads, 1 + h*w, 1 + h*w) with dense
            embeddings, otherwise (B, heads, 1, 1 + h*w). The first row and column belong to the mean. Only with
            `output_attentions=True`.
    """

    image_embeds: Tensor | None = None
    last_hidden_state: Tensor | None = None
    dense_embeds: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


def channels_last(pixel_values: Tensor) -> Tensor:
    """Convert images (B, 3, H, W) to channels-last memory format on CPU and CUDA, where convolutions are faster."""
    if pixel_values.device.type not in ("cpu", "cuda"):
        return pixel_values
    return pixel_values.contiguous(memory_format=torch.channels_last)


def in_dtype_of(module: nn.Module, pixel_values: Tensor) -> Tensor:
    """Cast floating-point images to the dtype of the first floating-point weights of the module."""
    dtype = next((weight.dtype for weight in module.parameters() if weight.is_floating_point()), pixel_values.dtype)
    return pixel_values.to(dtype) if pixel_values.is_floating_point() else pixel_values


class CLIPResNetConvLayer(nn.Module):
    """Convolution and BatchNorm, followed by a ReLU if `activation` is true."""

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
        """Return whether folding BatchNorm into the convolution saves time and memory in training.

        Folding requires fixed BatchNorm statistics, and plain modules without hooks, because adapters and offloading
        need their modules to be called. It is not used in mixed precision, where the gradients of the BatchNorm
        parameters would be sums of rounded values.
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
        """Convolve with BatchNorm folded into the weights, so that autograd stores one feature map less."""
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
    """Return whether calling the module runs hooks of torch or accelerate."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or hasattr(module, "_hf_hook")
    )


class CLIPResNetStem(nn.Module):
    """Three convolutions and average pooling that map images (B, 3, H, W) to features (B, width, H/4, W/4)."""

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
    """Bottleneck block that downsamples by average pooling in the residual branch and in the shortcut."""

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
        """Return whether the backward pass recomputes the activations of this block.

        False while BatchNorm updates its statistics: the second forward pass would count the batch twice.
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
        return (hidden_states + residual).relu_()  # in place, because nothing else refers to the sum


class CLIPImageEncoder(nn.Module):
    """Base class of CLIP's image encoders, which have the modules `stem` and `stages`."""

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, ...]:
        """Return the feature maps of the stem and of the four stages for images (B, 3, H, W)."""
        hidden_states = (self.stem(channels_last(in_dtype_of(self.stem, pixel_values))),)
        for stage in self.stages:
            hidden_states += (stage(hidden_states[-1]),)
        return hidden_states


class CLIPResNetEncoder(CLIPImageEncoder):
    """Stem and four stages of bottleneck blocks."""

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


class CLIPResNetAttentionPooling(nn.Module):
    """Multi-head attention pooling: the mean feature, or every position, attends to all positions and the mean."""

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
        """Pool a feature map into embeddings.

        Args:
            hidden_states: (B, C, h, w) feature map.
            dense: Whether to also compute the embeddings of all positions.

        Returns:
            The embeddings (B, 1, D), or (B, 1 + h*w, D) if `dense`, of which the first is the image embedding; and the
            attention weights (B, heads, 1 or 1 + h*w, 1 + h*w). The weights are None if the attention implementation
            does not compute them.
        """
        query, key, value = self.project(hidden_states, dense)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        attended, weights = attend(self, query, key, value, None, scaling=query.shape[-1] ** -0.5)
        return self.out_proj(attended.flatten(2)), weights

    def project(self, feature_map: Tensor, dense: bool = False) -> tuple[Tensor, Tensor, Tensor]:
        """Project a feature map (B, C, h, w) to queries, keys and values (B, heads, ., C / heads).

        Keys and values are those of the mean feature and of all positions, 1 + h*w; queries are those of the mean
        feature, or of the same tokens if `dense`.
        """
        height, width = feature_map.shape[-2:]
        tokens = feature_map.flatten(2).transpose(1, 2)  # (B, h*w, C)
        tokens = torch.cat([tokens.mean(dim=1, keepdim=True), tokens], dim=1)
        tokens = tokens + self._positions(height, width)
        return self._project(tokens if dense else tokens[:, :1], tokens)

    def embed_regions(self, feature_map: Tensor, masks: Tensor) -> Tensor:
        """Embed regions by attention of the mean feature of the whole map to the positions inside each mask.

        Args:
            feature_map: (B, C, h, w) last feature map of the tower.
            masks: (B, Q, h, w) boolean masks of the regions.

        Returns:
            (B, Q, D) embeddings, which are not normalized. The embedding of an empty mask is the bias of the output
            projection.
        """
        positions = self._positions(*feature_map.shape[-2:])
        tokens = feature_map.flatten(2).transpose(1, 2)  # (B, h*w, C)
        queries = tokens.mean(dim=1, keepdim=True) + positions[0]
        tokens = tokens + positions[1:]
        query, key, value = self._project(queries, tokens)
        masks = masks.flatten(2)[:, None]  # (B, 1, Q, h*w)
        is_empty = ~masks.any(dim=-1, keepdim=True)  # the softmax of an empty set would be NaN
        query = query.expand(-1, -1, masks.shape[2], -1)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        attended, _ = attend(self, query, key, value, masks | is_empty, scaling=query.shape[-1] ** -0.5)
        return self.out_proj(attended.flatten(2).masked_fill(is_empty[:, 0], 0))

    def _project(self, queries: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Project queries (B, N, C) and tokens (B, T, C) to the queries, keys and values (B, heads, ., C / heads)."""
        pairs = ((self.q_proj, queries), (self.k_proj, tokens), (self.v_proj, tokens))
        query, key, value = (
            projection(states).unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for projection, states in pairs
        )
        return query, key, value

    def _positions(self, height: int, width: int) -> Tensor:
        """Return the position embeddings (1 + h*w, C) of the mean and of a map, interpolated to its size."""
        if (height, width) == (self.grid_size, self.grid_size):
            return self.position_embedding
        mean, grid = self.position_embedding[:1], self.position_embedding[1:]
        grid = grid.T.unflatten(1, (self.grid_size, self.grid_size))[None]  # (1, C, grid, grid)
        grid = F.interpolate(grid, size=(height, width), mode="bilinear", align_corners=False)
        return torch.cat([mean, grid[0].flatten(1).T])


class GKCModelMixin(CodeRegistrationMixin):
    """Mixin of all models of this library: loading of checkpoints and resolution of requested outputs."""

    @classmethod
    def from_pretrained(cls, *args, **kwargs):
        """Load a checkpoint; pickled weights, which can run code, are loaded only with `use_safetensors=False`."""
        return super().from_pretrained(*args, **({"use_safetensors": True} | kwargs))

    @classmethod
    def is_custom_code(cls) -> bool:
        """Return False, because `_init_weights` keeps loaded weights, and transformers need not skip modules."""
        return False

    def resize_token_embeddings(self, *args, **kwargs):
        """Raise a ValueError: the classes are encoded from text, and no token embeddings are added for them."""
        raise ValueError(
            f"{type(self).__name__} has no token embeddings that could be resized: give the words as text, which the "
            "frozen text encoder encodes with CLIP's own tokens."
        )

    def requested_outputs(self, output_hidden_states: bool | None, output_attentions: bool | None) -> dict[str, bool]:
        """Resolve the optional outputs of a forward pass.

        Args:
            output_hidden_states: Whether hidden states are requested; None for the value of the configuration.
            output_attentions: Whether attention weights are requested; None for the value of the configuration.

        Returns:
            The two values as keyword arguments. `output_attentions` is False, with a warning, if the attention
            implementation is SDPA, which does not return weights.
        """
        config = self.config
        output_hidden_states = config.output_hidden_states if output_hidden_states is None else output_hidden_states
        output_attentions = config.output_attentions if output_attentions is None else output_attentions
        if output_attentions and config._attn_implementation == "sdpa":
            output_attentions = False
            if not is_tracing():
                logger.warning_once(
                    "Attention weights are not returned, because the attention implementation 'sdpa' does not compute "
                    "them: call `model.set_attn_implementation('eager')`, or load with `attn_implementation='eager'`."
                )
        return {"output_hidden_states": output_hidden_states, "output_attentions": output_attentions}


class CLIPImageEncoderMixin(GKCModelMixin):
    """Mixin of CLIP's image encoders, whose module `encoder` begins with a stem of stride 4."""

    def get_input_embeddings(self) -> nn.Module:
        """Return the stem, the first module that is applied to the images."""
        return self.encoder.stem

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the stem by a module that maps images (B, 3, H, W) to features (B, C, H/4, W/4)."""
        self.encoder.stem = value


class CLIPBackboneMixin(BackboneMixin):
    """Mixin of CLIP's image encoders as backbones, whose module `encoder` returns the feature maps of all stages."""

    has_attentions = False

    @can_return_tuple
    def forward(
        self, pixel_values: Tensor, output_hidden_states: bool | None = None, output_attentions: bool | None = None
    ) -> BackboneOutput:
        """Compute the feature maps named in `config.out_features`.

        Args:
            pixel_values: (B, 3, H, W) normalized images of at least 32 x 32 pixels.
            output_hidden_states: Whether to also return the feature maps of the stem and of all stages; default: the
                value of the configuration.
            output_attentions: Accepted for compatibility with other backbones and ignored: there is no attention.
        """
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        hidden_states = self.encoder(pixel_values)
        return BackboneOutput(
            feature_maps=tuple(hidden_states[index] for index in self.out_indices),
            hidden_states=hidden_states if output_hidden_states else None,
        )


class CLIPResNetPreTrainedModel(CLIPImageEncoderMixin, PreTrainedModel):
    """Base class of CLIP's ResNet models: weight initialization and loading."""

    config_class = CLIPResNetConfig
    config: CLIPResNetConfig
    base_model_prefix = "clip_resnet"
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    _supports_sdpa = True
    _supports_attention_backend = True
    _no_split_modules = ["CLIPResNetBottleneck", "CLIPResNetStem", "CLIPResNetAttentionPooling"]

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


class CLIPResNetBackbone(CLIPBackboneMixin, CLIPResNetPreTrainedModel):
    """CLIP's ResNet without its attention pooling, as a backbone with feature maps of strides 4, 8, 16 and 32."""

    def __init__(self, config: CLIPResNetConfig):
        super().__init__(config)
        self.num_features = config.hidden_sizes
        self.encoder = CLIPResNetEncoder(config)
        self.post_init()


class CLIPResNetVisionModel(CLIPResNetPreTrainedModel):
    """CLIP's ResNet image model, which embeds images in the image-text space."""

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
        """Embed images.

        Args:
            pixel_values: (B, 3, H, W) images of at least 32 x 32 pixels, normalized with CLIP's mean and standard
                deviation.
            output_dense_embeds: Whether to also return the embeddings of all positions of the last feature map.
            output_hidden_states: Whether to also return the feature maps of the stem and of all stages; default: the
                value of the configuration.
            output_attentions: Whether to also return the weights of the attention pooling; default: the value of the
                configuration. With SDPA there are none, and a warning is logged.
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
