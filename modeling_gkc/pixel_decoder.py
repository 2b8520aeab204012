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
"""Multi-scale deformable pixel decoder of Mask2Former (Cheng et al., CVPR 2022, section 3.3).

From the backbone's feature maps of strides 4, 8, 16 and 32 it computes feature maps of strides 32, 16 and 8 for the
mask decoder, and the mask features of stride 4.

Letters: B images, C hidden size, T positions of all three levels, M heads, R sampling points per head and level.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils import ModelOutput

from .configuration_gkc import GROUP_NORM_GROUPS, NUM_FEATURE_LEVELS, GKCConfig
from .deformable_attention import multi_scale_deformable_attention


@dataclass
class GKCPixelDecoderOutput(ModelOutput):
    """Output of `GKCPixelDecoder`.

    Attributes:
        mask_features: (B, mask_feature_size, H/4, W/4) features; their products with mask embeddings are mask logits.
        multi_scale_features: Feature maps (B, C, h, w) of strides 32, 16 and 8, in this order.
        position_embeddings: Sine position embeddings (h * w, C) of these maps. They are cached and must not be
            modified.
    """

    mask_features: Tensor | None = None
    multi_scale_features: tuple[Tensor, ...] | None = None
    position_embeddings: tuple[Tensor, ...] | None = None


MAX_CACHED_SHAPES = 4


class CachedByShape(nn.Module):
    """Base class of modules without weights that cache their output for each shape, device and dtype.

    The outputs of the last four sets of arguments are cached, because most images of a data set share few sizes.
    Cached tensors must not be modified. The cache belongs to the module: it is freed with the module, it is emptied
    when the module is moved to another device or dtype, and copies and pickles do not contain it. Traced and compiled
    graphs do not use it.

    transformers' `compile_compatible_method_lru_cache` is not used, because its cache belongs to the class, which
    keeps all modules and their outputs alive, and because it stores tensors created in inference mode, which cannot
    be used in training.
    """

    def __init__(self):
        super().__init__()
        self._outputs: dict[tuple, Tensor] = {}

    def compute(self, *arguments) -> Tensor:
        """Compute the output for hashable arguments; subclasses implement this method."""
        raise NotImplementedError

    def forward(self, *arguments) -> Tensor:
        """Return the cached output for the arguments of `compute`, or compute and cache it."""
        if torch.compiler.is_compiling() or torch.jit.is_tracing():
            return self.compute(*arguments)
        output = self._outputs.get(arguments)
        if output is None:
            # Tensors made in inference mode could not be used in training later.
            with torch.inference_mode(False):
                output = self.compute(*arguments)
            if type(output) is Tensor:  # not a subclass such as a fake tensor
                self._outputs[arguments] = output
            while len(self._outputs) > MAX_CACHED_SHAPES:
                self._outputs.pop(next(iter(self._outputs)), None)
        return output

    def _apply(self, *args, **kwargs) -> "CachedByShape":
        self._outputs.clear()  # the device or dtype may change
        return super()._apply(*args, **kwargs)

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_outputs": {}}


def sine_position_embedding(
    height: int, width: int, channels: int, device: torch.device, dtype: torch.dtype
) -> Tensor:
    """Compute two-dimensional sine embeddings of normalized positions (Carion et al., *DETR*, ECCV 2020).

    The first half of the channels encodes y, the second half x; sine and cosine alternate within each half.

    Args:
        height: Height of the feature map.
        width: Width of the feature map.
        channels: Number of channels, a multiple of 4.
        device: Device of the result.
        dtype: Dtype of the result; the computation is in fp32 at least.

    Returns:
        (height * width, channels) embeddings.
    """
    half = channels // 2
    precision = torch.promote_types(dtype, torch.float32)
    exponents = torch.arange(half, device=device, dtype=precision).div(2, rounding_mode="floor") * 2 / half
    wavelengths = 10000.0**exponents
    embeddings = []
    for length in (height, width):
        positions = torch.arange(1, length + 1, device=device, dtype=precision)
        angles = (positions / (length + 1e-6) * 2 * math.pi)[:, None] / wavelengths
        embeddings.append(torch.stack([angles[:, 0::2].sin(), angles[:, 1::2].cos()], dim=-1).flatten(1))
    y_embedding = embeddings[0][:, None].expand(height, width, half)
    x_embedding = embeddings[1][None].expand(height, width, half)
    return torch.cat([y_embedding, x_embedding], dim=-1).flatten(0, 1).to(dtype)


def reference_points(spatial_shapes: list[tuple[int, int]], device: torch.device, dtype: torch.dtype) -> Tensor:
    """Compute the centers (x, y) of all positions of all levels, relative to the sizes of their maps: (T, 2)."""
    points = []
    for height, width in spatial_shapes:
        y = (torch.arange(height, device=device, dtype=dtype) + 0.5) / height
        x = (torch.arange(width, device=device, dtype=dtype) + 0.5) / width
        y, x = torch.meshgrid(y, x, indexing="ij")
        points.append(torch.stack([x, y], dim=-1).flatten(0, 1))
    return torch.cat(points)


class GKCSinePositionEmbedding(CachedByShape):
    """Sine position embeddings (T, C) of the concatenated levels."""

    def __init__(self, config: GKCConfig):
        super().__init__()
        self.channels = config.hidden_size

    def compute(self, spatial_shapes: tuple[tuple[int, int], ...], device: torch.device, dtype: torch.dtype) -> Tensor:
        """Compute the embeddings of feature maps with the given sizes (height, width)."""
        return torch.cat([sine_position_embedding(*shape, self.channels, device, dtype) for shape in spatial_shapes])


class GKCSamplingGrid(CachedByShape):
    """Reference points and cell sizes, repeated for all sampling points of a position.

    All layers compute their sampling locations from them in one pass. Broadcasting over the few sampling points would
    be slow.
    """

    def __init__(self, config: GKCConfig):
        super().__init__()
        self.num_heads, self.num_points = config.num_attention_heads, config.encoder_num_points

    def compute(self, spatial_shapes: tuple[tuple[int, int], ...], device: torch.device, dtype: torch.dtype) -> Tensor:
        """Compute the sampling grid of feature maps with the given sizes (height, width).

        Returns:
            (T + 1, M * levels * R * 2) coordinates relative to the sizes of the maps: one row of reference points for
            each position, and the sizes of the cells in the last row. The columns are ordered as M heads x levels x R
            points x (x, y).
        """
        points = reference_points(list(spatial_shapes), device, dtype)
        # One tensor per number, because a strict torch.export loses tensors that are created from lists.
        lengths = [length for height, width in spatial_shapes for length in (width, height)]
        cells = 1 / torch.cat([torch.full((1,), length, device=device, dtype=dtype) for length in lengths])
        cells = cells.unflatten(0, (-1, 2))
        cells = cells[None, :, None].expand(self.num_heads, -1, self.num_points, -1).flatten()
        return torch.cat([points.repeat(1, len(cells) // 2), cells[None]])


def _softmax(logits: Tensor) -> Tensor:
    """Compute the softmax of a short last axis in fp32 at least, on CPUs in a third of the time of `torch.softmax`."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if logits.device.type != "cpu":
        return logits.softmax(-1)
    shares = (logits - logits.detach().amax(-1, keepdim=True)).exp()
    return shares / shares.sum(-1, keepdim=True)


class GKCDeformableAttention(nn.Module):
    """Multi-scale deformable self-attention (Zhu et al., *Deformable DETR*, ICLR 2021)."""

    def __init__(self, config: GKCConfig):
        super().__init__()
        self.num_heads = config.num_attention_heads
        self.num_points = config.encoder_num_points
        self.config = config
        width = config.hidden_size
        samples = self.num_heads * NUM_FEATURE_LEVELS * self.num_points
        self.sampling_offsets = nn.Linear(width, samples * 2)
        self.attention_weights = nn.Linear(width, samples)
        self.value_proj = nn.Linear(width, width)
        self.output_proj = nn.Linear(width, width)

    def forward(
        self, hidden_states: Tensor, positions: Tensor, grid: Tensor, spatial_shapes: list[tuple[int, int]]
    ) -> Tensor:
        """Attend to sampled locations of all levels.

        Args:
            hidden_states: (B, T, C) features of the concatenated levels.
            positions: (T, C) position embeddings.
            grid: Sampling grid of `GKCSamplingGrid`.
            spatial_shapes: Size (height, width) of each level.

        Returns:
            (B, T, C) attended features.
        """
        queries = hidden_states + positions
        value = self.value_proj(hidden_states).unflatten(-1, (self.num_heads, -1))
        offsets = self.sampling_offsets(queries)  # in cells of the sampled level
        locations = torch.addcmul(grid[:-1], offsets.to(grid.dtype), grid[-1:])
        locations = locations.unflatten(-1, (self.num_heads, NUM_FEATURE_LEVELS, self.num_points, 2))
        weights = _softmax(self.attention_weights(queries).unflatten(-1, (self.num_heads, -1)))
        weights = weights.unflatten(-1, (NUM_FEATURE_LEVELS, self.num_points))
        kernel = self.config.deformable_attention
        return self.output_proj(multi_scale_deformable_attention(value, spatial_shapes, locations, weights, kernel))


class GKCPixelDecoderLayer(GradientCheckpointingLayer):
    """Deformable self-attention and feed-forward network, each followed by layer normalization."""

    def __init__(self, config: GKCConfig):
        super().__init__()
        width = config.hidden_size
        self.self_attn = GKCDeformableAttention(config)
        self.self_attn_layer_norm = nn.LayerNorm(width)
        self.fc1 = nn.Linear(width, config.encoder_ffn_dim)
        self.fc2 = nn.Linear(config.encoder_ffn_dim, width)
        self.final_layer_norm = nn.LayerNorm(width)
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self, hidden_states: Tensor, positions: Tensor, grid: Tensor, spatial_shapes: list[tuple[int, int]]
    ) -> Tensor:
        """Update the features (B, T, C); arguments as in `GKCDeformableAttention.forward`."""
        attended = self.self_attn(hidden_states, positions, grid, spatial_shapes)
        hidden_states = self.self_attn_layer_norm(hidden_states + self.dropout(attended))
        transformed = self.fc2(self.dropout(F.relu(self.fc1(hidden_states))))
        return self.final_layer_norm(hidden_states + self.dropout(transformed))


def _normalized_convolution(in_channels: int, out_channels: int, kernel_size: int, bias: bool) -> nn.Sequential:
    """Return a convolution followed by group normalization."""
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, kernel_size, padding=kernel_size // 2, bias=bias),
        nn.GroupNorm(GROUP_NORM_GROUPS, out_channels),
    )


class GKCPixelDecoder(nn.Module):
    """Deformable attention layers over the levels of strides 32, 16 and 8, and a feature pyramid step to stride 4.

    Args:
        config: The segmenter's configuration.
        backbone_channels: Numbers of channels of the backbone's maps of strides 4, 8, 16 and 32.
    """

    def __init__(self, config: GKCConfig, backbone_channels: list[int]):
        super().__init__()
        width = config.hidden_size
        self.input_projections = nn.ModuleList(
            _normalized_convolution(channels, width, 1, bias=True) for channels in backbone_channels[:0:-1]
        )
        self.position_embedding = GKCSinePositionEmbedding(config)
        self.sampling_grid = GKCSamplingGrid(config)
        self.level_embedding = nn.Parameter(torch.empty(NUM_FEATURE_LEVELS, width))
        self.layers = nn.ModuleList(GKCPixelDecoderLayer(config) for _ in range(config.encoder_layers))
        self.lateral_projection = _normalized_convolution(backbone_channels[0], width, 1, bias=False)
        self.output_projection = _normalized_convolution(width, width, 3, bias=False)
        self.mask_projection = nn.Conv2d(width, config.mask_feature_size, 1)

    def forward(self, feature_maps: tuple[Tensor, ...]) -> GKCPixelDecoderOutput:
        """Decode the backbone's feature maps (B, C_i, h_i, w_i) of strides 4, 8, 16 and 32."""
        finest, *coarser = feature_maps
        levels = [project(level) for project, level in zip(self.input_projections, coarser[::-1], strict=True)]
        spatial_shapes = [tuple(level.shape[-2:]) for level in levels]
        lengths = [height * width for height, width in spatial_shapes]
        hidden_states = torch.cat([level.flatten(2).transpose(1, 2) for level in levels], dim=1)  # (B, T, C)
        device, dtype = hidden_states.device, hidden_states.dtype
        sines = self.position_embedding(tuple(spatial_shapes), device, dtype).split(lengths)
        positions = torch.cat(
            [sine + level for sine, level in zip(sines, self.level_embedding, strict=True)]
        )  # (T, C)
        # In fp32 at least: in bf16, locations on a map of 100 x 168 would be wrong by up to one cell.
        grid = self.sampling_grid(tuple(spatial_shapes), device, torch.promote_types(dtype, torch.float32))
        for layer in self.layers:
            hidden_states = layer(hidden_states, positions, grid, spatial_shapes)
        # Permute after unflattening: in the other order, interpolate does not detect channels-last in a batch of one.
        levels = tuple(
            level.unflatten(1, shape).permute(0, 3, 1, 2)
            for level, shape in zip(hidden_states.split(lengths, dim=1), spatial_shapes, strict=True)
        )
        return GKCPixelDecoderOutput(
            mask_features=self._merge(finest, levels[-1]), multi_scale_features=levels, position_embeddings=sines
        )

    def _merge(self, finest: Tensor, coarser: Tensor) -> Tensor:
        """Add the upsampled stride-8 map to the stride-4 map, and compute the mask features of the sum."""
        lateral = self.lateral_projection(finest)
        merged = lateral + F.interpolate(coarser, size=lateral.shape[-2:], mode="bilinear", align_corners=False)
        return self.mask_projection(F.relu(self.output_projection(merged)))


__all__ = ["GKCPixelDecoder", "GKCPixelDecoderOutput", "reference_points", "sine_position_embedding"]
