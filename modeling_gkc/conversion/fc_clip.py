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
"""FC-CLIP (Yu et al., *Convolutions Die Hard*, NeurIPS 2023) as open-vocabulary segmenter."""

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor
from transformers import CLIPTextModelWithProjection, PreTrainedTokenizerBase

from ..configuration_gkc import NUM_FEATURE_LEVELS, GKCConfig
from ..image_processing_gkc import GKCImageProcessor
from ..modeling_clip_convnext import CLIPConvNextVisionModel
from ..modeling_clip_resnet import CLIPResNetVisionModel
from ..modeling_gkc import GKCForOpenVocabSegmentation
from ..processing_gkc import GKCProcessor
from ..vocabulary import Vocabulary, VocabularyLike
from ..weight_renaming import Renaming, check_weight_shapes, load_strictly, rename_weight, split_packed_projection
from .clip import check_tokenizer, clip_convnext_from_open_clip, clip_resnet_from_openai, clip_text_from_openai

ImageTower = CLIPResNetVisionModel | CLIPConvNextVisionModel

# FC-CLIP puts "a" before every name, whatever its sound.
CONVERSION_TEMPLATES = "fc_clip"
TRAINING_NAMES = "coco_panoptic_133"
CLIP_PREFIX = "backbone.clip_model."
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
# The weights do not tell the heads of the decoders' attention; all published models have these.
NUM_ATTENTION_HEADS = 8

_PIXEL_DECODER = r"^sem_seg_head\.pixel_decoder\."
_PREDICTOR = r"^sem_seg_head\.predictor\."
_ENCODER_LAYER = _PIXEL_DECODER + r"transformer\.encoder\.layers\.(\d+)\."
_NORMALIZED_CONVOLUTIONS = {"adapter_1": "lateral_projection", "layer_1": "output_projection"}
_NAMES: tuple[Renaming, ...] = (
    (_PIXEL_DECODER + r"input_proj\.", "model.pixel_decoder.input_projections."),
    (_PIXEL_DECODER + r"transformer\.level_embed$", "model.pixel_decoder.level_embedding"),
    (_ENCODER_LAYER + r"self_attn\.", r"model.pixel_decoder.layers.\1.self_attn."),
    (_ENCODER_LAYER + r"norm1\.", r"model.pixel_decoder.layers.\1.self_attn_layer_norm."),
    (_ENCODER_LAYER + r"norm2\.", r"model.pixel_decoder.layers.\1.final_layer_norm."),
    (_ENCODER_LAYER + r"linear([12])\.", r"model.pixel_decoder.layers.\1.fc\2."),
    (_PIXEL_DECODER + r"mask_features\.", "model.pixel_decoder.mask_projection."),
    (
        _PIXEL_DECODER + r"(adapter_1|layer_1)\.(norm\.)?",
        lambda m: f"model.pixel_decoder.{_NORMALIZED_CONVOLUTIONS[m[1]]}.{1 if m[2] else 0}.",
    ),
    (_PREDICTOR + r"logit_scale$", "classifier.logit_scale"),
    (
        _PREDICTOR + r"transformer_(self|cross)_attention_layers\.(\d+)\.(?:self|multihead)_attn\.",
        r"model.mask_decoder.layers.\2.\1_attn.",
    ),
    (
        _PREDICTOR + r"transformer_(self|cross)_attention_layers\.(\d+)\.norm\.",
        r"model.mask_decoder.layers.\2.\1_attn_layer_norm.",
    ),
    (_PREDICTOR + r"transformer_ffn_layers\.(\d+)\.linear([12])\.", r"model.mask_decoder.layers.\1.fc\2."),
    (_PREDICTOR + r"transformer_ffn_layers\.(\d+)\.norm\.", r"model.mask_decoder.layers.\1.final_layer_norm."),
    (_PREDICTOR + r"decoder_norm\.", "model.mask_decoder.layer_norm."),
    (_PREDICTOR + r"query_feat\.", "model.mask_decoder.query_features."),
    (_PREDICTOR + r"query_embed\.", "model.mask_decoder.query_positions."),
    (_PREDICTOR + r"level_embed\.", "model.mask_decoder.level_embedding."),
    (_PREDICTOR + r"mask_embed\.layers\.", "model.mask_decoder.mask_embedder.layers."),
    (_PREDICTOR + r"_mask_pooling_proj\.", "classifier.pooled_projection."),
    (_PREDICTOR + r"class_embed\.layers\.", "classifier.layers."),
    (r"^void_embedding\.weight$", "classifier.no_object_embedding"),
)
_IMAGE_TOWER_NAMES: tuple[Renaming, ...] = (
    (r"^encoder\.", "model.backbone.encoder."),
    (r"^(attention_pooling|head)\.", "model.region_head."),
)
# Start of the names of weights that only methods built on FC-CLIP have.
_OTHER_METHODS = {"mask_adapter.": "Mask-Adapter", "cdt.": "MAFT+"}
# Of training only.
_NOT_CONVERTED = re.compile(r"^criterion\.")


def from_fc_clip(
    state_dict: Mapping[str, Tensor],
    image_tower: ImageTower,
    text_model: CLIPTextModelWithProjection,
    tokenizer: PreTrainedTokenizerBase | None = None,
    training_names: VocabularyLike = TRAINING_NAMES,
    ensemble: str = "none",
) -> GKCForOpenVocabSegmentation:
    """Build the segmenter that computes what an FC-CLIP checkpoint computes.

    FC-CLIP's published numbers need `ensemble="geometric"`. A patent application (US 2025/0045929) describes the
    geometric ensembling of such features, so it is never chosen for you: see `GKCConfig.ensemble`.

    Args:
        state_dict: Weights of the checkpoint, by their published names; those of CLIP in it are left out.
        image_tower: The CLIP image encoder that the checkpoint was trained on, see `clip_towers`.
        text_model: Its text encoder.
        tokenizer: Tokenizer of the text encoder. With it the training classes are stored as the checkpoint's
            vocabulary and as its seen classes; without it there are none.
        training_names: Names of the training classes, in any form that `Vocabulary.parse` takes, such as FC-CLIP's
            list of names `coco_panoptic_with_prompt_eng.txt`; the packaged COCO names have other synonyms.
        ensemble: `none`, `average` or `geometric`, see `GKCConfig`; it can be changed when the result is loaded.

    Returns:
        The model in evaluation mode, fp32.

    Raises:
        ValueError: If the weights are not those of FC-CLIP, naming missing and unexpected ones and those of wrong
            shapes, or if the towers do not fit them.
    """
    weights = {
        name: weight
        for name, weight in state_dict.items()
        if not name.startswith(CLIP_PREFIX) and not _NOT_CONVERTED.match(name)
    }
    vocabulary = None
    if tokenizer is not None:
        vocabulary = Vocabulary.parse(training_names)
        check_tokenizer(tokenizer, text_model.config)
    settings = {"ensemble": ensemble, "source_vocabulary": vocabulary and vocabulary.names}
    model = GKCForOpenVocabSegmentation(_gkc_config(weights, image_tower, text_model, **settings))
    # A checkpoint may lack CLIP's temperature, 100 in all published models, and holds no embeddings of seen names.
    scale = state_dict.get(f"{CLIP_PREFIX}logit_scale", model.classifier.clip_logit_scale)
    buffers = {"classifier.seen_embeds": model.classifier.seen_embeds, "classifier.clip_logit_scale": scale.float()}
    load_strictly(model, _renamed_weights(weights, image_tower, text_model) | buffers)
    if vocabulary is not None:
        model.set_vocabulary(vocabulary, fc_clip_processor(tokenizer))
        model.classifier.seen_embeds.copy_(model.vocabulary_embeds)
    return model.eval()


def clip_towers(state_dict: Mapping[str, Tensor]) -> tuple[ImageTower, CLIPTextModelWithProjection]:
    """Build the image encoder, ResNet or ConvNeXt, and the text encoder of a CLIP model.

    Args:
        state_dict: Weights under OpenAI's or OpenCLIP's names, or those of a whole FC-CLIP checkpoint that holds them.

    Raises:
        ValueError: If there are no such towers in the weights.
    """
    weights = clip_weights(state_dict) or state_dict
    if any(name.startswith("visual.trunk.") for name in weights):
        return clip_convnext_from_open_clip(weights), clip_text_from_openai(weights, hidden_act="gelu")
    return clip_resnet_from_openai(weights), clip_text_from_openai(weights)


def clip_weights(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Select the CLIP weights of an FC-CLIP checkpoint, by OpenCLIP's names; there are none in that of ConvNeXt-L."""
    return {
        name.removeprefix(CLIP_PREFIX): weight for name, weight in state_dict.items() if name.startswith(CLIP_PREFIX)
    }


def fc_clip_processor(tokenizer: PreTrainedTokenizerBase) -> GKCProcessor:
    """Build the processor that prepares images and names as FC-CLIP does for its evaluation on COCO and ADE20K."""
    image_processor = GKCImageProcessor(
        size={"shortest_edge": 800, "longest_edge": 1333},
        image_mean=CLIP_MEAN,
        image_std=CLIP_STD,
        size_divisor=32,
        mask_resampling="two_step",
    )
    return GKCProcessor(image_processor, tokenizer, CONVERSION_TEMPLATES)


def _gkc_config(
    weights: Mapping[str, Tensor], image_tower: ImageTower, text_model: CLIPTextModelWithProjection, **settings: Any
) -> GKCConfig:
    """Read the configuration off the shapes of the weights, and complete it by fields that have no weights."""
    for prefix, method in _OTHER_METHODS.items():
        if any(name.startswith(prefix) for name in weights):
            raise ValueError(
                f"These are weights of {method}, which needs modules that this library does not have: convert a "
                "checkpoint of FC-CLIP itself."
            )
    pixel_decoder, predictor = "sem_seg_head.pixel_decoder.", "sem_seg_head.predictor."
    layer = f"{pixel_decoder}transformer.encoder.layers.0."
    check_weight_shapes(
        weights,
        {
            f"{predictor}query_feat.weight": 2,
            f"{pixel_decoder}mask_features.weight": 4,
            f"{layer}linear1.weight": 2,
            f"{layer}self_attn.sampling_offsets.bias": 1,
            f"{predictor}transformer_ffn_layers.0.linear1.weight": 2,
            f"{predictor}_mask_pooling_proj.1.weight": 2,
            "void_embedding.weight": 2,
        },
        "These are not the weights of FC-CLIP",
        "Its README links the published checkpoints.",
    )
    projection_dim = weights["void_embedding.weight"].shape[1]
    for tower, option in ((image_tower, "image"), (text_model, "text")):
        if tower.config.projection_dim != projection_dim:
            raise ValueError(
                f"The checkpoint was trained on a CLIP of width {projection_dim}, but the {option} encoder has "
                f"{tower.config.projection_dim}: give the weights of the CLIP model that belongs to it."
            )
    num_queries, hidden_size = weights[f"{predictor}query_feat.weight"].shape
    num_samples = len(weights[f"{layer}self_attn.sampling_offsets.bias"]) // 2
    return GKCConfig(
        backbone_config=image_tower.config,
        text_config=text_model.config,
        hidden_size=hidden_size,
        mask_feature_size=len(weights[f"{pixel_decoder}mask_features.weight"]),
        encoder_layers=_count(weights, rf"{_PIXEL_DECODER}transformer\.encoder\.layers\.(\d+)\."),
        encoder_ffn_dim=len(weights[f"{layer}linear1.weight"]),
        encoder_num_points=num_samples // (NUM_ATTENTION_HEADS * NUM_FEATURE_LEVELS),
        decoder_layers=_count(weights, rf"{_PREDICTOR}transformer_ffn_layers\.(\d+)\."),
        decoder_ffn_dim=len(weights[f"{predictor}transformer_ffn_layers.0.linear1.weight"]),
        num_attention_heads=NUM_ATTENTION_HEADS,
        num_queries=num_queries,
        classifier="fc_clip",
        class_feature="query+mask_features",
        prompt_reduction="max",
        ensemble_on_valid_mask=isinstance(image_tower, CLIPResNetVisionModel),
        **settings,
    )


def _count(weights: Mapping[str, Tensor], pattern: str) -> int:
    return len({match[1] for match in map(re.compile(pattern).match, weights) if match})


def _renamed_weights(
    weights: Mapping[str, Tensor], image_tower: ImageTower, text_model: CLIPTextModelWithProjection
) -> dict[str, Tensor]:
    renamed = {f"text_model.{name}": weight for name, weight in text_model.state_dict().items()}
    for name, weight in image_tower.state_dict().items():
        renamed[rename_weight(name, _IMAGE_TOWER_NAMES)] = weight
    for name, weight in weights.items():
        weight = weight[0] if name == "void_embedding.weight" else weight
        renamed |= split_packed_projection(rename_weight(name, _NAMES) or name, weight.float())
    return renamed


__all__ = [
    "CLIP_PREFIX",
    "CONVERSION_TEMPLATES",
    "TRAINING_NAMES",
    "clip_towers",
    "clip_weights",
    "fc_clip_processor",
    "from_fc_clip",
]
