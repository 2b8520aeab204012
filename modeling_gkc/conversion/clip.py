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
"""Conversion of CLIP weights of OpenAI and OpenCLIP: ResNet and ConvNeXt image encoders, text encoder."""

import os
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, PreTrainedConfig

from ..configuration_gkc import CLIPConvNextConfig, CLIPResNetConfig
from ..modeling_clip_convnext import CLIPConvNextVisionModel
from ..modeling_clip_resnet import CLIPResNetVisionModel
from ..weight_renaming import Renaming, check_weight_shapes, load_strictly, rename_weight, split_packed_projection
from .torchscript_archive import is_torchscript_archive, read_torchscript_weights

_CONVOLUTION_PARTS = {"conv": "convolution", "bn": "normalization"}
_BLOCK_PARTS = {"1": "reduce", "2": "spatial", "3": "expand"}
_SHORTCUT_PARTS = {"0": "convolution", "1": "normalization"}

_IMAGE_NAMES: tuple[Renaming, ...] = (
    (r"^(conv|bn)([123])\.", lambda m: f"encoder.stem.layers.{int(m[2]) - 1}.{_CONVOLUTION_PARTS[m[1]]}."),
    (
        r"^layer(\d)\.(\d+)\.downsample\.([01])\.",
        lambda m: f"encoder.stages.{int(m[1]) - 1}.{m[2]}.shortcut.{_SHORTCUT_PARTS[m[3]]}.",
    ),
    (
        r"^layer(\d)\.(\d+)\.(conv|bn)([123])\.",
        lambda m: f"encoder.stages.{int(m[1]) - 1}.{m[2]}.{_BLOCK_PARTS[m[4]]}.{_CONVOLUTION_PARTS[m[3]]}.",
    ),
    (r"^attnpool\.positional_embedding$", "attention_pooling.position_embedding"),
    (r"^attnpool\.([qkv])_proj\.", r"attention_pooling.\1_proj."),
    (r"^attnpool\.c_proj\.", "attention_pooling.out_proj."),
)

_BLOCK_OF_CONVNEXT = r"^trunk\.stages\.(\d)\.blocks\.(\d+)\."
_CONVNEXT_NAMES: tuple[Renaming, ...] = (
    (r"^trunk\.stem\.0\.", "encoder.stem.patch_embeddings."),
    (r"^trunk\.stem\.1\.", "encoder.stem.layernorm."),
    (r"^trunk\.stages\.(\d)\.downsample\.", r"encoder.stages.\1.downsampling_layer."),
    (_BLOCK_OF_CONVNEXT + r"gamma$", r"encoder.stages.\1.layers.\2.layer_scale_parameter"),
    (_BLOCK_OF_CONVNEXT + r"conv_dw\.", r"encoder.stages.\1.layers.\2.dwconv."),
    (_BLOCK_OF_CONVNEXT + r"norm\.", r"encoder.stages.\1.layers.\2.layernorm."),
    (_BLOCK_OF_CONVNEXT + r"mlp\.fc([12])\.", r"encoder.stages.\1.layers.\2.pwconv\3."),
    (r"^trunk\.head\.norm\.", "head.layer_norm."),
    (r"^head\.proj\.", "head.projection."),
    (r"^head\.mlp\.fc([12])\.", lambda m: f"head.projection.{2 * int(m[1]) - 2}."),
)

_TEXT_NAMES: tuple[Renaming, ...] = (
    (r"^token_embedding\.", "text_model.embeddings.token_embedding."),
    (r"^positional_embedding$", "text_model.embeddings.position_embedding.weight"),
    (r"^transformer\.resblocks\.(\d+)\.attn\.", r"text_model.encoder.layers.\1.self_attn."),
    (r"^transformer\.resblocks\.(\d+)\.ln_([12])\.", r"text_model.encoder.layers.\1.layer_norm\2."),
    (r"^transformer\.resblocks\.(\d+)\.mlp\.c_fc\.", r"text_model.encoder.layers.\1.mlp.fc1."),
    (r"^transformer\.resblocks\.(\d+)\.mlp\.c_proj\.", r"text_model.encoder.layers.\1.mlp.fc2."),
    (r"^ln_final\.", "text_model.final_layer_norm."),
    (r"^text_projection$", "text_projection.weight"),
)
# Entries of a complete model outside of the text encoder: image encoder, logit scale, sizes, and derived masks.
_NOT_TEXT = re.compile(r"^visual\.|^(logit_scale|input_resolution|context_length|vocab_size)$|attn_mask$")
_CHANNELS_PER_HEAD = 64


def clip_resnet_from_openai(
    state_dict: Mapping[str, Tensor], num_attention_heads: int | None = None
) -> CLIPResNetVisionModel:
    """Convert the weights of OpenAI's CLIP ResNet to an image model; its size is inferred from their shapes.

    Args:
        state_dict: Weights of a complete OpenAI CLIP model (image encoder under `visual.`), or of its image encoder.
        num_attention_heads: Number of heads of the attention pooling, which cannot be inferred from the weights.
            Default: that of the published towers, one head per 64 channels and at least 32.

    Returns:
        The image model in evaluation mode, in fp32.

    Raises:
        ValueError: If the weights are not those of a ResNet tower; the message names missing and unexpected weights
            and those of wrong shapes.
    """
    weights = _image_weights(state_dict)
    check_weight_shapes(
        weights,
        {"attnpool.positional_embedding": 2, "attnpool.c_proj.weight": 2},
        "These are not the weights of a CLIP ResNet",
        "Load CLIP's vision transformers with transformers' CLIPVisionModelWithProjection.",
    )
    renamed = {rename_weight(name, _IMAGE_NAMES) or name: weight.float() for name, weight in weights.items()}
    model = CLIPResNetVisionModel(_image_config(weights, num_attention_heads))
    load_strictly(model, renamed)
    return model.eval()


def _image_weights(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Select the weights of the image encoder and remove their prefix."""
    prefix = "visual." if any(name.startswith("visual.") for name in state_dict) else ""
    return {name[len(prefix) :]: weight for name, weight in state_dict.items() if name.startswith(prefix)}


def _image_config(weights: Mapping[str, Tensor], num_attention_heads: int | None) -> CLIPResNetConfig:
    blocks = {
        tuple(map(int, match.groups())) for match in map(re.compile(r"layer(\d)\.(\d+)\.").match, weights) if match
    }
    positions, hidden_size = weights["attnpool.positional_embedding"].shape
    return CLIPResNetConfig(
        width=max(1, hidden_size // 32),
        depths=[sum(stage == index for stage, _ in blocks) for index in range(1, 5)],
        # The number of heads cannot be inferred from the weights. CLIP's towers have heads of 64 channels and at least
        # 32 of them; the released GKC code keeps the 32 at smaller widths too.
        num_attention_heads=num_attention_heads or max(32, hidden_size // _CHANNELS_PER_HEAD),
        image_size=32 * round((positions - 1) ** 0.5),
        projection_dim=weights["attnpool.c_proj.weight"].shape[0],
    )


def clip_convnext_from_open_clip(state_dict: Mapping[str, Tensor]) -> CLIPConvNextVisionModel:
    """Convert the weights of OpenCLIP's ConvNeXt to an image model; its size is inferred from their shapes.

    Args:
        state_dict: Weights of a complete OpenCLIP model such as `convnext_large_d_320` (image encoder under
            `visual.`), or of its image encoder.

    Returns:
        The image model in evaluation mode, in fp32.

    Raises:
        ValueError: If the weights are not those of a ConvNeXt tower; the message names missing and unexpected weights
            and those of wrong shapes.
    """
    weights = _image_weights(state_dict)
    projection = "head.mlp.fc2.weight" if "head.mlp.fc2.weight" in weights else "head.proj.weight"
    check_weight_shapes(
        weights,
        {f"trunk.stages.{stage}.blocks.0.conv_dw.bias": 1 for stage in range(4)} | {projection: 2},
        "These are not the weights of a CLIP ConvNeXt",
        "Use OpenCLIP's file `open_clip_model.safetensors`.",
    )
    blocks = {tuple(map(int, match.groups())) for match in map(re.compile(_BLOCK_OF_CONVNEXT).match, weights) if match}
    config = CLIPConvNextConfig(
        hidden_sizes=[len(weights[f"trunk.stages.{stage}.blocks.0.conv_dw.bias"]) for stage in range(4)],
        depths=[sum(stage == index for stage, _ in blocks) for index in range(4)],
        projection_dim=len(weights[projection]),
        projection_hidden_dim=weights[projection].shape[1] if projection == "head.mlp.fc2.weight" else None,
    )
    model = CLIPConvNextVisionModel(config)
    load_strictly(
        model, {rename_weight(name, _CONVNEXT_NAMES) or name: weight.float() for name, weight in weights.items()}
    )
    return model.eval()


def clip_text_from_openai(
    state_dict: Mapping[str, Tensor], hidden_act: str = "quick_gelu", num_attention_heads: int | None = None
) -> CLIPTextModelWithProjection:
    """Convert the weights of CLIP of OpenAI or OpenCLIP to a text model; its size is inferred from their shapes.

    All of OpenAI's CLIP models share one tokenizer, which transformers loads with any of them.

    Args:
        state_dict: Weights of a complete CLIP model with OpenAI's names, which OpenCLIP uses too.
        hidden_act: Activation, which cannot be inferred from the weights: `quick_gelu` for OpenAI's models, `gelu` for
            most of OpenCLIP's.
        num_attention_heads: Number of heads, which cannot be inferred from the weights. Default: one per 64 channels.

    Returns:
        The text model in evaluation mode, in fp32.

    Raises:
        ValueError: If the weights are not those of a complete CLIP model; the message names missing and unexpected
            weights and those of wrong shapes.
    """
    weights = {name: weight for name, weight in state_dict.items() if not _NOT_TEXT.search(name)}
    check_weight_shapes(
        weights,
        {"text_projection": 2, "token_embedding.weight": 2, "positional_embedding": 2},
        "These weights contain no text encoder",
        "Use one of OpenAI's published archives, which contain both towers.",
    )
    model = CLIPTextModelWithProjection(_text_config(weights, hidden_act, num_attention_heads))
    renamed = {}
    for name, weight in weights.items():
        weight = weight.T if name == "text_projection" else weight
        renamed |= split_packed_projection(rename_weight(name, _TEXT_NAMES) or name, weight.float())
    load_strictly(model, renamed)
    return model.eval()


def _text_config(weights: Mapping[str, Tensor], hidden_act: str, num_attention_heads: int | None) -> CLIPTextConfig:
    hidden_size, projection_dim = weights["text_projection"].shape
    vocab_size = len(weights["token_embedding.weight"])
    layers = {match[1] for match in map(re.compile(r"transformer\.resblocks\.(\d+)\.").match, weights) if match}
    first_linear = weights.get("transformer.resblocks.0.mlp.c_fc.bias")
    return CLIPTextConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=len(first_linear) if first_linear is not None and first_linear.ndim else 4 * hidden_size,
        num_hidden_layers=len(layers),
        # As in the image encoder, heads have 64 channels.
        num_attention_heads=num_attention_heads or max(1, hidden_size // _CHANNELS_PER_HEAD),
        max_position_embeddings=len(weights["positional_embedding"]),
        projection_dim=projection_dim,
        hidden_act=hidden_act,
        # The last two tokens are start and end; CLIP's tokenizer pads with the end.
        bos_token_id=vocab_size - 2,
        eos_token_id=vocab_size - 1,
        pad_token_id=vocab_size - 1,
    )


def check_tokenizer(tokenizer: Any, text_config: PreTrainedConfig) -> None:
    """Raise a ValueError if a tokenizer has more tokens than a text encoder has embeddings."""
    if len(tokenizer) > text_config.vocab_size:
        raise ValueError(
            f"The tokenizer has {len(tokenizer)} tokens, but the text encoder has {text_config.vocab_size}: use "
            "the tokenizer of the text encoder."
        )


def read_weights(path: str | os.PathLike, allow_jit: bool = False) -> dict[str, Tensor]:
    """Read a file of weights without running code from it.

    Args:
        path: A TorchScript archive, the format of OpenAI's published files; a dict of tensors written by `torch.save`,
            also under the key "state_dict" or "model"; or a safetensors file.
        allow_jit: Whether to open a TorchScript archive with `torch.jit.load`, which runs code of the archive. Use it
            only for trusted files that cannot be read otherwise.

    Returns:
        The weights by name.

    Raises:
        FileNotFoundError: If the file does not exist.
        ValueError: If the file has none of these formats, or can only be read by running its code; the message names
            the file.

    Warns:
        UserWarning: If code of the archive was run.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"The file {path} does not exist.")
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except SafetensorError as error:
            raise ValueError(f"{path}: cannot be read as safetensors: {error}.") from error
    if not is_torchscript_archive(path):
        return _read_pickled_weights(path)
    if not allow_jit:
        return read_torchscript_weights(path)
    warnings.warn(f"{path} was opened by torch.jit.load, which runs code of the file.", UserWarning, stacklevel=2)
    try:
        return dict(torch.jit.load(path, map_location="cpu").state_dict())
    except Exception as error:  # the archive's code can raise errors of any type
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise ValueError(f"{path}: torch.jit.load cannot open it: {reason}") from error


def _read_pickled_weights(path: Path) -> dict[str, Tensor]:
    try:
        loaded: Any = torch.load(path, map_location="cpu", weights_only=True)
    except PermissionError:
        raise
    except Exception as error:  # a damaged or hostile pickle can raise errors of any type
        raise ValueError(
            f"{path}: contains more than weights, or is damaged, and was not read. Save the `state_dict()` of your "
            "own model as safetensors; download OpenAI's files again."
        ) from error
    for key in ("state_dict", "model"):  # of training frameworks; detectron2 writes the latter
        if isinstance(loaded, dict) and isinstance(loaded.get(key), dict):
            loaded = loaded[key]
    if not isinstance(loaded, dict) or not all(isinstance(name, str) for name in loaded):
        raise ValueError(f"{path}: must contain a dict of weights by name, got {type(loaded).__name__}.")
    return {name: value for name, value in loaded.items() if isinstance(value, Tensor)}


__all__ = [
    "check_tokenizer",
    "clip_convnext_from_open_clip",
    "clip_resnet_from_openai",
    "clip_text_from_openai",
    "read_weights",
]
