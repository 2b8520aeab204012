"""Interface of the models that are evaluated, and its implementation for GKC.

Letters: B images of a batch, Q queries, A classes that the model predicts, H x W pixels of the scored image. Sizes are
(height, width).
"""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from modeling_gkc.encoded_vocabulary import EncodedVocabulary
from modeling_gkc.mask_resampling import MaskResampler
from modeling_gkc.post_processing import instance_segmentation
from modeling_gkc.predictor import GKCPredictor, PredictionOptions, PreparedImage, SegmentationResult
from modeling_gkc.vocabulary import Vocabulary

from ..metrics.score import PREDICTION_FIELDS
from .vocabulary import BenchmarkVocabulary

Size = tuple[int, int]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
TTA_SCALES = (0.5, 0.75, 1.0, 1.25, 1.5)
DETECTIONS = 100  # per image, as in the protocol of COCO
NOT_A_CLASS = -1


class Segmenter(Protocol):
    """Interface of a model that is evaluated.

    Attributes:
        class_of: (A,) int32 benchmark class of each class that the model predicts, -1 for none.
        provided: Fields of `train.metrics.score.Prediction` that the model predicts.
        notes: Description of the model for the result file.
    """

    class_of: np.ndarray
    provided: tuple[str, ...]
    notes: dict[str, Any]

    def prepare(self, images: Sequence[np.ndarray]) -> Any:
        """Preprocess B images (H, W, 3) uint8 into model inputs; called in a prefetching thread."""

    def forward(self, inputs: Any) -> Any:
        """Compute the outputs of the model, before they are resized to the sizes of the images."""

    def semantic(self, outputs: Any, index: int, size: Size) -> np.ndarray:
        """Predict the class map (H, W) int32 of image `index` of the batch, -1 for pixels without a class."""

    def panoptic(self, outputs: Any, index: int, size: Size) -> tuple[np.ndarray, list[dict[str, Any]]]:
        """Predict a map (H, W) int32 of segment ids, 0 for void, and `id` and `label_id` of each segment."""

    def instances(self, outputs: Any, index: int, size: Size) -> list[dict[str, Any]]:
        """Predict instances, best score first: `label_id`, `score` and `mask` (bool (H, W) or run lengths) of each."""


@dataclass(frozen=True)
class View:
    """Augmentation of an image at test time: the side lengths of the protocol times `scale`, and a horizontal flip."""

    scale: float = 1.0
    flip: bool = False


def tta_views() -> tuple[View, ...]:
    """Return the views of test-time augmentation: five sizes, each also flipped."""
    return tuple(View(scale, flip) for scale in TTA_SCALES for flip in (False, True))


class GKCSegmenter:
    """GKC model with the vocabulary of a benchmark.

    Args:
        model: A `GKCForOpenVocabSegmentation`.
        processor: Its `GKCProcessor`.
        prompt_vocabulary: Vocabulary of the benchmark.
        short_side: Shorter side of the resized image in pixels.
        long_side: Maximum longer side in pixels.
        panoptic: Thresholds of panoptic results, fields of `PredictionOptions`.
        views: Augmentations of each image. The class scores of several views are summed before the arg-max.
        dtype: Data type of the image encoder and decoders, a key of `DTYPES`.
        compile: Whether to use torch.compile.

    Raises:
        ValueError: Two classes of the benchmark have the same text embeddings.
    """

    def __init__(
        self,
        model: Any,
        processor: Any,
        prompt_vocabulary: BenchmarkVocabulary,
        short_side: int,
        long_side: int,
        panoptic: Mapping[str, Any] | None = None,
        views: Sequence[View] = (View(),),
        dtype: str = "float32",
        compile: bool = False,
    ):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", UserWarning)
            # Text is encoded in fp32, before the model is cast.
            encoded = EncodedVocabulary.encode(
                prompt_vocabulary.vocabulary,
                model,
                processor,
                prompt_templates=prompt_vocabulary.templates,
                reduction=prompt_vocabulary.reduction,
            )
        _check_distinct(prompt_vocabulary, encoded, processor)
        if dtype != "float32" or compile:
            model = model.optimize_for_inference(DTYPES[dtype], compile=compile)
        self.model, self.predictor = model, GKCPredictor(model, processor)
        self.predictor.set_vocabulary(encoded)
        self.sides, self.views = (short_side, long_side), tuple(views)
        self.panoptic_options = PredictionOptions("panoptic", **(panoptic or {}))
        self.class_of = prompt_vocabulary.class_of
        self.provided = ("classes",) if len(self.views) > 1 else PREDICTION_FIELDS
        said = [str(warning.message) for warning in caught]
        self.notes = {"architecture": "gkc", "views": len(self.views), "warnings": said}

    def prepare(self, images: Sequence[np.ndarray]) -> list[list[PreparedImage]]:
        """Preprocess images for every view, see `Segmenter.prepare`."""
        return [self._prepare_view(images, view) for view in self.views]

    def _prepare_view(self, images: Sequence[np.ndarray], view: View) -> list[PreparedImage]:
        shown = [Image.fromarray(np.ascontiguousarray(image[:, ::-1] if view.flip else image)) for image in images]
        short, long = (max(1, round(side * view.scale)) for side in self.sides)
        size = {"shortest_edge": short, "longest_edge": long}
        return [self.predictor.prepare(image, size=size, do_resize=True) for image in shown]

    def forward(self, inputs: list[list[PreparedImage]]) -> list[Any]:
        """Run the model on every view, see `Segmenter.forward`."""
        return [self.predictor.forward(view) for view in inputs]

    def semantic(self, outputs: list[Any], index: int, size: Size) -> np.ndarray:
        """Predict a class map, see `Segmenter.semantic`."""
        if len(outputs) == 1:
            labels = self._result(outputs[0], index, size, PredictionOptions("semantic")).segmentation
        else:
            # The predictor resizes and decides each image alone; views are summed before the arg-max, tile by tile.
            labels = _best_of_views([_image_logits(output, index) for output in outputs], self.views, size)
        return labels.cpu().numpy().astype(np.int32)

    def panoptic(self, outputs: list[Any], index: int, size: Size) -> tuple[np.ndarray, list[dict[str, Any]]]:
        """Predict panoptic segments, see `Segmenter.panoptic`."""
        result = self._result(outputs[0], index, size, self.panoptic_options)
        segments = [{"id": segment.id, "label_id": segment.label_id} for segment in result.segments]
        return result.segmentation.cpu().numpy(), segments

    def instances(self, outputs: list[Any], index: int, size: Size) -> list[dict[str, Any]]:
        """Predict instances, see `Segmenter.instances`."""
        # The instance results of the predictor hold 100 full masks of an image; COCO's metric reads run lengths, which
        # `detections` computes one mask at a time.
        return detections(*_image_logits(outputs[0], index), size)

    def _result(self, output: Any, index: int, size: Size, options: PredictionOptions) -> SegmentationResult:
        fields = ("class_queries_logits", "masks_queries_logits", "content_sizes")
        one = {name: output[name][index : index + 1] for name in fields if output[name] is not None}
        (result,) = self.predictor.post_process(one, [size], options)
        return result


def _check_distinct(prompt_vocabulary: BenchmarkVocabulary, encoded: EncodedVocabulary, processor: Any) -> None:
    """Check that no two benchmark classes have equal embeddings; names of one class may have equal ones."""
    names: dict[int, list[str]] = {}
    for index, name in zip(
        prompt_vocabulary.class_of[prompt_vocabulary.vocabulary.class_ids].tolist(),
        prompt_vocabulary.vocabulary.flat_names,
        strict=True,
    ):
        names.setdefault(index, []).append(name)
    order = sorted(names)
    classes = Vocabulary.from_stored([names[index] for index in order])
    class_ids = torch.tensor([order.index(index) for index in prompt_vocabulary.class_of[encoded.class_ids.tolist()]])
    try:
        EncodedVocabulary(classes, encoded.class_embeds, class_ids).check_distinct(processor, distinct=True)
    except ValueError as error:
        raise ValueError(f"--model: {error}") from error


def detections(class_logits: Tensor, mask_logits: Tensor, content: Size | None, size: Size) -> list[dict[str, Any]]:
    """Predict the 100 highest-scoring instances of one image, with masks in COCO run-length encoding."""
    result = instance_segmentation(
        class_logits, mask_logits, content, size, threshold=0.0, top_k=DETECTIONS, return_coco_annotation=True
    )
    return [
        {"label_id": segment["label_id"], "score": segment["score"], "mask": mask}
        for segment, mask in zip(result["segments_info"], result["segmentation"], strict=True)
    ]


def _image_logits(outputs: Any, index: int) -> tuple[Tensor, Tensor, Size | None]:
    """Return class logits (Q, K + 1), mask logits (Q, h, w) and content size of one image of a batch."""
    contents = outputs.content_sizes
    content = None if contents is None else tuple(contents[index].tolist())
    return outputs.class_queries_logits[index], outputs.masks_queries_logits[index], content


def _best_of_views(images: Sequence[tuple], views: Sequence[View], size: Size) -> Tensor:
    """Compute the class map (H, W) of the highest score sums over all views, one row tile at a time."""
    class_scores = [logits.float().softmax(dim=-1)[:, :-1].T for logits, _, _ in images]
    resamplers = [MaskResampler(masks, content, size) for _, masks, content in images]
    labels = torch.empty(size, dtype=torch.int64, device=class_scores[0].device)
    planes = 2 * (class_scores[0].shape[1] + class_scores[0].shape[0])
    for tiles in zip(*(resampler.tiles(planes) for resampler in resamplers), strict=True):
        rows, total = tiles[0][0], 0
        for (_, logits), scores, view in zip(tiles, class_scores, views, strict=True):
            masks = (logits.flip(-1) if view.flip else logits).sigmoid()
            total = total + scores @ masks.flatten(1)
        labels[rows] = total.argmax(dim=0).view(-1, size[1])
    return labels
