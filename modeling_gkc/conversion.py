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
"""Weights in: OpenAI's CLIP ResNets and transformers' Mask2Former."""

import re
from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from transformers import CLIPTextModelWithProjection, Mask2FormerForUniversalSegmentation, PreTrainedTokenizerBase

from .configuration_gkc import CLIPResNetConfig, GKCConfig
from .image_processing_gkc import GKCImageProcessor
from .modeling_clip_resnet import CLIPResNetVisionModel
from .modeling_gkc import GKCForOpenVocabSegmentation
from .processing_gkc import GKCProcessor

Renaming = tuple[str, str | Callable[[re.Match], str]]

_CONVOLUTION_PARTS = {"conv": "convolution", "bn": "normalization"}
_BLOCK_PARTS = {"1": "reduce", "2": "spatial", "3": "expand"}
_SHORTCUT_PARTS = {"0": "convolution", "1": "normalization"}

_CLIP_RESNET_NAMES: tuple[Renaming, ...] = (
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

_MASK2FORMER_NAMES: tuple[Renaming, ...] = (
    (r"^pixel_level_module\.encoder\.", "backbone."),
    (r"^pixel_level_module\.decoder\.encoder\.layers\.", "pixel_decoder.layers."),
    (r"^pixel_level_module\.decoder\.level_embed$", "pixel_decoder.level_embedding"),
    (r"^pixel_level_module\.decoder\.adapter_1\.", "pixel_decoder.lateral_projection."),
    (r"^pixel_level_module\.decoder\.layer_1\.", "pixel_decoder.output_projection."),
    (r"^pixel_level_module\.decoder\.", "pixel_decoder."),
    (r"^transformer_module\.queries_embedder\.", "mask_decoder.query_positions."),
    (r"^transformer_module\.queries_features\.", "mask_decoder.query_features."),
    (r"^transformer_module\.level_embed\.", "mask_decoder.level_embedding."),
    (r"^transformer_module\.decoder\.layernorm\.", "mask_decoder.layer_norm."),
    (
        r"^transformer_module\.decoder\.mask_predictor\.mask_embedder\.(\d)\.0\.",
        r"mask_decoder.mask_embedder.layers.\1.",
    ),
    (r"^transformer_module\.decoder\.layers\.", "mask_decoder.layers."),
)


def _rename(name: str, renamings: tuple[Renaming, ...]) -> str | None:
    """The new name by the first rule that applies, None if none does."""
    for pattern, replacement in renamings:
        renamed, count = re.subn(pattern, replacement, name)
        if count:
            return renamed
    return None


def clip_resnet_from_openai(state_dict: Mapping[str, Tensor]) -> CLIPResNetVisionModel:
    """Builds CLIP's ResNet image tower from OpenAI's weights; its size is read off their shapes.

    Args:
        state_dict: Weights of a whole OpenAI CLIP model (image tower under `visual.`), or of the image tower alone.

    Returns:
        The image model in evaluation mode, fp32.

    Raises:
        ValueError: if the weights are not those of a ResNet tower, naming missing and unexpected ones.
    """
    prefix = "visual." if any(name.startswith("visual.") for name in state_dict) else ""
    weights = {name[len(prefix) :]: weight for name, weight in state_dict.items() if name.startswith(prefix)}
    if "attnpool.positional_embedding" not in weights:
        raise ValueError(
            "These are no weights of a CLIP ResNet: `attnpool.positional_embedding` is missing. CLIP's vision "
            "transformers load with transformers' CLIPVisionModelWithProjection."
        )
    renamed = {_rename(name, _CLIP_RESNET_NAMES) or name: weight.float() for name, weight in weights.items()}
    model = CLIPResNetVisionModel(_clip_resnet_config(weights))
    _load_strictly(model, renamed)
    return model.eval()


def _clip_resnet_config(weights: Mapping[str, Tensor]) -> CLIPResNetConfig:
    blocks = {
        tuple(map(int, match.groups())) for match in map(re.compile(r"layer(\d)\.(\d+)\.").match, weights) if match
    }
    positions, hidden_size = weights["attnpool.positional_embedding"].shape
    return CLIPResNetConfig(
        width=hidden_size // 32,
        depths=[sum(stage == index for stage, _ in blocks) for index in range(1, 5)],
        # The weights do not tell the number of heads. CLIP's towers have heads of 64 channels and at least 32 of them;
        # the released GKC code keeps the 32 at smaller widths too.
        num_attention_heads=max(32, hidden_size // 64),
        image_size=32 * round((positions - 1) ** 0.5),
        projection_dim=weights["attnpool.c_proj.weight"].shape[0],
    )


def _load_strictly(model: torch.nn.Module, weights: Mapping[str, Tensor]) -> None:
    missing, unexpected = model.load_state_dict(weights, strict=False)
    missing = [name for name in missing if not name.endswith("num_batches_tracked")]
    if missing or unexpected:
        raise ValueError(f"Weights do not fit {type(model).__name__}: missing {missing}, unexpected {unexpected}.")


def from_mask2former(
    mask2former_model: Mask2FormerForUniversalSegmentation,
    text_model: CLIPTextModelWithProjection,
    tokenizer: PreTrainedTokenizerBase | None = None,
    class_names: list[str] | None = None,
) -> GKCForOpenVocabSegmentation:
    """Builds a segmenter that predicts the masks of a transformers Mask2Former.

    The masks are the source's; the source's fixed classifier has no counterpart, so the embeddings that are compared
    with words start untrained: train them before asking for words.

    Args:
        mask2former_model: The source.
        text_model: CLIP text tower of the words.
        tokenizer: Tokenizer of the text tower; needed with `class_names`.
        class_names: Words to store as the checkpoint's vocabulary.

    Raises:
        ValueError: if the source uses an option that the segmenter does not have.
    """
    config = mask2former_model.config
    if config.pre_norm or config.enforce_input_projection:
        raise ValueError("Mask2Former models with `pre_norm` or `enforce_input_projection` cannot be converted.")
    if (class_names is None) != (tokenizer is None):
        raise ValueError("`tokenizer` and `class_names` must be given together.")
    model = GKCForOpenVocabSegmentation(_gkc_config(config, text_model.config))
    _load_strictly(model.model, _mask2former_weights(mask2former_model.model.state_dict()))
    model.text_model.load_state_dict(text_model.state_dict())
    if class_names is not None:
        model.set_vocabulary(class_names, GKCProcessor(GKCImageProcessor(), tokenizer))
    return model.train(mask2former_model.training)


def _gkc_config(config, text_config) -> GKCConfig:
    return GKCConfig(
        backbone_config=config.backbone_config,
        text_config=text_config,
        hidden_size=config.hidden_dim,
        mask_feature_size=config.mask_feature_size,
        encoder_layers=config.encoder_layers,
        encoder_ffn_dim=config.encoder_feedforward_dim,
        decoder_layers=config.decoder_layers - 1,
        decoder_ffn_dim=config.dim_feedforward,
        num_attention_heads=config.num_attention_heads,
        num_queries=config.num_queries,
        dropout=config.dropout,
        no_object_weight=config.no_object_weight,
        class_weight=config.class_weight,
        mask_weight=config.mask_weight,
        dice_weight=config.dice_weight,
        train_num_points=config.train_num_points,
        oversample_ratio=config.oversample_ratio,
        importance_sample_ratio=config.importance_sample_ratio,
    )


def _mask2former_weights(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Renames Mask2Former's weights and splits the packed projections of its cross-attention."""
    weights = {}
    for name, weight in state_dict.items():
        renamed = _rename(name, _MASK2FORMER_NAMES)
        if renamed is None:
            raise ValueError(f"Mask2Former weight {name!r} has no counterpart here.")
        packed = re.match(r"(.*cross_attn\.)in_proj_(weight|bias)$", renamed)
        if packed is None:
            weights[renamed] = weight
            continue
        for part, piece in zip("qkv", weight.chunk(3), strict=True):
            weights[f"{packed[1]}{part}_proj.{packed[2]}"] = piece
    return weights


__all__ = ["clip_resnet_from_openai", "from_mask2former"]
