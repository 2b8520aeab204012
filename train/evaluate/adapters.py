"""Other people's models under the same evaluation: those of transformers with a list of labels, and CLIPSeg.

A model with a fixed list of labels is asked for nothing: its labels are matched with the benchmark's names, in any
case and with "-" and "_" as blanks. What it finds of a label without counterpart counts as found wrongly, and a class
that none of its labels means is never found; both are listed in the result.
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

# The others of this family are asked in other ways (OneFormer's tasks, clips of video) or have no semantic result.
UNIVERSAL = {"eomt", "eomt_dinov3", "mask2former", "maskformer"} & set(MODEL_FOR_UNIVERSAL_SEGMENTATION_MAPPING_NAMES)
# Their outputs are masks on a grid of stride 4 that covers the whole input, as GKC's are.
MASKS_AT_STRIDE_4 = ("mask2former", "maskformer")
PROMPTS_PER_PASS = 16


def model_type(path: str) -> str:
    """
    What kind of model a folder or a name on the Hub holds.

    Raises:
        ValueError: there is no model.
    """
    try:
        return str(AutoConfig.from_pretrained(path, trust_remote_code=False).model_type)
    except Exception as error:  # a damaged file can make transformers raise errors of any type
        raise ValueError(f"--model: {path} holds no model: {error_line(error)}") from error


def match_labels(labels: Mapping[int, str], vocabulary: Vocabulary) -> tuple[np.ndarray, dict[str, Any]]:
    """
    The benchmark's class of each label of a model.

    Args:
        labels: the model's, by position.
        vocabulary: the benchmark's classes; their labels are matched first, then their synonyms.

    Returns:
        (A,) int32 classes, -1 where none matches; and what matched nothing on either side.

    Raises:
        ValueError: nothing matches.
    """
    named = {
        _key(name): index
        for names, index in zip(vocabulary.names, range(len(vocabulary)), strict=True)
        for name in names[1:]
    }
    named |= {_key(label): index for index, label in enumerate(vocabulary.labels)}
    class_of = np.full(max(labels) + 1, NOT_A_CLASS, dtype=np.int32)
    for position, label in labels.items():
        candidates = [_key(label), *(_key(part) for part in label.split(","))]
        class_of[position] = next((named[key] for key in candidates if key in named), NOT_A_CLASS)
    if (class_of == NOT_A_CLASS).all():
        raise ValueError(
            f"--model: none of its labels ({', '.join(list(labels.values())[:4])}, ...) is a class of the benchmark "
            f"({', '.join(vocabulary.labels[:4])}, ...)."
        )
    found = set(class_of.tolist())
    return class_of, {
        "labels": len(labels),
        "labels_without_class": [label for position, label in labels.items() if class_of[position] == NOT_A_CLASS],
        "classes_without_label": [name for index, name in enumerate(vocabulary.labels) if index not in found],
    }


def _key(name: str) -> str:
    return " ".join(name.casefold().replace("-", " ").replace("_", " ").split())


class LabelledSegmenter:
    """
    A model of transformers with a list of labels, with its own preparation of images; one image at a time.

    Masks of Mask2Former and MaskFormer are resampled at full resolution as GKC's; the other models' outputs go through
    the post-processing of their own image processor.

    Args:
        path: folder or name on the Hub.
        vocabulary: the benchmark's classes.
        panoptic: settings of `panoptic_segmentation`.
        dtype: that the model computes in.
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
            raise ValueError(f"--model: {path} is a {kind}, which segments nothing that can be scored here.")
        self.model = loader.from_pretrained(path, dtype=DTYPES[dtype], trust_remote_code=False).eval()
        self.processor = AutoImageProcessor.from_pretrained(path, trust_remote_code=False)
        self.class_of, self.notes = match_labels(config.id2label, vocabulary)
        self.notes |= {"architecture": kind, "image_size": "as the model's own processor has it"}
        self.has_masks = kind in MASKS_AT_STRIDE_4
        self.panoptic_settings = dict(panoptic or {})
        stuff = self.panoptic_settings.pop("label_ids_to_fuse", ())
        self.fused = {position for position, index in enumerate(self.class_of.tolist()) if index in stuff}
        self.provided = PREDICTION_FIELDS if self.has_masks else ("classes",)

    def prepare(self, images: Sequence[np.ndarray]) -> list[Any]:
        """See `Segmenter`."""
        return [self.processor(images=Image.fromarray(image), return_tensors="pt") for image in images]

    def forward(self, inputs: list[Any]) -> list[Any]:
        """See `Segmenter`."""
        return [(self.model(**_moved(single, self.model)), _content(single)) for single in inputs]

    def semantic(self, outputs: list[Any], index: int, size: Size) -> np.ndarray:
        """See `Segmenter`."""
        if self.has_masks:
            labels, _ = semantic_segmentation(*_image(*outputs[index]), size)
        else:
            (labels,) = self.processor.post_process_semantic_segmentation(outputs[index][0], target_sizes=[size])
        return labels.cpu().numpy().astype(np.int32)

    def panoptic(self, outputs: list[Any], index: int, size: Size) -> tuple[np.ndarray, list[dict[str, Any]]]:
        """See `Segmenter`."""
        settings = self.panoptic_settings | {"label_ids_to_fuse": self.fused}
        result = panoptic_segmentation(*_image(*outputs[index]), size, **settings)
        return result["segmentation"].cpu().numpy(), result["segments_info"]

    def instances(self, outputs: list[Any], index: int, size: Size) -> list[dict[str, Any]]:
        """See `Segmenter`."""
        return detections(*_image(*outputs[index]), size)


def _image(outputs: Any, content: Size | None) -> tuple[Tensor, Tensor, Size | None]:
    return outputs.class_queries_logits[0], outputs.masks_queries_logits[0], content


def _content(inputs: Any) -> Size | None:
    """Height and width of what is no padding, None where the model is not told."""
    if "pixel_mask" not in inputs:
        return None
    mask = inputs["pixel_mask"][0].bool()
    return int(mask.any(dim=1).sum()), int(mask.any(dim=0).sum())


def _moved(inputs: Any, model: Any) -> dict[str, Any]:
    """Tensors on the model's device, images in its type; EoMT's offsets of patches, a list, as they are."""
    return {
        name: value.to(model.device, model.dtype if value.is_floating_point() else None)
        if isinstance(value, Tensor)
        else value
        for name, value in inputs.items()
    }


class CLIPSegSegmenter:
    """
    CLIPSeg (Lüddecke and Ecker, CVPR 2022): one map per word, the best word of a pixel wins.

    Args:
        path: folder or name on the Hub.
        asked: the vocabulary; of several names of a class the best counts.
        dtype: that the model computes in.
    """

    def __init__(self, path: str, asked: BenchmarkVocabulary, dtype: str = "float32"):
        from transformers import CLIPSegForImageSegmentation

        self.model = CLIPSegForImageSegmentation.from_pretrained(path, dtype=DTYPES[dtype]).eval()
        self.processor = AutoProcessor.from_pretrained(path, trust_remote_code=False)
        names, templates = asked.vocabulary.flat_names, asked.templates
        prompts = [fill_template(template, name) for name in names for template in templates]
        self.tokens = self.processor.tokenizer(prompts, padding=True, return_tensors="pt")
        classes = asked.class_of[asked.vocabulary.class_ids]
        self.class_of = np.repeat(classes, len(templates)).astype(np.int32)
        self.provided = ("classes",)
        self.notes = {"architecture": "clipseg", "image_size": "as the model's own processor has it"}

    def prepare(self, images: Sequence[np.ndarray]) -> list[Any]:
        """See `Segmenter`."""
        return [self.processor.image_processor(images=Image.fromarray(image), return_tensors="pt") for image in images]

    def forward(self, inputs: list[Any]) -> list[Tensor]:
        """Of each image (A, h, w) logits, in fp32 on the CPU."""
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
        """See `Segmenter`."""
        best, labels = torch.full(size, -torch.inf), torch.zeros(size, dtype=torch.int64)
        for position, logits in enumerate(outputs[index]):
            full = F.interpolate(logits[None, None], size=size, mode="bilinear", align_corners=False)[0, 0]
            labels[full > best] = position
            best = torch.maximum(best, full)
        return labels.numpy().astype(np.int32)

    def panoptic(self, outputs: Any, index: int, size: Size) -> tuple[np.ndarray, list[dict[str, Any]]]:
        """It has no segments."""
        raise NotImplementedError

    def instances(self, outputs: Any, index: int, size: Size) -> list[dict[str, Any]]:
        """It has no objects."""
        raise NotImplementedError
