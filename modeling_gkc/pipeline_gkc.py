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
"""The image-segmentation pipeline with words that each call may choose.

    from modeling_gkc import GKCSegmentationPipeline
    from transformers import pipeline

    segmenter = pipeline("image-segmentation", model="folder", pipeline_class=GKCSegmentationPipeline)
    segmenter("image.png", labels="dog; sofa, couch; lamp", subtask="semantic")

transformers' own `pipeline("image-segmentation", model="folder")` works too, on the words stored in the checkpoint
only. `modeling_gkc.remote_code` says how a checkpoint is published so that it brings this pipeline along.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from types import GeneratorType
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
# A sentence of the card that transformers pushes where a repository has none.
_EMPTY_CARD = "This model card has been automatically generated"


@dataclass(frozen=True)
class _Listed:
    """An image of several, and what to call it in errors."""

    image: Any
    name: str


class GKCSegmentationPipeline(ImageSegmentationPipeline):
    """
    Segments images into any words, with the results of transformers' image-segmentation pipeline.

    Every parameter of a call may be given to the constructor instead, as its default.

    Args:
        model: A `GKCForOpenVocabSegmentation`; put into evaluation mode.
        processor: Its `GKCProcessor`. An `image_processor` is enough for the words stored in the checkpoint, and with
            a `tokenizer` beside it for all others.
        device: Where to compute; the model is moved there. By default the first accelerator, else the CPU.
        dtype: Precision such as `torch.bfloat16` or "bfloat16", to which the model is converted; by default its own.
            `torch_dtype`, its old name, is understood too.
        kwargs: As for every pipeline of transformers: `batch_size`, `num_workers`, ...

    Raises:
        ValueError: the model is of another kind, there is no processor, or `dtype` is none of floating point.
        TypeError: an unknown parameter.
    """

    _load_processor = True
    _load_image_processor = False
    _load_tokenizer = False

    def __init__(self, *args, **kwargs):
        dtype = _dtype(kwargs)
        super().__init__(*args, **kwargs)
        if not hasattr(self.model, "get_class_embeddings"):
            raise ValueError(f"a GKCForOpenVocabSegmentation is needed, got a {type(self.model).__name__}.")
        if self.processor is None and self.tokenizer is not None:
            self.processor = GKCProcessor(self.image_processor, self.tokenizer)
        if self.image_processor is None:
            self.image_processor = getattr(self.processor, "image_processor", None)
        if self.image_processor is None:
            raise ValueError("give the `processor` of the checkpoint: GKCProcessor.from_pretrained(...).")
        self.model.eval()
        if dtype not in (None, self.model.dtype):
            self.model.to(dtype)

    def __call__(self, inputs: Any = None, **kwargs) -> list[dict[str, Any]] | list[list[dict[str, Any]]] | Iterator:
        """
        Segment images.

        Args:
            inputs: One image of any kind that `GKCImageProcessor` reads, or a binary file object, or several: a list,
                an array with a batch axis, an iterator, or a torch dataset of images (of `datasets`:
                `KeyDataset(dataset, "image")`). May also be given as `images`, as to transformers' own pipeline.
            labels: The K classes, in any form that `Vocabulary.parse` takes: "dog; sofa, couch; lamp", a list, a
                `Vocabulary`, a packaged name, a file. They are encoded once per call, and only where the model has not
                seen them before. Default: the words stored in the checkpoint.
            subtask: "panoptic" (also the default), "instance" or "semantic".
            threshold: Lowest score of a segment; by default 0.5, and in semantic results 0.
            mask_threshold: Panoptic and instance: lowest mask probability of a pixel inside; 0.5 by default.
            overlap_mask_area_threshold: Panoptic and instance: lowest share of its mask that a segment must show; 0.8
                and 0 by default.
            top_k: Instance: pairs of query and class to consider; 100 by default.
            void_threshold: Pixels whose score, 0..1, is below belong to no segment; see `post_processing`.
            void_labels: Words, as `labels`, for what is none of the classes; their pixels belong to no segment.
            batch_size: Images to compute at once; makes no difference to the result.
            timeout: Seconds that reading a URL may take in all; 30 by default.

        Returns:
            For one image its segments, for a list of images a list of such lists, for an iterator or a dataset an
            iterator over them. A segment is a dict:

            * `label`: the first name of its class;
            * `mask`: PIL image of mode "L" and the image's upright size, 255 inside and 0 outside; the masks of an
              image do not overlap;
            * `score`, in 0..1: of panoptic segments the class score, of instances class score times mean mask
              probability, of semantic segments, one per class, the mean over their pixels of `semantic_scores`, each
              at most 1.

        Raises:
            ValueError: there are no words; labels that `Vocabulary` refuses; an unknown subtask; an unreadable image.
            TypeError: an unknown parameter, no image, or `inputs` beside `images`.
        """
        images = kwargs.pop("images", None)
        if (inputs is None) == (images is None):
            raise TypeError("give one image or several, as `inputs` or as `images`.")
        images = _as_list_or_generator(images if inputs is None else inputs)
        if isinstance(images, list) and not images:
            return []
        return super().__call__(_named(images), **kwargs)

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
        local_files_only: bool | None = None,  # of `pipeline()`, which leaves it among the parameters of a call
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
        """Segment one image; as every pipeline, with the words encoded first."""
        params = self._prediction_params(**forward_params)
        return super().run_single(inputs, preprocess_params, params, postprocess_params)

    def get_iterator(self, inputs, num_workers, batch_size, preprocess_params, forward_params, postprocess_params):
        """Segment several images; as every pipeline, with the words encoded first and once."""
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
        """Encode the words, and choose the options that the subtask has."""
        if self.processor is None and (labels is not None or void_labels is not None):
            raise ValueError("words need a tokenizer: construct the pipeline with the `processor` of the checkpoint.")
        if labels is None and self.model.vocabulary is None:
            raise ValueError(
                'no words to segment into: give `labels`, for example "dog; sofa, couch; lamp", or store a vocabulary '
                "in the checkpoint by `model.set_vocabulary(...)`."
            )
        predictor = GKCPredictor(self.model, self.image_processor if self.processor is None else self.processor)
        predictor.set_vocabulary(labels, void_labels=void_labels)
        names = predictor.vocabulary.labels
        if labels is None:  # stored classes may have been given other names to show since
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
        """Prepare one image."""
        image, name = (image.image, image.name) if isinstance(image, _Listed) else (image, "image")
        # In a class of its own, an image passes transformers' collation as it is and may have any size.
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
        # Here and not in `postprocess`, which transformers gives tensors of the CPU only.
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
        """A map of ids and the segments in it to one mask per segment."""
        segmented = model_outputs["segments"]
        segmented = segmented[0] if isinstance(segmented, list) else segmented
        ids = segmented["map"].numpy()
        return [
            {"score": score, "label": label, "mask": Image.fromarray((ids == index).astype(np.uint8) * 255)}
            for index, label, score in segmented["segments"]
        ]

    def save_pretrained(self, save_directory: str | PathLike, **kwargs) -> None:
        """
        Save model and processor with their code; `push_to_hub` uploads the same. See `modeling_gkc.remote_code`.

        Args:
            save_directory: Made if it is not there.
            kwargs: For the model's `save_pretrained`.

        Raises:
            ValueError: there is no processor with a tokenizer.
        """
        if self.processor is None:
            raise ValueError("a checkpoint needs its tokenizer: construct the pipeline with the `processor`.")
        save_with_code(self.model, self.processor, save_directory, **kwargs)

    def _upload_modified_files(self, working_dir: str | PathLike, *args, **kwargs) -> Any:
        """Upload what every pipeline uploads, with this library's model card instead of transformers' empty one."""
        card = Path(working_dir) / CARD_NAME
        if card.is_file() and _EMPTY_CARD in card.read_text(encoding="utf-8"):
            card.unlink()
            write_card(working_dir)
        return super()._upload_modified_files(working_dir, *args, **kwargs)


def _as_list_or_generator(inputs: Any) -> Any:
    """Several images in the forms that transformers' pipelines take for several; all else as it is."""
    if isinstance(inputs, tuple) or (isinstance(inputs, np.ndarray | Tensor) and inputs.ndim == 4):
        return list(inputs)
    return (image for image in inputs) if isinstance(inputs, Iterator) and not is_file_object(inputs) else inputs


def _named(images: Any) -> Any:
    """Several images, each with what to call it in errors; one image as it is."""
    if isinstance(images, list):
        return [_listed(image, index) for index, image in enumerate(images)]
    if isinstance(images, GeneratorType):
        return (_listed(image, index) for index, image in enumerate(images))
    return _NamedImages(images) if isinstance(images, Dataset) else images


def _listed(image: Any, index: int) -> _Listed:
    return _Listed(image, place_name(index))


class _NamedImages(Dataset):
    """A dataset of images, each with what to call it in errors."""

    def __init__(self, images: Dataset):
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> _Listed:
        return _listed(self.images[index], index)


def _dtype(kwargs: dict[str, Any]) -> torch.dtype | None:
    """The precision that a constructor is given; None for the model's own."""
    given = kwargs.get("dtype", "auto")
    given = kwargs.get("torch_dtype") if given in (None, "auto") else given
    if given in (None, "auto"):
        return None
    dtype = getattr(torch, given.removeprefix("torch."), None) if isinstance(given, str) else given
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ValueError(f"`dtype` must be a precision such as torch.bfloat16, got {given!r}.")
    return dtype


__all__ = ["GKCSegmentationPipeline"]
