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
"""Open-vocabulary segmentation without training: a closed-vocabulary segmenter and an image-text model.

The segmenter predicts masks; its class probabilities are distributed over the requested classes, and an image-text
model compares each region with the requested classes (see `region_tokens`). `gkc open` makes such a model.

Letters: B images, Q queries, D text-embedding width, S classes of the segmenter, K requested classes, P prompts,
(H, W) padded input size.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForUniversalSegmentation, CLIPTextModelWithProjection
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.modeling_utils import PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_UNIVERSAL_SEGMENTATION_MAPPING, MODEL_MAPPING
from transformers.utils.generic import can_return_tuple

from .class_embeddings import TextEmbeddingCache
from .classifiers import ClassPrompts, ConvexClassifier
from .configuration_gkc import BACKBONE_STRIDES
from .configuration_gkc_zero_shot import GKCZeroShotConfig
from .modeling_clip_resnet import GKCModelMixin
from .modeling_outputs import GKCForOpenVocabSegmentationOutput, GKCModelOutput
from .open_vocabulary import OpenVocabularyMixin
from .padding import check_pixel_values, content_sizes_of, full_content_sizes, pad_to_stride, round_up, run_by_size
from .region_tokens import embed_regions, patch_size
from .remote_code import register_segmentation_model


class CLIPTowers(nn.Module):
    """Image encoder and text encoder of a CLIP whose image encoder is one of this library.

    Args:
        config: Configuration of the image encoder.
        text_config: Configuration of the text encoder.
    """

    def __init__(self, config: PreTrainedConfig, text_config: PreTrainedConfig):
        super().__init__()
        self.config = config
        self.vision_model = AutoModel.from_config(config, trust_remote_code=False)
        self.text_model = CLIPTextModelWithProjection._from_config(text_config)

    def get_text_features(self, input_ids: Tensor, attention_mask: Tensor | None = None, **kwargs) -> Any:
        """Return the output of the text encoder with the projected embeddings (P, D) as `pooler_output`."""
        output = self.text_model(input_ids=input_ids, attention_mask=attention_mask, **kwargs)
        return BaseModelOutputWithPooling(output.last_hidden_state, output.text_embeds, output.hidden_states)


class RegionClassifier(ConvexClassifier):
    """Classifier of regions by the segmenter's class probabilities, by their embeddings, or by both.

    The probability of no-object is that of the segmenter. Regions without a patch are classified by the segmenter
    alone.

    Args:
        config: Configuration of the model.
    """

    def __init__(self, config: GKCZeroShotConfig):
        super().__init__(config)
        config.check_settings()
        self.region_weight = {"segmenter": 0.0, "both": config.region_weight, "regions": 1.0}[config.class_scores]
        self.register_buffer("region_scale", torch.tensor(100.0))

    def make_head(self, config: GKCZeroShotConfig) -> nn.Module:
        """Return the identity, because the segmenter computes the logits of its classes."""
        return nn.Identity()

    def forward(
        self, stage: GKCModelOutput, prompts: ClassPrompts, index: int = -1, class_weights: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Classify queries.

        Args:
            stage: `last_hidden_state`, the class logits (B, Q, S + 1) of the segmenter, and, unless only the segmenter
                is used, `region_embeds` (B, Q, D), L2-normalized, and `mask_is_empty` (B, Q).
            prompts: Prompts of the requested classes.
            index: Not used.
            class_weights: Result of `class_weights(prompts)`, if it was computed before.

        Returns:
            The logarithms (B, Q, K + 1) of the class probabilities, whose last column is no-object, and the
            L2-normalized embeddings (B, Q, D) of the regions, or of the segmenter's probabilities.
        """
        logits, embeds = super().forward(stage, prompts, index, class_weights)
        if not self.region_weight:
            return logits, embeds
        with torch.autocast(logits.device.type, enabled=False):
            region_embeds = stage.region_embeds.to(logits)
            similarities = self.region_scale.to(logits) * region_embeds @ prompts.embeds.to(logits).T
            similarities = prompts.reduce(F.pad(similarities, (0, 1)))[..., :-1]  # without no-object
            source = stage.last_hidden_state.to(logits).log_softmax(dim=-1)
            is_object = source[..., :-1].logsumexp(dim=-1, keepdim=True)
            regions = torch.cat([similarities.log_softmax(dim=-1) + is_object, source[..., -1:]], dim=-1)
            combined = self.region_weight * regions + (1 - self.region_weight) * logits
        is_empty = stage.mask_is_empty[..., None]
        return torch.where(is_empty, logits, combined), torch.where(is_empty, embeds, region_embeds)

    def classify_embeds(
        self, query_embeds: Tensor, prompts: ClassPrompts, class_weights: Tensor | None = None
    ) -> Tensor:
        """Compute class logits (B, Q, K + 1) from query embeddings (B, Q, D); only with `class_scores="segmenter"`.

        Raises:
            ValueError: The class scores use the regions, whose embeddings do not hold the segmenter's probabilities.
        """
        if self.region_weight:
            raise ValueError(
                "Embeddings of regions cannot be classified again, because they do not hold the segmenter's "
                "probabilities: run the model again, or load it with `class_scores='segmenter'`."
            )
        return super().classify_embeds(query_embeds, prompts, class_weights)


class GKCForZeroShotSegmentation(OpenVocabularyMixin, GKCModelMixin, PreTrainedModel):
    """Open-vocabulary segmentation model of a closed-vocabulary segmenter and an image-text model, without training.

    It has the inputs and outputs of `GKCForOpenVocabSegmentation` but for labels, and takes its place in processors,
    predictors and pipelines. It is always in evaluation mode.

    Args:
        config: Configuration of the model.
    """

    config_class = GKCZeroShotConfig
    config: GKCZeroShotConfig
    base_model_prefix = ""
    main_input_name = "pixel_values"
    input_modalities = ("image", "text")
    _supports_sdpa = True
    _supports_attention_backend = True

    def __init__(self, config: GKCZeroShotConfig):
        super().__init__(config)
        segmenter, tower = config.segmenter_config, config.tower_config
        for part, classes in ((segmenter, MODEL_FOR_UNIVERSAL_SEGMENTATION_MAPPING), (tower, MODEL_MAPPING)):
            if part._attn_implementation == "sdpa" and not getattr(classes.get(type(part), None), "_supports_sdpa", 1):
                part._attn_implementation = None
        self.segmenter = AutoModelForUniversalSegmentation.from_config(segmenter, trust_remote_code=False)
        if hasattr(tower, "text_config"):
            self.tower = AutoModel.from_config(tower, trust_remote_code=False)
        else:
            self.tower = CLIPTowers(tower, config.text_config)
        self.classifier = RegionClassifier(config)
        stored = config.vocabulary_num_prompts
        self.register_buffer("vocabulary_embeds", torch.zeros(stored, config.projection_dim) if stored else None)
        self.register_buffer("vocabulary_class_ids", torch.zeros(stored, dtype=torch.long) if stored else None)
        self.text_cache = TextEmbeddingCache()
        self.post_init()
        self.eval().requires_grad_(False)

    @classmethod
    def from_pretrained(cls, *args, **kwargs):
        """Load a checkpoint as in transformers, and exclude its weights from training again."""
        loaded = super().from_pretrained(*args, **kwargs)
        (loaded[0] if isinstance(loaded, tuple) else loaded).requires_grad_(False)
        return loaded

    @property
    def text_model(self) -> nn.Module:
        """Return the text encoder of the image-text model."""
        return self.tower.text_model

    def train(self, mode: bool = True) -> "GKCForZeroShotSegmentation":
        """Stay in evaluation mode, or raise a ValueError if `mode` is true: nothing of this model is trained."""
        if mode:
            raise ValueError("A zero-shot model is not trained: train a student by `python -m train distil`.")
        return super().train(False)

    @can_return_tuple
    def get_text_features(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, **kwargs
    ) -> BaseModelOutputWithPooling:
        """Return the output of the text encoder, see `OpenVocabularyMixin.get_text_features`.

        SigLIP reads texts that are padded to its full length and has no attention mask.
        """
        text = self.config.text_config
        if text.model_type.startswith("siglip"):
            pad_token = text.pad_token_id or 0
            if attention_mask is not None:
                input_ids = input_ids.masked_fill(attention_mask == 0, pad_token)
            missing = text.max_position_embeddings - input_ids.shape[1]
            input_ids, attention_mask = F.pad(input_ids, (0, missing), value=pad_token), None
        return self.tower.get_text_features(
            input_ids=input_ids, attention_mask=attention_mask, return_dict=True, **kwargs
        )

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
        prompt_reduction: str | None = None,
        names_per_class: Tensor | None = None,
        prompts_per_name: Tensor | None = None,
        original_sizes: Tensor | None = None,
    ) -> GKCForOpenVocabSegmentationOutput:
        """Segment images into the classes of a vocabulary.

        Images of different sizes are computed separately, so that no result depends on the other images.

        Args:
            pixel_values: (B, 3, H, W) images, normalized as the segmenter expects them.
            pixel_mask: (B, H, W) mask, 1 inside the image and 0 in the padding at the right and the bottom; default:
                no padding.
            input_ids: As in `GKCForOpenVocabSegmentation.forward`, as the other arguments of the vocabulary.
            attention_mask: Likewise.
            class_ids: Likewise.
            name_ids: Likewise.
            class_embeds: Likewise.
            prompt_reduction: Likewise.
            names_per_class: Likewise.
            prompts_per_name: Likewise.
            original_sizes: Accepted for the call `model(**inputs)` and ignored; post-processing uses it.

        Returns:
            The output without losses, stages and hidden states. Class logits are logarithms of probabilities.

        Raises:
            ValueError: The arguments of the vocabulary are invalid, the mask does not fit the images or is empty, or
                an image is larger than a segmenter with a fixed input size takes.
        """
        prompts = self.resolve_vocabulary(
            input_ids=input_ids,
            attention_mask=attention_mask,
            class_ids=class_ids,
            name_ids=name_ids,
            class_embeds=class_embeds,
            prompt_reduction=prompt_reduction,
            names_per_class=names_per_class,
            prompts_per_name=prompts_per_name,
        )
        check_pixel_values(pixel_values)
        image_size = pixel_values.shape[-2:]
        pixel_values, pixel_mask, _ = pad_to_stride(pixel_values.to(self.dtype), pixel_mask)
        if pixel_mask is None:
            content_sizes = full_content_sizes(pixel_values, image_size)
            sizes = [tuple(image_size)] * len(pixel_values)
        else:
            content_sizes = content_sizes_of(pixel_mask)
            sizes = list(map(tuple, content_sizes.tolist()))
        segments = run_by_size(self.segment, pixel_values, sizes)
        logits, query_embeds = self.classifier(segments, prompts)
        return GKCForOpenVocabSegmentationOutput(
            class_queries_logits=logits,
            masks_queries_logits=segments.masks_queries_logits,
            query_embeds=query_embeds,
            content_sizes=content_sizes,
        )

    def segment(self, pixel_values: Tensor) -> GKCModelOutput:
        """Predict the masks of images of one size, and embed the regions under the masks.

        Args:
            pixel_values: (B, 3, H, W) images without padding, normalized as the segmenter expects them.

        Returns:
            Class logits (B, Q, S + 1) of the segmenter as `last_hidden_state`, mask logits (B, Q, h, w) of the image
            padded to multiples of 32, at a quarter of its size, and, unless `class_scores="segmenter"`,
            `region_embeds` (B, Q, D), L2-normalized, and `mask_is_empty` (B, Q).
        """
        height, width = pixel_values.shape[-2:]
        padded = round_up(height), round_up(width)
        side = self.config.segmenter_image_size
        target = padded if side is None else (side, side)
        if target[0] < height or target[1] < width:
            raise ValueError(
                f"The segmenter takes images of at most {side} x {side} pixels, got {height} x {width}: resize them "
                "with the checkpoint's own processor."
            )
        inputs = {"pixel_values": F.pad(pixel_values, (0, target[1] - width, 0, target[0] - height))}
        if self.config.task_tokens is not None:
            tokens = torch.tensor(self.config.task_tokens, device=pixel_values.device)
            inputs["task_inputs"] = tokens.expand(len(pixel_values), -1)
        outputs = self.segmenter(**inputs, return_dict=True)
        masks = outputs.masks_queries_logits
        quarter = tuple(length // BACKBONE_STRIDES[0] for length in target)
        if masks.shape[-2:] != quarter:
            masks = F.interpolate(masks, size=quarter, mode="bilinear", align_corners=False)
        masks = masks[..., : padded[0] // BACKBONE_STRIDES[0], : padded[1] // BACKBONE_STRIDES[0]]
        segments = GKCModelOutput(last_hidden_state=outputs.class_queries_logits, masks_queries_logits=masks)
        if self.classifier.region_weight:
            inside = masks[..., : -(-height // BACKBONE_STRIDES[0]), : -(-width // BACKBONE_STRIDES[0])] > 0
            region_embeds, segments.mask_is_empty = embed_regions(self.tower, self.tower_images(pixel_values), inside)
            segments.region_embeds = F.normalize(region_embeds, dim=-1)
        return segments

    def tower_images(self, pixel_values: Tensor) -> Tensor:
        """Convert images (B, 3, H, W) of the segmenter to images (B, 3, h, w) of the image-text model.

        The shorter side becomes `config.tower_image_size`, both sides multiples of the patch size.
        """
        config = self.config
        statistics = torch.tensor([config.image_mean, config.image_std, config.tower_mean, config.tower_std])
        image_mean, image_std, tower_mean, tower_std = statistics[..., None, None].to(pixel_values)
        images = (pixel_values * image_std + image_mean - tower_mean) / tower_std
        patch = patch_size(config.tower_config)
        vision = getattr(config.tower_config, "vision_config", config.tower_config)
        scale = (config.tower_image_size or vision.image_size) / min(images.shape[-2:])
        size = tuple(max(1, round(side * scale / patch)) * patch for side in images.shape[-2:])
        if size == tuple(images.shape[-2:]):
            return images
        return F.interpolate(images.float(), size=size, mode="bicubic", antialias=True).to(images)


register_segmentation_model(GKCZeroShotConfig, GKCForZeroShotSegmentation)

__all__ = ["GKCForZeroShotSegmentation", "RegionClassifier"]
