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
"""Image-segmentation pipeline with a vocabulary that can be set in each call.

    from modeling_gkc import GKCSegmentationPipeline
    from transformers import pipeline

    segmenter = pipeline("image-segmentation", model="folder", pipeline_class=GKCSegmentationPipeline)
    segmenter("image.png", labels="dog; sofa, couch; lamp", subtask="semantic")

`pipeline("image-segmentation", model="folder")` without `pipeline_class` works too, but only with the vocabulary
stored in the checkpoint. `modeling_gkc.remote_code` describes how to publish a checkpoint together with this pipeline.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from transformers.pipelines.image_segmentation import ImageSegmentationPipeline

from .image_processing_gkc import URL_TIMEOUT_S
from .predictor import (
    TASK_OPTIONS,
    GKCPredictor,
    PredictionOptions,
    PreparedImage,
    is_file_object,
    place_name,
    prepare_image,
)
from .processing_gkc import GKCProcessor
from .remote_code import CARD_NAME, save_with_code, write_card
from .vocabulary import VocabularyLike

SUBTASKS = ("panoptic", "instance", "semantic")
# A sentence of the model card that transformers uploads to a repository without one.
_EMPTY_CARD = "This model card has been automatically generated"


@dataclass(frozen=True)
class _NamedImage:
    """Image of a sequence, with its name in error messages."""

    image: Any
    name: str


class GKCSegmentationPipeline(ImageSegmentationPipeline):
    """Image-segmentation pipeline with any vocabulary, whose results have the format of transformers' own pipeline.

    Every parameter of a call may be passed to the constructor as its default.

    Args:
        model: A `GKCForOpenVocabSegmentation`, which is set to evaluation mode.
        processor: Its `GKCProcessor`. An `image_processor` suffices for the vocabulary stored in the checkpoint, and
            an `image_processor` and a `tokenizer` for all vocabularies.
        device: Device that the model is moved to; by default the first accelerator, otherwise the CPU.
        dtype: Floating-point type that the model is converted to, such as `torch.bfloat16` or "bfloat16"; by default
            that of the model. The former name `torch_dtype` is accepted too.
        kwargs: Arguments of transformers pipelines, such as `batch_size` and `num_workers`.

    Raises:
        ValueError: The model has another class, the processor is missing, or `dtype` is not a floating-point type.
        TypeError: A parameter is unknown.
    """

    _load_processor = True
    _load_image_processor = False
    _load_tokenizer = False

    def __init__(self, *args, **kwargs):
        dtype = _dtype(kwargs)
        super().__init__(*args, **kwargs)
        if not hasattr(self.model, "get_class_embeddings"):
            raise ValueError(f"`model` must be a GKCForOpenVocabSegmentation, got a {type(self.model).__name__}.")
        if self.processor is None and self.tokenizer is not None:
            self.processor = GKCProcessor(self.image_processor, self.tokenizer)
        if self.image_processor is None:
            self.image_processor = getattr(self.processor, "image_processor", None)
        if self.image_processor is None:
            raise ValueError("Pass the `processor` of the checkpoint: GKCProcessor.from_pretrained(...).")
        self.model.eval()
        if dtype not in (None, self.model.dtype):
            self.model.to(dtype)

    def __call__(self, inputs: Any = None, **kwargs) -> list[dict[str, Any]] | list[list[dict[str, Any]]] | Iterator:
        """Segment images.

        Args:
            inputs: Image of any type that `GKCImageProcessor` accepts, a binary file object, or several images: a
                list, a batched array, an iterator, or a torch dataset of images (for the `datasets` library,
                `KeyDataset(dataset, "image")`). The argument may also be passed as `images`, its name in transformers.
            labels: K classes in any form that `Vocabulary.parse` accepts: "dog; sofa, couch; lamp", a list, a
                `Vocabulary`, the name of a packaged vocabulary, or a file. They are encoded once per call, and prompts
                are cached. By default the vocabulary stored in the checkpoint.
            subtask: "panoptic" (default), "instance" or "semantic".
            threshold: Minimum score of a segment; by default 0.5, for the semantic subtask 0.
            mask_threshold: Panoptic and instance subtasks: minimum mask probability of the pixels of a segment; 0.5 by
                default.
            overlap_mask_area_threshold: Panoptic and instance subtasks: minimum fraction of its mask that a segment
                must cover; by default 0.8 and 0.
            top_k: Instance subtask: number of candidate pairs of query and class; 100 by default.
            void_threshold: Minimum score of a pixel, in 0..1; pixels below it belong to no segment, see
                `post_processing`.
            void_labels: Classes, as for `labels`, of image content that is none of the K classes; their pixels belong
                to no segment.
            batch_size: Images per forward pass; the results do not depend on it.
            timeout: Maximum total time in seconds to read a URL; 30 by default.
            kwargs: The parameters listed above from `labels` on.

        Returns:
            A list of segments for one image, a list of such lists for a list of images, and an iterator of such lists
            for an iterator or a dataset. A segment is a dict:

            * `label`: first name of its class;
            * `mask`: PIL image of mode "L" in the size of the upright image, 255 inside and 0 outside; the masks of an
              image do not overlap;
            * `score`, in 0..1: class score of a panoptic segment; class score times mean mask probability of an
              instance; mean of the pixel scores clipped to 1 of a semantic segment, of which each class has one.

        Raises:
            ValueError: There is no vocabulary, the labels or the subtask are invalid, or an image cannot be read.
            TypeError: A parameter is unknown, no image is given, or both `inputs` and `images` are.
        """
        images = kwargs.pop("images", None)
        if (inputs is None) == (images is None):
            raise TypeError("Pass one or several images, as `inputs` or as `images`.")
        images = _named(images if inputs is None else inputs)
        return [] if isinstance(images, list) and not images else super().__call__(images, **kwargs)

    def _sanitize_parameters(
        self,
        labels: VocabularyLike | None = None,
        subtask: str | None = None,
        threshold: float | None = None,
        mask_threshold: float | None = None,
        overlap_mask_area_threshold: float | None = None,
        top_k: int | None = None,
        void_threshold: float | None = None,
        void_labels: VocabularyLike | None = None,
        timeout: float | None = None,
        local_files_only: bool | None = None,  # `pipeline()` passes it on as a parameter of calls
        **unknown,
    ) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        if unknown:
            raise TypeError(f"{type(self).__name__} has no parameter {', '.join(map(repr, unknown))}.")
        if subtask is not None and subtask not in SUBTASKS:
            raise ValueError(f"`subtask` must be one of {', '.join(SUBTASKS)}, got {subtask!r}.")
        if void_threshold is not None and not 0 <= void_threshold <= 1:
            raise ValueError(f"`void_threshold` must be a score between 0 and 1, got {void_threshold!r}.")
        forward_params = {
            "labels": labels,
            "void_labels": void_labels,
            "subtask": subtask,
            "threshold": threshold,
            "mask_threshold": mask_threshold,
            "overlap_mask_area_threshold": overlap_mask_area_threshold,
            "top_k": top_k,
            "void_threshold": void_threshold,
        }
        given = {name: value for name, value in forward_params.items() if value is not None}
        return {} if timeout is None else {"timeout": timeout}, given, {}

    def run_single(self, inputs, preprocess_params, forward_params, postprocess_params):
        """Encode the vocabulary and segment one image."""
        params = self._prediction_params(**forward_params)
        return super().run_single(inputs, preprocess_params, params, postprocess_params)

    def get_iterator(self, inputs, num_workers, batch_size, preprocess_params, forward_params, postprocess_params):
        """Encode the vocabulary once and segment several images."""
        params = self._prediction_params(**forward_params)
        return super().get_iterator(inputs, num_workers, batch_size, preprocess_params, params, postprocess_params)

    def _prediction_params(
        self,
        labels: VocabularyLike | None = None,
        void_labels: VocabularyLike | None = None,
        subtask: str = "panoptic",
        void_threshold: float | None = None,
        **thresholds,
    ) -> dict[str, Any]:
        """Encode the vocabulary, and select the options that apply to the subtask."""
        if self.processor is None and (labels is not None or void_labels is not None):
            raise ValueError(
                "`labels` and `void_labels` need a tokenizer: construct the pipeline with the `processor`."
            )
        if labels is None and self.model.config.vocabulary is None:
            raise ValueError(
                'There is no vocabulary: pass `labels`, for example "dog; sofa, couch; lamp", or store a vocabulary '
                "in the checkpoint by `model.set_vocabulary(...)`."
            )
        predictor = GKCPredictor(self.model, self.image_processor if self.processor is None else self.processor)
        predictor.set_vocabulary(labels, void_labels=void_labels)
        names = predictor.vocabulary.labels
        if labels is None:  # the display names of stored classes may have been changed
            names = [self.model.config.id2label[index] for index in range(len(names))]
        is_semantic = subtask == "semantic"
        known = {name: value for name, value in thresholds.items() if name in TASK_OPTIONS[subtask]}
        return {
            "predictor": predictor,
            "options": PredictionOptions(subtask, is_semantic, void_threshold=void_threshold, **known),
            "names": names,
            "lowest_score": thresholds.get("threshold", 0.0) if is_semantic else 0.0,
        }

    def preprocess(self, image: Any, timeout: float = URL_TIMEOUT_S) -> dict[str, PreparedImage]:
        """Read and preprocess one image."""
        image, name = (image.image, image.name) if isinstance(image, _NamedImage) else (image, "image")
        # Collation in transformers passes on objects of unknown classes unchanged, so that image sizes may differ.
        return {"image": prepare_image(image, self.image_processor, name=name, timeout=timeout)}

    def _forward(
        self,
        model_inputs: dict[str, Any],
        predictor: GKCPredictor,
        options: PredictionOptions,
        names: list[str],
        lowest_score: float,
    ) -> dict[str, list[dict[str, Any]]]:
        """Return for each image a `map` of ids (H, W) and the `segments` in it: (id, name, score)."""
        images = model_inputs["image"]
        # Post-processing runs here on the device, since transformers moves the inputs of `postprocess` to the CPU.
        results = predictor.predict_prepared([images] if isinstance(images, PreparedImage) else images, options)
        return {
            "segments": [
                {
                    "map": result.segmentation,
                    "segments": [
                        (segment.id, names[segment.label_id], segment.score)
                        for segment in result.segments
                        if segment.score >= lowest_score
                    ],
                }
                for result in results
            ]
        }

    def postprocess(self, model_outputs: dict[str, Any]) -> list[dict[str, Any]]:
        """Convert a map of segment ids to a dict of label, score and mask for each segment."""
        segmented = model_outputs["segments"]
        segmented = segmented[0] if isinstance(segmented, list) else segmented
        ids = segmented["map"].numpy()
        return [
            {"score": score, "label": label, "mask": Image.fromarray((ids == index).astype(np.uint8) * 255)}
            for index, label, score in segmented["segments"]
        ]

    def save_pretrained(self, save_directory: str | PathLike, **kwargs) -> None:
        """Save model and processor with their code, as `push_to_hub` uploads them; see `modeling_gkc.remote_code`.

        Args:
            save_directory: Folder to write, which is created if missing.
            kwargs: Arguments of the model's `save_pretrained`.

        Raises:
            ValueError: The pipeline has no processor with a tokenizer.
        """
        if self.processor is None:
            raise ValueError("A checkpoint needs its tokenizer: construct the pipeline with the `processor`.")
        save_with_code(self.model, self.processor, save_directory, **kwargs)

    def _upload_modified_files(self, working_dir: str | PathLike, *args, **kwargs) -> Any:
        """Upload the files of the pipeline, with a model card of this library instead of the empty one."""
        card = Path(working_dir) / CARD_NAME
        if card.is_file() and _EMPTY_CARD in card.read_text(encoding="utf-8"):
            card.unlink()
            write_card(working_dir)
        return super()._upload_modified_files(working_dir, *args, **kwargs)


def _named(images: Any) -> Any:
    """Pair several images with their names in errors, as a list, generator or dataset; return one image unchanged."""
    if isinstance(images, list | tuple) or (isinstance(images, np.ndarray | Tensor) and images.ndim == 4):
        return [_NamedImage(image, place_name(index)) for index, image in enumerate(images)]
    if isinstance(images, Iterator) and not is_file_object(images):
        return (_NamedImage(image, place_name(index)) for index, image in enumerate(images))
    return _NamedImages(images) if isinstance(images, Dataset) else images


class _NamedImages(Dataset):
    """Dataset of images, each paired with its name in error messages."""

    def __init__(self, images: Dataset):
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> _NamedImage:
        return _NamedImage(self.images[index], place_name(index))


def _dtype(kwargs: dict[str, Any]) -> torch.dtype | None:
    """Return the dtype among the arguments of the constructor, None for that of the model."""
    given = kwargs.get("dtype", "auto")
    given = kwargs.get("torch_dtype") if given in (None, "auto") else given
    if given in (None, "auto"):
        return None
    dtype = getattr(torch, given.removeprefix("torch."), None) if isinstance(given, str) else given
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ValueError(f"`dtype` must be a floating-point type such as torch.bfloat16, got {given!r}.")
    return dtype


__all__ = ["GKCSegmentationPipeline"]
