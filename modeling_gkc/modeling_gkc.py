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
"""The segmenter: image path (`GKCModel`) and open-vocabulary classification (`GKCForOpenVocabSegmentation`).

Letters: B images, Q queries, C hidden, D text-embedding width, K classes, P prompts (P >= K: synonyms, templates),
S decoder stages = decoder_layers + 1, N segments of an image, (H, W) padded input size.
"""

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    AutoBackbone,
    AutoModel,
    AutoModelForImageSegmentation,
    AutoModelForInstanceSegmentation,
    AutoModelForSemanticSegmentation,
    AutoModelForUniversalSegmentation,
    CLIPTextModelWithProjection,
)
from transformers import initialization as init
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.modeling_utils import PreTrainedModel
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_BACKBONE_MAPPING,
    MODEL_FOR_UNIVERSAL_SEGMENTATION_MAPPING_NAMES,
)
from transformers.utils import ModelOutput
from transformers.utils.generic import can_return_tuple
from transformers.utils.import_utils import is_tracing

from .argument_checks import check_whole_number
from .class_embedder import GKCClassEmbedder, GKCConvexClassEmbedder
from .class_embeddings import (
    GKCClassEmbeddings,
    TextEmbeddingCache,
    average_class_embeds,
    average_templates,
    check_class_embeds,
    check_prompts,
    count_classes,
    has_adapters,
    reduce_prompt_logits,
    weights_state,
)
from .configuration_gkc import BACKBONE_STRIDES, PROMPT_REDUCTIONS, GKCConfig
from .encoded_vocabulary import EncodedVocabulary
from .inference import (
    check_optimization,
    compile_image_path,
    fold_batch_norms,
    run_or_uncompile,
    warm_up,
    work_in_place,
)
from .loss_gkc import GKCCriterion, MaskParts, Matches
from .mask_decoder import GKCMaskDecoder, GKCMaskDecoderStage, pool_under_masks, predict_masks
from .modeling_clip_resnet import GKCModelMixin, channels_last, in_dtype_of
from .padding import check_pixel_values, extend_masks, hide_padding, only_of_one_size, pad_to_stride, round_up
from .pixel_decoder import GKCDeformableAttention, GKCPixelDecoder
from .vocabulary import Vocabulary, VocabularyLike

MAX_TEMPERATURE = 100.0
PROMPTS_PER_PASS = 256


@dataclass
class GKCModelOutput(ModelOutput):
    """Output of the image path.

    Attributes:
        last_hidden_state: (B, Q, C) normalised queries of the last stage.
        masks_queries_logits: (B, Q, H/4, W/4) mask logits of the last stage.
        pooled_features: (B, Q, F) backbone features pooled under the last stage's masks; only if
            `config.class_feature` asks for them.
        mask_is_empty: (B, Q) whether the last stage's mask holds no pixel; only with `pooled_features`.
        mask_embeds: (B, Q, mask_feature_size) embeddings of the last stage; in training only, as the next.
        mask_features: (B, mask_feature_size, H/4, W/4), whose products with `mask_embeds` are the mask logits.
        stages: for each of the S stages the same values but the last, if asked for.
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
    mask_embeds: Tensor | None = None
    mask_features: Tensor | None = None
    stages: tuple["GKCModelOutput", ...] | None = None
    encoder_hidden_states: tuple[Tensor, ...] | None = None
    pixel_decoder_hidden_states: tuple[Tensor, ...] | None = None
    transformer_decoder_hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None
    cross_attentions: tuple[Tensor, ...] | None = None


@dataclass
class GKCStageOutput(ModelOutput):
    """Predictions of one decoder stage, for losses.

    Attributes:
        class_queries_logits: (B, Q, K + 1) class logits, the last column no-object.
        masks_queries_logits: (B, Q, H/4, W/4) mask logits.
        query_embeds: (B, Q, D) L2-normalised embeddings that are classified.
        query_features: (B, Q, C) normalised queries.
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
        query_embeds: (B, Q, D) L2-normalised embeddings of the queries in the text space.
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


class GKCWords(NamedTuple):
    """A checked vocabulary: prompts (P, D), their classes (P,) or None if each is its own, and the reduction to K."""

    embeds: Tensor
    class_ids: Tensor | None
    num_classes: int
    reduction: str


class GKCPreTrainedModel(GKCModelMixin, PreTrainedModel):
    """Weight initialisation and loading."""

    config_class = GKCConfig
    config: GKCConfig
    base_model_prefix = "model"
    main_input_name = "pixel_values"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_attention_backend = True
    _no_split_modules = ["GKCPixelDecoder", "GKCMaskDecoder", "CLIPEncoderLayer"]

    def set_attn_implementation(self, attn_implementation: str | dict, *args, **kwargs) -> None:
        """Sets how attention is computed, as in transformers; a backbone that has no SDPA keeps what it has."""
        asked, has_text_model = attn_implementation, hasattr(self, "text_model")
        if isinstance(asked, str):
            parts = {"backbone_config": self.base_model.backbone}
            if has_text_model:
                parts["text_config"] = self.text_model
            able = [name for name, part in parts.items() if part._supports_sdpa or asked != "sdpa"]
            attn_implementation = {"": asked} | dict.fromkeys(able, asked)
        super().set_attn_implementation(attn_implementation, *args, **kwargs)
        if isinstance(asked, str) and not has_text_model:
            self.config.text_config._attn_implementation = asked

    def enable_input_require_grads(self) -> None:
        """Lets gradients start at the images, which adapters need in re-entrant checkpointing, for any backbone."""
        self._require_grads_hook = self.base_model.backbone.register_forward_pre_hook(_require_gradients)
        self._require_grads_hooks = [self._require_grads_hook]

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        if isinstance(module, GKCDeformableAttention):
            _init_deformable_attention(module)
        elif isinstance(module, GKCPixelDecoder):
            init.normal_(module.level_embedding)
        elif isinstance(module, GKCMaskDecoder):
            for embedding in (module.query_features, module.query_positions, module.level_embedding):
                init.normal_(embedding.weight)
        elif isinstance(module, GKCForOpenVocabSegmentation):
            if module.no_object_embedding is not None:
                init.normal_(module.no_object_embedding)
            init.constant_(module.logit_scale, self.config.logit_scale_init_value)
            if module.vocabulary_embeds is not None:
                init.zeros_(module.vocabulary_embeds)
                init.zeros_(module.vocabulary_class_ids)
        elif isinstance(module, GKCConvexClassEmbedder):
            for buffer in module.buffers(recurse=False):
                init.zeros_(buffer)
            init.ones_(module.typical_distance)
        elif isinstance(module, (nn.Linear, nn.Conv2d)):
            init.xavier_uniform_(module.weight)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif not isinstance(module, nn.Embedding):
            super()._init_weights(module)


def _require_gradients(module: nn.Module, args: tuple) -> tuple:
    return args[0].detach().requires_grad_(True), *args[1:]


def _init_deformable_attention(module: GKCDeformableAttention) -> None:
    """Offsets start as rings: each head looks into its own direction, its points one cell further each."""
    angles = torch.arange(module.num_heads) * (2 * math.pi / module.num_heads)
    directions = torch.stack([angles.cos(), angles.sin()], dim=-1)
    directions = directions / directions.abs().amax(dim=-1, keepdim=True)
    steps = torch.arange(1, module.num_points + 1)
    num_levels = module.sampling_offsets.out_features // (module.num_heads * module.num_points * 2)
    offsets = torch.einsum("md,r->mrd", directions, steps)[:, None].expand(-1, num_levels, -1, -1)
    init.zeros_(module.sampling_offsets.weight)
    init.copy_(module.sampling_offsets.bias, offsets.flatten())
    init.zeros_(module.attention_weights.weight)
    init.zeros_(module.attention_weights.bias)


class GKCModel(GKCPreTrainedModel):
    """The image path: backbone -> pixel decoder -> mask decoder; segments without names."""

    def __init__(self, config: GKCConfig):
        super().__init__(config)
        self.backbone = _make_backbone(config.backbone_config)
        self.pixel_decoder = GKCPixelDecoder(config, self.backbone.channels)
        self.mask_decoder = GKCMaskDecoder(config)
        self.post_init()
        self.train(self.training)

    @property
    def num_channels(self) -> int:
        """Number of channels of the images that the backbone takes."""
        return getattr(self.backbone.config, "num_channels", 3)

    @property
    def num_pooled_features(self) -> int:
        """Width F of the features that are pooled under a mask: the backbone's strides 8, 16 and 32."""
        return sum(self.backbone.channels[1:])

    def train(self, mode: bool = True) -> "GKCModel":
        """Sets training mode; BatchNorm of a backbone with frozen statistics stays in evaluation mode."""
        super().train(mode)
        if self.config.freeze_backbone_batch_norm:
            for module in self.backbone.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module.eval()
        return self

    def get_input_embeddings(self) -> nn.Module:
        """What first turns pixels into features: the backbone's."""
        return self.backbone.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replaces the backbone's input embeddings."""
        self.backbone.set_input_embeddings(value)

    @can_return_tuple
    def forward(
        self,
        pixel_values: Tensor,
        output_stages: bool | None = None,
        pixel_mask: Tensor | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        original_sizes: Tensor | None = None,
    ) -> GKCModelOutput:
        """Segments images.

        Args:
            pixel_values: (B, 3, H, W) normalised images, cast to the dtype of the weights.
            output_stages: Give all S stages, not only the last; default: in training.
            pixel_mask: Accepted for the common call `model(**inputs)`; all of the input is looked at.
            output_hidden_states: Give what backbone and decoders compute; default: as configured.
            output_attentions: Give the mask decoder's attention weights; default: as configured. SDPA has none, as a
                warning says.
            original_sizes: Accepted for the common call `model(**inputs)`; they are for post-processing.

        Raises:
            ValueError: if the backbone's maps have other strides than 4, 8, 16 and 32.
        """
        requested = self.requested_outputs(output_hidden_states, output_attentions)
        check_pixel_values(pixel_values, self.num_channels)
        pixel_values = in_dtype_of(self.backbone, pixel_values)
        feature_maps = self.backbone(channels_last(pixel_values), return_dict=True).feature_maps
        _check_strides(pixel_values.shape, feature_maps)
        decoded = self.pixel_decoder(feature_maps)
        levels = decoded.multi_scale_features
        resized = [
            F.interpolate(decoded.mask_features, size=level.shape[-2:], mode="bilinear", align_corners=False)
            for level in levels
        ]
        stages = self.mask_decoder(levels, resized, requested["output_attentions"])
        output_stages = self.training if output_stages is None else output_stages
        outputs = tuple(
            self._stage_output(stage, decoded.mask_features, resized[-1], feature_maps)
            for stage in (stages if output_stages else stages[-1:])
        )
        output = GKCModelOutput(**outputs[-1], stages=outputs if output_stages else None)
        if self.training:
            output.mask_features = decoded.mask_features
        if requested["output_hidden_states"]:
            output.encoder_hidden_states = tuple(feature_maps)
            output.pixel_decoder_hidden_states = tuple(levels)
            output.transformer_decoder_hidden_states = tuple(stage.queries for stage in stages)
        if requested["output_attentions"]:
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
        pooled = is_empty = None
        if self.config.class_feature != "query":
            masks = predict_masks(stage.mask_embeds, finest_mask_features).detach()
            pooled, is_empty = pool_under_masks(masks, feature_maps[1:])
        return GKCModelOutput(
            last_hidden_state=stage.query_features,
            masks_queries_logits=predict_masks(stage.mask_embeds, mask_features),
            pooled_features=pooled,
            mask_is_empty=is_empty,
            mask_embeds=stage.mask_embeds if self.training else None,
        )


def _make_backbone(config: PreTrainedConfig) -> PreTrainedModel:
    """The backbone; the attention implementation asked of the whole model is asked of it only if it has that one."""
    supported = getattr(MODEL_FOR_BACKBONE_MAPPING.get(type(config), None), "_supports_sdpa", True)
    if config._attn_implementation == "sdpa" and not supported:
        config._attn_implementation = None
    try:
        return AutoBackbone.from_config(config, trust_remote_code=False)
    except IndexError as error:
        if config.model_type != "timm_backbone":
            raise
        raise ValueError(
            f"timm's {config.backbone!r} does not have the levels that `out_indices` asks for, {config.out_indices}: "
            "set `out_indices` of the `backbone_config` to its last four levels, [-4, -3, -2, -1]."
        ) from error


def _check_strides(image_shape: torch.Size, feature_maps: Sequence[Tensor]) -> None:
    """Refuses a backbone whose maps are not of strides 4, 8, 16, 32; sizes may be rounded either way."""
    for stride, feature_map in zip(BACKBONE_STRIDES, feature_maps, strict=True):
        sides = zip(feature_map.shape[2:], image_shape[2:], strict=True)
        if any(abs(cells * stride - side) >= stride for cells, side in sides):
            sizes = [tuple(other.shape[2:]) for other in feature_maps]
            raise ValueError(
                f"The backbone must give maps of strides 4, 8, 16 and 32, but images of {tuple(image_shape[2:])} give "
                f"maps of {sizes}: use a hierarchical backbone and its four stages as `out_features`."
            )


class GKCForOpenVocabSegmentation(GKCPreTrainedModel):
    r"""Image path, frozen CLIP text tower, and the cosine classifier between queries and words.

    Give adapters (PEFT's LoRA) a pattern, such as `target_modules=r".*\.mask_decoder\..*\.(q_proj|v_proj)"`: bare
    names would also match projections of the text tower, whose adapters never learn, since it runs without gradients.
    """

    def __init__(self, config: GKCConfig):
        super().__init__(config)
        text = config.text_config
        # 2 stands for the largest token in OpenAI's first conversions. The configuration alone may still be changed.
        check_whole_number("text_config.eos_token_id", text.eos_token_id, 0, max(text.vocab_size - 1, 2))
        self.model = GKCModel(config)
        self.is_convex = config.classifier == "convex_combination"
        if self.is_convex:
            self.class_embedder = GKCConvexClassEmbedder(config)
        else:
            self.class_embedder = GKCClassEmbedder(config, self.model.num_pooled_features)
        self.text_model = CLIPTextModelWithProjection._from_config(config.text_config)
        self.text_model.requires_grad_(False)
        no_object_embedding = None if self.is_convex else nn.Parameter(torch.empty(config.projection_dim))
        self.register_parameter("no_object_embedding", no_object_embedding)
        self.logit_scale = nn.Parameter(torch.tensor(float(config.logit_scale_init_value)))
        stored = config.vocabulary_num_prompts
        self.register_buffer("vocabulary_embeds", torch.zeros(stored, config.projection_dim) if stored else None)
        self.register_buffer("vocabulary_class_ids", torch.zeros(stored, dtype=torch.long) if stored else None)
        self.criterion = GKCCriterion(config)
        self.text_cache = TextEmbeddingCache()
        self.is_optimized = False
        self.post_init()
        self.train(self.training)

    @classmethod
    def from_pretrained(cls, *args, **kwargs):
        """Loads a checkpoint as every transformers model; the text tower comes back frozen."""
        loaded = super().from_pretrained(*args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        model.text_model.requires_grad_(False)
        return loaded

    def train(self, mode: bool = True) -> "GKCForOpenVocabSegmentation":
        """Sets training mode; the frozen text tower stays in evaluation mode."""
        if mode:
            self.refuse_if_optimized("train it")
        super().train(mode)
        self.text_model.eval()
        return self

    def optimize_for_inference(
        self,
        dtype: torch.dtype | None = None,
        compile: bool = True,
        sizes: Sequence[tuple[int, int]] = (),
        batch_size: int = 1,
    ) -> "GKCForOpenVocabSegmentation":
        """Makes the model faster, in place and for good: afterwards it can neither be trained nor saved.

        BatchNorm goes into the convolutions, what serves only the losses of earlier stages goes away, and the image
        path is compiled, which takes a minute or two for each size of images and number of them; a model that sees
        many sizes is better left uncompiled. Results are the same to 1e-4 in fp32.

        Args:
            dtype: What to compute in, such as `torch.bfloat16`; by default what the weights are. Images are cast.
            compile: Compile with torch.compile, on CUDA with CUDA graphs. Without a C++ compiler a warning says so.
            sizes: (height, width) of images to compile for now rather than at their first call.
            batch_size: How many images of a size come together.

        Returns:
            The model itself.

        Example:
            `model.optimize_for_inference(torch.bfloat16, sizes=[(512, 512)])`
        """
        self.refuse_if_optimized("optimise it otherwise")
        sizes = check_optimization(dtype, sizes, batch_size)
        self.eval().requires_grad_(False)
        fold_batch_norms(self.model.backbone)
        work_in_place(self.model.backbone)
        if not self.is_convex:
            self.class_embedder.stage_projections = self.class_embedder.stage_projections[-1:]
        if dtype is not None:
            self.to(dtype)
        self.is_optimized = True
        if compile:
            compile_image_path(self.model)
        requested = {"output_hidden_states": False, "output_attentions": False}
        warm_up(lambda blank: self._segment(blank, None, False, requested), sizes, batch_size, self.device)
        return self

    def save_pretrained(self, *args, **kwargs):
        """Saves the model as every transformers model; refused once it was optimised for inference."""
        self.refuse_if_optimized("save it")
        return super().save_pretrained(*args, **kwargs)

    def refuse_if_optimized(self, purpose: str) -> None:
        """Raises a ValueError if the model was optimised for inference and can no longer serve the purpose."""
        if self.is_optimized:
            raise ValueError(
                "The model was optimised for inference, which cannot be undone: load the checkpoint again to "
                f"{purpose}."
            )

    @can_return_tuple
    def get_text_features(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, **kwargs
    ) -> BaseModelOutputWithPooling:
        """Output of the text tower for tokenised prompts (P, L), as CLIP's method of this name gives it.

        `pooler_output` (P, D) are the projected embeddings, not normalised; `embed_prompts` gives those that are
        compared with queries. Hidden states and attentions come on request, as `CLIPTextModelWithProjection` has them.
        """
        output = self.text_model(input_ids=input_ids, attention_mask=attention_mask, return_dict=True, **kwargs)
        return BaseModelOutputWithPooling(
            last_hidden_state=output.last_hidden_state,
            pooler_output=output.text_embeds,
            hidden_states=output.hidden_states,
            attentions=output.attentions,
        )

    def embed_prompts(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """(P, D) L2-normalised embeddings of tokenised prompts (P, L); the text tower is frozen.

        Prompts that were asked for before come from `self.text_cache`, whichever vocabulary they stood in. A compiled
        or exported graph always encodes them, all in one pass.
        """
        if is_tracing(input_ids):
            with torch.no_grad():
                return self._encode_pass(input_ids, attention_mask)
        # Tensors made in inference mode could not be used in training later; those that are kept must be plain ones.
        with torch.inference_mode(False), torch.no_grad():
            state = None if has_adapters(self.text_model) else self._text_state(input_ids.device.type)
            if state is None:
                return self._encode_prompts(input_ids, attention_mask)
            return self.text_cache.embed(input_ids, attention_mask, self._encode_prompts, state)

    def _encode_prompts(self, input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
        masks = [None] * len(input_ids) if attention_mask is None else attention_mask.split(PROMPTS_PER_PASS)
        passes = zip(input_ids.split(PROMPTS_PER_PASS), masks, strict=False)
        return torch.cat([self._encode_pass(ids, mask) for ids, mask in passes])

    def _encode_pass(self, input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
        return F.normalize(self.get_text_features(input_ids, attention_mask, return_dict=True).pooler_output, dim=-1)

    def _text_state(self, device: str) -> tuple | None:
        """Return the state that text embeddings depend on beside the prompt: weights, device, type and autocast.

        None if the weights cannot be looked at.
        """
        weights = weights_state(self.text_model)
        if weights is None:
            return None
        return torch.is_autocast_enabled(device), torch.get_autocast_dtype(device), weights

    def get_class_embeddings(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        class_ids: Tensor | None = None,
        name_ids: Tensor | None = None,
        names_per_class: Tensor | None = None,
        prompts_per_name: Tensor | None = None,
    ) -> GKCClassEmbeddings:
        """Encodes a vocabulary once, for many calls of `forward`.

        Args:
            input_ids, attention_mask: (P, L) tokenised prompts.
            class_ids: (P,) class of each prompt; default: each name its own class.
            name_ids: (P,) name of each prompt, 0..N-1, whose prompts (templates) are averaged; default: each prompt is
                a name of its own.
            names_per_class, prompts_per_name: (K,) and (N,) how many there are, as GKCProcessor counts them; needed in
                compiled and exported graphs only.

        Raises:
            ValueError: if ids do not fit each other, or leave a class or a name out.
        """
        check_prompts(input_ids, attention_mask)
        with torch.inference_mode(False), torch.no_grad():  # as for `embed_prompts`
            embeds = self.embed_prompts(input_ids, attention_mask)
            if name_ids is not None:
                embeds, class_ids = average_templates(embeds, class_ids, name_ids, prompts_per_name)
            if class_ids is None:
                class_ids = torch.arange(len(embeds), device=embeds.device)
                names_per_class = torch.ones_like(class_ids)
            else:
                num_classes = count_classes(class_ids, len(embeds), counts=names_per_class)
                class_ids = class_ids.clone()
                if names_per_class is None:
                    names_per_class = class_ids.bincount(minlength=num_classes)
        return GKCClassEmbeddings(class_embeds=embeds, class_ids=class_ids, names_per_class=names_per_class)

    def set_vocabulary(self, vocabulary: VocabularyLike, processor) -> None:
        """Stores a vocabulary with the checkpoint; `config.id2label` follows.

        Args:
            vocabulary: Words in any form `GKCProcessor` takes: list, nested list of synonyms, "dog; sofa, couch", the
                name of a packaged vocabulary ("ade20k_150"), a file, or `Vocabulary`.
            processor: `GKCProcessor` of this checkpoint.

        Raises:
            ValueError: labels that `Vocabulary` refuses, or classes that the text encoder cannot tell apart.
        """
        vocabulary = Vocabulary.parse(vocabulary)
        encoded = EncodedVocabulary.encode(vocabulary, self, processor, distinct=True)
        # A configuration of its own, so that no other model made from the same one claims these words.
        self.config = copy.deepcopy(self.config)
        self.vocabulary_embeds = encoded.class_embeds
        self.vocabulary_class_ids = encoded.class_ids
        self.config.vocabulary = [list(names) for names in vocabulary.names]
        self.config.vocabulary_is_thing = vocabulary.is_thing and list(vocabulary.is_thing)
        self.config.vocabulary_colors = vocabulary.colors and [color and list(color) for color in vocabulary.colors]
        self.config.vocabulary_templates = vocabulary.templates and list(vocabulary.templates)
        self.config.vocabulary_num_prompts = len(encoded.class_ids)
        self.config.id2label = {index: names[0] for index, names in enumerate(vocabulary.names)}
        self.config.label2id = {name: index for index, name in self.config.id2label.items()}

    @property
    def vocabulary(self) -> Vocabulary | None:
        """The words stored in the checkpoint, None if there are none."""
        config = self.config
        if config.vocabulary is None:
            return None
        fields = (config.vocabulary_is_thing, config.vocabulary_colors, config.vocabulary_templates)
        return Vocabulary.from_stored(config.vocabulary, *fields)

    @property
    def temperature(self) -> Tensor:
        """Factor of the cosines, clamped at 100 as in CLIP."""
        return self.logit_scale.exp().clamp(max=MAX_TEMPERATURE)

    def class_logits(self, query_embeds: Tensor, class_embeds: Tensor) -> Tensor:
        """(B, Q, P + 1) logits of normalised queries (B, Q, D) for normalised prompts (P, D) and for no-object.

        They are computed in fp32 at least: a temperature up to 100 would show the rounding of half precision.
        """
        if self.is_convex:
            return self._name(query_embeds, GKCWords(class_embeds, None, len(class_embeds), "max"))
        dtype = torch.promote_types(query_embeds.dtype, torch.float32)
        with torch.autocast(query_embeds.device.type, enabled=False):
            no_object = F.normalize(self.no_object_embedding.to(query_embeds.device, dtype), dim=-1)
            targets = torch.cat([class_embeds.to(no_object), no_object[None]])
            return self.temperature.to(no_object) * query_embeds.to(dtype) @ targets.T

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
        """Segments images into words.

        The words come as `input_ids` or as `class_embeds`, not both; with neither, the vocabulary stored in the
        checkpoint is used.

        Args:
            pixel_values: (B, 3, H, W) normalised images, cast to the dtype of the weights; padded here to multiples
                of 32 where they are not.
            pixel_mask: (B, H, W), 1 where there is image, 0 in padding to the right and below. In evaluation mode
                images of different padded size are computed apart, so that no result depends on its neighbours; a
                compiled or exported model takes images of one padded size at a time.
            input_ids, attention_mask: (P, L) tokenised prompts.
            class_ids: (P,) class of each prompt; default: each its own class.
            name_ids: (P,) name of each prompt of `input_ids`; the prompts of a name (templates) are averaged.
            class_embeds: (P, D) cached prompt embeddings of `get_class_embeddings`.
            mask_labels: For each image (N, H, W) masks of 0 and 1, of the size of `pixel_values`, as a list or
                stacked; gives the loss together with `class_labels`.
            class_labels: For each image (N,) classes.
            prompt_reduction: `mean`, `max` or `embedding_mean`; default: `config.prompt_reduction`.
            output_stages: Give all decoder stages; default: in training and with labels.
            output_hidden_states, output_attentions: As in `GKCModel`. In evaluation mode only for images of one padded
                size, which the states then have.
            names_per_class, prompts_per_name: As in `get_class_embeddings`, which returns the former with
                `class_embeds`; needed in compiled and exported graphs only.
            original_sizes: Accepted for the common call `model(**inputs)`; they are for post-processing.

        Raises:
            ValueError: if both or none of the forms of text are there, labels do not fit, or the states asked for do
                not exist.
        """
        if (mask_labels is None) != (class_labels is None):
            raise ValueError("`mask_labels` and `class_labels` must be given together.")
        has_labels = mask_labels is not None
        counts = names_per_class, prompts_per_name
        words = self._words(input_ids, attention_mask, class_ids, name_ids, class_embeds, prompt_reduction, *counts)
        check_pixel_values(pixel_values, self.model.num_channels)
        pixel_values, content_sizes, mask_labels = pad_to_stride(pixel_values, pixel_mask, mask_labels)
        wants_stages = has_labels or (self.training if output_stages is None else output_stages)
        requested = self.requested_outputs(output_hidden_states, output_attentions)
        sizes_differ = None if pixel_mask is None else content_sizes
        segments = self._segment(pixel_values, sizes_differ, wants_stages, requested)

        stages = None
        if wants_stages:
            stages = tuple(self._classify(stage, index, words) for index, stage in enumerate(segments.stages))
        last = stages[-1] if wants_stages else self._classify(segments, -1, words)
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
            **{name: states for name, states in segments.items() if name.endswith(("hidden_states", "attentions"))},
        )

    def classify(
        self,
        query_embeds: Tensor,
        class_embeds: Tensor,
        class_ids: Tensor | None = None,
        prompt_reduction: str | None = None,
        names_per_class: Tensor | None = None,
    ) -> Tensor:
        """Names segments that are already there by other words, without looking at the image again.

        Args:
            query_embeds: (B, Q, D) of an earlier output; they also tell how much of no-object is in a query.
            class_embeds, class_ids, prompt_reduction, names_per_class: As in `forward`.

        Returns:
            (B, Q, K + 1) class logits, the last column no-object.
        """
        words = self._words(None, None, class_ids, None, class_embeds, prompt_reduction, names_per_class)
        return self._name(query_embeds, words)

    def _words(
        self,
        input_ids: Tensor | None,
        attention_mask: Tensor | None,
        class_ids: Tensor | None,
        name_ids: Tensor | None,
        class_embeds: Tensor | None,
        prompt_reduction: str | None,
        names_per_class: Tensor | None = None,
        prompts_per_name: Tensor | None = None,
    ) -> GKCWords:
        """The vocabulary that is asked for, checked once."""
        reduction = prompt_reduction or self.config.prompt_reduction
        if reduction not in PROMPT_REDUCTIONS:
            raise ValueError(f"`prompt_reduction` must be one of {', '.join(PROMPT_REDUCTIONS)}, got {reduction!r}.")
        if input_ids is not None and class_embeds is not None:
            raise ValueError("Give the words as `input_ids` or as `class_embeds`, not both.")
        if input_ids is not None:
            class_embeds, class_ids, names_per_class = self.get_class_embeddings(
                input_ids, attention_mask, class_ids, name_ids, names_per_class, prompts_per_name
            ).to_tuple()
        elif name_ids is not None or attention_mask is not None:
            raise ValueError("`attention_mask` and `name_ids` need `input_ids` beside them.")
        embeds, class_ids, num_classes = self._prompts(class_ids, class_embeds, names_per_class)
        if class_ids is not None and reduction == "embedding_mean":
            embeds, class_ids = average_class_embeds(embeds, class_ids, num_classes), None
        return GKCWords(embeds, class_ids, num_classes, reduction)

    def _prompts(
        self, class_ids: Tensor | None, class_embeds: Tensor | None, names_per_class: Tensor | None
    ) -> tuple[Tensor, Tensor | None, int]:
        """Prompt embeddings (P, D), their classes (P,) or None if each is its own, and the number of classes."""
        if class_embeds is None:
            if class_ids is not None:
                raise ValueError("`class_ids` need `input_ids` or `class_embeds` beside them.")
            return self._stored_prompts()
        check_class_embeds(class_embeds, self.config.projection_dim)
        if class_ids is None:
            return class_embeds, None, len(class_embeds)
        num_classes = count_classes(class_ids, len(class_embeds), counts=names_per_class)
        if num_classes == len(class_embeds):  # one name each, in the order of the classes or another
            return class_embeds[class_ids.argsort()], None, num_classes
        return class_embeds, class_ids, num_classes

    def _stored_prompts(self) -> tuple[Tensor, Tensor | None, int]:
        if self.vocabulary_embeds is None:
            raise ValueError(
                "No words to segment into: give `input_ids` or `class_embeds` (GKCProcessor(text=...) makes them), "
                "or store a vocabulary with `model.set_vocabulary(...)`."
            )
        num_classes = len(self.config.vocabulary)
        is_identity = num_classes == self.config.vocabulary_num_prompts
        return self.vocabulary_embeds, None if is_identity else self.vocabulary_class_ids, num_classes

    def _segment(
        self, pixel_values: Tensor, content_sizes: Tensor | None, output_stages: bool, requested: dict[str, bool]
    ) -> GKCModelOutput:
        """Runs the image path once per padded size, so that no image sees padding made for its neighbours.

        `content_sizes` are (B, 2), or None where all images have one padded size. In training the padding is looked
        at, as in Mask2Former: the losses see all of it.
        """
        segment = partial(self.model, output_stages=output_stages, return_dict=True, **requested)
        if self.is_optimized:
            if output_stages:
                self.refuse_if_optimized("get all its stages")
            segment = partial(self._segment_optimized, **requested)
        if content_sizes is None or self.training:
            return segment(pixel_values)
        if is_tracing(pixel_values):
            return segment(only_of_one_size(pixel_values, content_sizes))
        groups: dict[tuple[int, int], list[int]] = {}
        for index, (height, width) in enumerate(content_sizes.tolist()):
            if not (height and width):
                raise ValueError(f"`pixel_mask` of image {index} is empty: every image needs a pixel.")
            groups.setdefault((round_up(height), round_up(width)), []).append(index)
        if list(groups) == [tuple(pixel_values.shape[-2:])]:
            return segment(pixel_values)
        if len(groups) > 1 and any(requested.values()):
            raise ValueError(
                f"Images of the padded sizes {', '.join(map(str, groups))} have hidden states and attentions of "
                "different shapes: ask for them with images of one size at a time."
            )
        parts = [segment(pixel_values[indices, :, :height, :width]) for (height, width), indices in groups.items()]
        order = torch.tensor([index for indices in groups.values() for index in indices], device=pixel_values.device)
        grid = tuple(length // BACKBONE_STRIDES[0] for length in pixel_values.shape[-2:])
        merged = _merge(parts, order.argsort(), grid)
        if output_stages:
            stages = zip(*(part.stages for part in parts), strict=True)
            merged.stages = tuple(_merge(stage, order.argsort(), grid) for stage in stages)
        return merged

    def _segment_optimized(self, pixel_values: Tensor, **requested: bool) -> GKCModelOutput:
        """The image path in one and the same grad mode and memory format, or it would be compiled for each."""
        with torch.inference_mode(False), torch.no_grad():
            pixel_values = pixel_values.to(self.dtype, copy=True, memory_format=torch.channels_last)
            return run_or_uncompile(self.model, pixel_values, output_stages=False, return_dict=True, **requested)

    def _classify(self, stage: GKCModelOutput, index: int, words: GKCWords) -> GKCStageOutput:
        if self.is_convex:
            probabilities = self.class_embedder.head_probabilities(stage)
            query_embeds, logits = self.class_embedder.embed(probabilities), self._share(probabilities, words)
        else:
            query_embeds = self.class_embedder(stage, index)
            logits = self._name(query_embeds, words)
        return GKCStageOutput(
            class_queries_logits=logits,
            masks_queries_logits=stage.masks_queries_logits,
            query_embeds=query_embeds,
            query_features=stage.last_hidden_state,
            mask_embeds=stage.mask_embeds,
        )

    def _name(self, query_embeds: Tensor, words: GKCWords) -> Tensor:
        if self.is_convex:
            return self._share(self.class_embedder.read(query_embeds), words)
        logits = self.class_logits(query_embeds, words.embeds)
        if words.class_ids is None:
            return logits
        return reduce_prompt_logits(logits, words.class_ids, words.reduction, words.num_classes)

    def _share(self, probabilities: Tensor, words: GKCWords) -> Tensor:
        logits = self.class_embedder.class_logits(probabilities, words.embeds, words.class_ids, words.num_classes)
        return self.temperature.to(logits) * logits

    def _losses(
        self,
        stages: tuple[GKCStageOutput, ...],
        mask_labels: Sequence[Tensor],
        class_labels: Sequence[Tensor],
        content_sizes: Tensor | None,
        mask_features: Tensor | None,
    ) -> tuple[Tensor, dict[str, Tensor], list[Matches]]:
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


def _merge(parts: Sequence[GKCModelOutput], order: Tensor, grid: tuple[int, int]) -> GKCModelOutput:
    """Puts outputs for images of different sizes together, in the images' order, on one grid of masks."""
    for part in parts:
        part.masks_queries_logits = extend_masks(part.masks_queries_logits, grid)
    return GKCModelOutput(
        **{key: _concatenate([part[key] for part in parts], order) for key in parts[0] if key != "stages"}
    )


def _concatenate(values: Sequence[Tensor] | Sequence[tuple[Tensor, ...]], order: Tensor) -> Tensor | tuple:
    if isinstance(values[0], Tensor):
        return torch.cat(values)[order]
    return tuple(_concatenate(states, order) for states in zip(*values, strict=True))


for _auto_class in (
    AutoModel,
    AutoModelForImageSegmentation,
    AutoModelForInstanceSegmentation,
    AutoModelForSemanticSegmentation,
    AutoModelForUniversalSegmentation,
):
    _auto_class.register(GKCConfig, GKCForOpenVocabSegmentation, exist_ok=True)
# The image-segmentation pipeline accepts a class only by its name in this table.
MODEL_FOR_UNIVERSAL_SEGMENTATION_MAPPING_NAMES[GKCConfig.model_type] = GKCForOpenVocabSegmentation.__name__

__all__ = [
    "GKCClassEmbeddings",
    "GKCForOpenVocabSegmentation",
    "GKCForOpenVocabSegmentationOutput",
    "GKCModel",
    "GKCModelOutput",
    "GKCPreTrainedModel",
    "GKCStageOutput",
    "average_class_embeds",
    "reduce_prompt_logits",
]
