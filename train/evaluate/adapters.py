"""Adapters that evaluate transformers models with a fixed label list, and CLIPSeg.

The labels of a model with a fixed label list are matched with the class names of the benchmark, ignoring case and
treating "-" and "_" as spaces. Predictions of an unmatched label count as false positives, and a class without a
matching label is never predicted; the result file lists both.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from transformers import AutoConfig, AutoImageProcessor, AutoProcessor
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING_NAMES,
    MODEL_FOR_UNIVERSAL_SEGMENTATION_MAPPING_NAMES,
    AutoModelForSemanticSegmentation,
    AutoModelForUniversalSegmentation,
)

from modeling_gkc.checkpoint_loading import check_shard_paths
from modeling_gkc.label_text import error_line
from modeling_gkc.post_processing import panoptic_segmentation, semantic_segmentation
from modeling_gkc.prompt_templates import fill_template
from modeling_gkc.vocabulary import Vocabulary

from ..metrics.score import PREDICTION_FIELDS
from .segmenter import DTYPES, NOT_A_CLASS, Size, detections
from .vocabulary import BenchmarkVocabulary

# The other universal models need further inputs (task tokens of OneFormer, video clips) or have no semantic output.
UNIVERSAL = {"eomt", "eomt_dinov3", "mask2former", "maskformer"} & set(MODEL_FOR_UNIVERSAL_SEGMENTATION_MAPPING_NAMES)
# These models predict masks at stride 4 over the whole input, as GKC does.
MASKS_AT_STRIDE_4 = ("mask2former", "maskformer")
PROMPTS_PER_PASS = 16


def model_type(path: str) -> str:
    """Read the model type of a checkpoint folder or Hub repository.

    Raises:
        ValueError: The path holds no model that transformers can load.
    """
    try:
        return str(AutoConfig.from_pretrained(path, trust_remote_code=False).model_type)
    except Exception as error:  # a damaged file can make transformers raise errors of any type
        raise ValueError(f"--model: {path} holds no model: {error_line(error)}") from error


def match_labels(labels: Mapping[int, str], vocabulary: Vocabulary) -> tuple[np.ndarray, dict[str, Any]]:
    """Match the labels of a model with the classes of a benchmark.

    Args:
        labels: The A labels of the model by index.
        vocabulary: Classes of the benchmark. First names take precedence over synonyms.

    Returns:
        (A,) int32 class index of each label, -1 without a match, and a description of unmatched labels and classes.

    Raises:
        ValueError: No label matches a class.
    """
    named = {
        _normalize_name(name): index
        for names, index in zip(vocabulary.names, range(len(vocabulary)), strict=True)
        for name in names[1:]
    }
    named |= {_normalize_name(label): index for index, label in enumerate(vocabulary.labels)}
    class_of = np.full(max(labels) + 1, NOT_A_CLASS, dtype=np.int32)
    for position, label in labels.items():
        candidates = [_normalize_name(label), *(_normalize_name(part) for part in label.split(","))]
        class_of[position] = next((named[key] for key in candidates if key in named), NOT_A_CLASS)
    if (class_of == NOT_A_CLASS).all():
        raise ValueError(
            f"--model: None of its labels ({', '.join(list(labels.values())[:4])}, ...) is a class of the benchmark "
            f"({', '.join(vocabulary.labels[:4])}, ...)."
        )
    found = set(class_of.tolist())
    return class_of, {
        "labels": len(labels),
        "labels_without_class": [label for position, label in labels.items() if class_of[position] == NOT_A_CLASS],
        "classes_without_label": [name for index, name in enumerate(vocabulary.labels) if index not in found],
    }


def _normalize_name(name: str) -> str:
    return " ".join(name.casefold().replace("-", " ").replace("_", " ").split())


class LabeledSegmenter:
    """Transformers segmentation model with a fixed label list and its own image processor.

    Images are processed one at a time. Masks of Mask2Former and MaskFormer are resampled to the target size as those
    of GKC; the outputs of the other models are post-processed by their own image processor.

    Args:
        path: Checkpoint folder or Hub repository.
        vocabulary: Classes of the benchmark.
        panoptic: Arguments of `panoptic_segmentation`.
        dtype: Data type of the computation, a key of `DTYPES`.

    Raises:
        ValueError: The architecture is not supported, or no label of the model is a class of the benchmark.
    """

    def __init__(
        self, path: str, vocabulary: Vocabulary, panoptic: Mapping[str, Any] | None = None, dtype: str = "float32"
    ):
        check_shard_paths(path)
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
        kind = config.model_type
        if kind in UNIVERSAL:
            loader = AutoModelForUniversalSegmentation
        elif kind in MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING_NAMES:
            loader = AutoModelForSemanticSegmentation
        else:
            raise ValueError(f"--model: {path} is a {kind}, which is not a supported segmentation model.")
        self.model = loader.from_pretrained(path, dtype=DTYPES[dtype], trust_remote_code=False).eval()
        self.processor = AutoImageProcessor.from_pretrained(path, trust_remote_code=False)
        self.class_of, self.notes = match_labels(config.id2label, vocabulary)
        self.notes |= {"architecture": kind, "image_size": "from the image processor of the model"}
        self.has_masks = kind in MASKS_AT_STRIDE_4
        self.panoptic_settings = dict(panoptic or {})
        stuff = self.panoptic_settings.pop("label_ids_to_fuse", ())
        self.fused = {position for position, index in enumerate(self.class_of.tolist()) if index in stuff}
        self.provided = PREDICTION_FIELDS if self.has_masks else ("classes",)

    def prepare(self, images: Sequence[np.ndarray]) -> list[Any]:
        """Preprocess images, see `Segmenter.prepare`."""
        return [self.processor(images=Image.fromarray(image), return_tensors="pt") for image in images]

    def forward(self, inputs: list[Any]) -> list[Any]:
        """Run the model, see `Segmenter.forward`."""
        return [(self.model(**_to_device(single, self.model)), _content_size(single)) for single in inputs]

    def semantic(self, outputs: list[Any], index: int, size: Size) -> np.ndarray:
        """Predict a class map, see `Segmenter.semantic`."""
        if self.has_masks:
            labels, _ = semantic_segmentation(*_image_logits(*outputs[index]), size)
        else:
            (labels,) = self.processor.post_process_semantic_segmentation(outputs[index][0], target_sizes=[size])
        return labels.cpu().numpy().astype(np.int32)

    def panoptic(self, outputs: list[Any], index: int, size: Size) -> tuple[np.ndarray, list[dict[str, Any]]]:
        """Predict panoptic segments, see `Segmenter.panoptic`."""
        settings = self.panoptic_settings | {"label_ids_to_fuse": self.fused}
        result = panoptic_segmentation(*_image_logits(*outputs[index]), size, **settings)
        return result["segmentation"].cpu().numpy(), result["segments_info"]

    def instances(self, outputs: list[Any], index: int, size: Size) -> list[dict[str, Any]]:
        """Predict instances, see `Segmenter.instances`."""
        return detections(*_image_logits(*outputs[index]), size)


def _image_logits(outputs: Any, content: Size | None) -> tuple[Tensor, Tensor, Size | None]:
    return outputs.class_queries_logits[0], outputs.masks_queries_logits[0], content


def _content_size(inputs: Any) -> Size | None:
    """Return the (height, width) of an image without padding, None for a model without `pixel_mask`."""
    if "pixel_mask" not in inputs:
        return None
    mask = inputs["pixel_mask"][0].bool()
    return int(mask.any(dim=1).sum()), int(mask.any(dim=0).sum())


def _to_device(inputs: Any, model: Any) -> dict[str, Any]:
    """Move tensors to the device and dtype of the model; other inputs, such as the patch offsets of EoMT, stay."""
    return {
        name: value.to(model.device, model.dtype if value.is_floating_point() else None)
        if isinstance(value, Tensor)
        else value
        for name, value in inputs.items()
    }


class CLIPSegSegmenter:
    """CLIPSeg (Lüddecke and Ecker, CVPR 2022), which predicts one map per prompt; the best prompt of a pixel wins.

    Args:
        path: Checkpoint folder or Hub repository.
        vocabulary: Vocabulary of the benchmark. The best of the prompts of a class counts.
        dtype: Data type of the computation, a key of `DTYPES`.
    """

    def __init__(self, path: str, vocabulary: BenchmarkVocabulary, dtype: str = "float32"):
        from transformers import CLIPSegForImageSegmentation

        self.model = CLIPSegForImageSegmentation.from_pretrained(path, dtype=DTYPES[dtype]).eval()
        self.processor = AutoProcessor.from_pretrained(path, trust_remote_code=False)
        names, templates = vocabulary.vocabulary.flat_names, vocabulary.templates
        prompts = [fill_template(template, name) for name in names for template in templates]
        self.tokens = self.processor.tokenizer(prompts, padding=True, return_tensors="pt")
        classes = vocabulary.class_of[vocabulary.vocabulary.class_ids]
        self.class_of = np.repeat(classes, len(templates)).astype(np.int32)
        self.provided = ("classes",)
        self.notes = {"architecture": "clipseg", "image_size": "from the image processor of the model"}

    def prepare(self, images: Sequence[np.ndarray]) -> list[Any]:
        """Preprocess images, see `Segmenter.prepare`."""
        return [self.processor.image_processor(images=Image.fromarray(image), return_tensors="pt") for image in images]

    def forward(self, inputs: list[Any]) -> list[Tensor]:
        """Compute the logits (P, h, w) of the P prompts for each image, in fp32 on the CPU."""
        return [self._maps(single["pixel_values"].to(self.model.device, self.model.dtype)) for single in inputs]

    def _maps(self, pixel_values: Tensor) -> Tensor:
        maps = []
        for start in range(0, len(self.class_of), PROMPTS_PER_PASS):
            tokens = {
                key: value[start : start + PROMPTS_PER_PASS].to(pixel_values.device)
                for key, value in self.tokens.items()
            }
            shown = pixel_values.expand(len(tokens["input_ids"]), -1, -1, -1)
            logits = self.model(pixel_values=shown, **tokens).logits
            maps.append((logits[None] if logits.ndim == 2 else logits).float().cpu())
        return torch.cat(maps)

    def semantic(self, outputs: list[Tensor], index: int, size: Size) -> np.ndarray:
        """Predict a class map, see `Segmenter.semantic`."""
        best, labels = torch.full(size, -torch.inf), torch.zeros(size, dtype=torch.int64)
        for position, logits in enumerate(outputs[index]):
            full = F.interpolate(logits[None, None], size=size, mode="bilinear", align_corners=False)[0, 0]
            labels[full > best] = position
            best = torch.maximum(best, full)
        return labels.numpy().astype(np.int32)

    def panoptic(self, outputs: Any, index: int, size: Size) -> tuple[np.ndarray, list[dict[str, Any]]]:
        """Raise, because CLIPSeg predicts no segments."""
        raise NotImplementedError

    def instances(self, outputs: Any, index: int, size: Size) -> list[dict[str, Any]]:
        """Raise, because CLIPSeg predicts no instances."""
        raise NotImplementedError
