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
"""`GKCPredictor`: segmentation of images with a vocabulary that is encoded once.

    from modeling_gkc import GKCPredictor

    predictor = GKCPredictor.from_pretrained("hub_card/gkc-mini")
    predictor.set_vocabulary("red disc; lawn, grass; sky")  # encoded once
    result = predictor.predict("examples/scene-1.png")
    print(result.labels, result.segmentation.shape)

    for result in predictor.predict_batches(["examples/scene-2.png", "examples/scene-3.png"], task="panoptic"):
        for segment in result.segments:
            print(segment.label, segment.score, result.mask(segment).sum())

All sizes are (height, width).
"""

import dataclasses
import io
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from functools import cached_property
from os import PathLike
from typing import Any, ClassVar, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from transformers.utils import logging

from .argument_checks import check_flags, check_fractions, check_whole_number
from .checkpoint_loading import load_checkpoint_parts
from .encoded_vocabulary import EncodedVocabulary, input_device
from .image_processing_gkc import URL_TIMEOUT_S, ImageLike, read_image
from .label_text import shortened, shown
from .post_processing import INSTANCE_VOID, PANOPTIC_VOID, semantic_segments, void_label
from .prompt_templates import TemplatesLike
from .vocabulary import VocabularyLike

TASKS = ("semantic", "instance", "panoptic")
ON_ERROR = ("raise", "yield", "skip")
# Options that apply to one task, in addition to those that apply to all tasks.
TASK_OPTIONS = {
    "semantic": ("return_scores",),
    "instance": ("threshold", "mask_threshold", "overlap_mask_area_threshold", "top_k"),
    "panoptic": ("threshold", "mask_threshold", "overlap_mask_area_threshold"),
}

logger = logging.get_logger(__name__)
Item, Value = TypeVar("Item"), TypeVar("Value")


@dataclass(frozen=True)
class PredictionOptions:
    """Options of a prediction; None stands for the default of the task.

    Args:
        task: "semantic", "instance" or "panoptic".
        return_scores: Semantic task: whether to return the score of every pixel too.
        return_images: Whether to return the upright image with its result, for drawing.
        threshold: Instance and panoptic tasks: minimum score of a segment; 0.5 by default.
        mask_threshold: Instance and panoptic tasks: minimum mask probability of the pixels of a segment; 0.5 by
            default.
        overlap_mask_area_threshold: Instance and panoptic tasks: minimum fraction of its mask that a segment must
            cover; 0 for instances and 0.8 for panoptic segments by default.
        top_k: Instance task: number of candidate pairs of query and class; 100 by default.
        void_threshold: Minimum score of a pixel; pixels below it become void, see `post_processing`.
        void_id: Value of void pixels: 255 in semantic maps (65535 with more than 255 classes), -1 in instance maps
            and 0 in panoptic maps by default.

    Raises:
        ValueError: The task is unknown, an option does not apply to it, or the value of an option is out of range.
    """

    task: str = "semantic"
    return_scores: bool = False
    return_images: bool = False
    threshold: float | None = None
    mask_threshold: float | None = None
    overlap_mask_area_threshold: float | None = None
    top_k: int | None = None
    void_threshold: float | None = None
    void_id: int | None = None

    @classmethod
    def from_arguments(cls, task: str, options: Mapping[str, Any]) -> "PredictionOptions":
        """Make options of the keyword arguments of a prediction.

        Raises:
            TypeError: An option is unknown.
            ValueError: As for the constructor.
        """
        known = [field.name for field in dataclasses.fields(cls) if field.name != "task"]
        unknown = sorted(set(options) - set(known))
        if unknown:
            raise TypeError(f"Unknown option `{shortened(unknown[0], 200)}`: the options are {', '.join(known)}.")
        return cls(task, **options)

    def __post_init__(self):
        if self.task not in TASKS:
            raise ValueError(f"`task` must be one of {', '.join(TASKS)}, got {shown(self.task)}.")
        check_flags(return_scores=self.return_scores, return_images=self.return_images)
        for name in sorted(set().union(*TASK_OPTIONS.values()) - {*TASK_OPTIONS[self.task]}):
            if getattr(self, name) is not None and getattr(self, name) is not False:
                tasks = " and ".join(task for task, names in TASK_OPTIONS.items() if name in names)
                raise ValueError(f"`{name}` applies to {tasks} results only, not to {self.task} results: remove it.")
        shares = {name: getattr(self, name) for name in TASK_OPTIONS["panoptic"]}
        check_fractions(**{name: value for name, value in shares.items() if value is not None})
        if self.top_k is not None:
            check_whole_number("top_k", self.top_k, 1)

    def post_processing_arguments(self) -> dict[str, Any]:
        """Return the options that are set, as arguments of `post_process_*_segmentation`."""
        names = (*TASK_OPTIONS[self.task], "void_threshold")
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}


@dataclass(frozen=True)
class Segment:
    """Segment of a result.

    Attributes:
        id: Value of its pixels in `segmentation`.
        label_id: Index of its class.
        label: First name of its class.
        score: Score in 0..1: class score of a panoptic segment, class score times mean mask probability of an
            instance, mean of the pixel scores clipped to 1 of a semantic segment; None for semantic segments without
            `return_scores`.
        was_fused: Whether its class is a stuff class, whose segments are merged.
    """

    id: int
    label_id: int
    label: str
    score: float | None
    was_fused: bool = False


@dataclass(eq=False, kw_only=True)
class SegmentationResult:
    """Segmentation of one image.

    Attributes:
        task: "semantic", "instance" or "panoptic".
        segmentation: (H, W) map of ids on the model's device, in the size of the upright image.
        void_id: Value of the pixels that belong to no segment.
        labels: First names of the K classes.
        image: The upright RGB image with `return_images`, else None.
    """

    task: ClassVar[str]
    segmentation: Tensor
    void_id: int
    labels: list[str]
    image: Image.Image | None = None

    def mask(self, segment: Segment) -> Tensor:
        """Return the mask (H, W) bool of a segment."""
        return self.segmentation == segment.id


@dataclass(eq=False, kw_only=True)
class SemanticResult(SegmentationResult):
    """Semantic segmentation: `segmentation` (H, W) int64 holds class indices.

    Attributes:
        scores: (H, W) fp32 highest class score of each pixel, including void pixels, between 0 and the number of
            queries; None without `return_scores`.
    """

    task: ClassVar[str] = "semantic"
    scores: Tensor | None = None

    @cached_property
    def segments(self) -> list[Segment]:
        """Segments of the classes that have pixels, in the order of the classes."""
        return [
            Segment(label=self.labels[info["label_id"]], **info)
            for info in semantic_segments(self.segmentation, self.scores, len(self.labels))
        ]


@dataclass(eq=False, kw_only=True)
class InstanceResult(SegmentationResult):
    """Instance segmentation: `segmentation` (H, W) int32 holds instance ids, higher scores in front.

    Attributes:
        segments: Instances, best score first.
    """

    task: ClassVar[str] = "instance"
    segments: list[Segment]


@dataclass(eq=False, kw_only=True)
class PanopticResult(SegmentationResult):
    """Panoptic segmentation: `segmentation` (H, W) int32 holds segment ids; a stuff class has at most one segment.

    Attributes:
        segments: Segments in the order of their ids.
    """

    task: ClassVar[str] = "panoptic"
    segments: list[Segment]


Result = SemanticResult | InstanceResult | PanopticResult


@dataclass(frozen=True, eq=False)
class FailedImage:
    """Image for which `predict_batches` has no result.

    Attributes:
        index: Index of the image in the iterable, from 0.
        image: Item of the iterable.
        error: Error of the image; the message names the file or the index.
    """

    index: int
    image: Any
    error: Exception


@dataclass(frozen=True, eq=False)
class PreparedImage:
    """Preprocessed image.

    Attributes:
        pixel_values: (1, 3, h, w) normalized and padded image.
        pixel_mask: (1, h, w) mask, 1 at image pixels and 0 at padding.
        image: The upright RGB image.
    """

    pixel_values: Tensor
    pixel_mask: Tensor
    image: Image.Image

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) of the upright image and of results."""
        return self.image.height, self.image.width


def prepare_image(
    image: Any, processor: Any, *, name: str = "image", timeout: float = URL_TIMEOUT_S, **settings
) -> PreparedImage:
    """Read, resize, normalize and pad one image.

    Args:
        image: Image of any type that `GKCImageProcessor` accepts, or a file object opened in binary mode.
        processor: A `GKCProcessor` or `GKCImageProcessor`.
        name: Name of the image in error messages if it has no file name.
        timeout: Maximum total time in seconds to read a URL.
        settings: Arguments of the image processor for this image.

    Raises:
        ValueError: The image cannot be read; the message names the file or `name`.
        FileNotFoundError: The path does not exist.
        TypeError: `image` is not of a supported type.
    """
    if is_file_object(image):
        name = str(getattr(image, "name", name))
        image = _read_file(image, name)
    upright = read_image(image, name=name, timeout=timeout)
    # Arrays are passed on unchanged: the image processor rescales them according to their value range.
    source = image if isinstance(image, np.ndarray | Tensor) else upright
    inputs = getattr(processor, "image_processor", processor)(source, return_tensors="pt", **settings)
    return PreparedImage(inputs["pixel_values"], inputs["pixel_mask"], upright)


def is_file_object(image: Any) -> bool:
    """Return whether an image is an opened file object."""
    return callable(getattr(image, "read", None))


def is_single_image(images: Any) -> bool:
    """Return whether a value is one image instead of a collection of images."""
    if isinstance(images, np.ndarray | Tensor):
        return images.ndim < 4
    return isinstance(images, str | bytes | bytearray | PathLike | Image.Image) or is_file_object(images)


def _read_file(file: Any, name: str) -> bytes:
    """Read a file object completely, from its start if it is seekable."""
    if isinstance(file, io.TextIOBase):
        raise ValueError(f"{name}: open the file in binary mode, for example by open(path, 'rb').")
    if getattr(file, "seekable", bool)():
        file.seek(0)
    return file.read()


def place_name(index: int) -> str:
    """Return the name of an image in messages by its index."""
    return f"image {index + 1} (index {index})"


def prefetch(items: Iterable[Item], function: Callable[[Item], Value], ahead: int) -> Iterator[Value]:
    """Apply a function to items in a background thread ahead of their use, in order.

    Args:
        items: Items, which are iterated in the background thread too.
        function: Function that is applied to each item.
        ahead: Maximum number of values to compute ahead; 0 uses no thread.

    Yields:
        The values. An error of the iterable or of the function is raised in place of its value and ends the iteration.
    """
    if not ahead:
        yield from map(function, items)
        return
    iterator, end = iter(items), object()

    def advance() -> Any:
        item = next(iterator, end)
        return end if item is end else function(item)

    executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="prefetch")
    try:
        pending = deque([executor.submit(advance)])
        while (value := pending.popleft().result()) is not end:
            # Two calls for each value fill the queue step by step, because `ahead` can be a large number.
            pending.extend(executor.submit(advance) for _ in range(min(2, ahead - len(pending))))
            yield value
    finally:
        executor.shutdown(cancel_futures=True)


class GKCPredictor:
    """Predictor that segments images with a vocabulary that is encoded once.

    Args:
        model: A `GKCForOpenVocabSegmentation`, which is set to evaluation mode and stays on its device.
        processor: Its `GKCProcessor`; a `GKCImageProcessor` suffices for encoded and stored vocabularies.

    Example:
        >>> predictor = GKCPredictor.from_pretrained("hub_card/gkc-mini")
        >>> predictor.set_vocabulary("red disc; lawn, grass; sky", void_labels="yellow square")
        >>> predictor.predict("examples/scene-1.png").segmentation.shape
        torch.Size([288, 288])
    """

    def __init__(self, model: Any, processor: Any):
        self.model, self.processor = model.eval(), processor
        self._vocabulary: EncodedVocabulary | None = None

    @classmethod
    def from_pretrained(
        cls, path: str | PathLike, *, device: str | torch.device | None = None, dtype: torch.dtype | None = None
    ) -> "GKCPredictor":
        """Load a model and its processor, and return a predictor.

        Args:
            path: Checkpoint folder, or Hub repository `owner/name`.
            device: Device of the model; the CPU by default.
            dtype: Data type of the model, such as `torch.bfloat16` or "bfloat16"; by default the type of the stored
                weights.

        Raises:
            ValueError: The checkpoint is damaged or of another library, or `dtype` is not a data type.
        """
        if isinstance(dtype, str):
            dtype = getattr(torch, dtype, dtype)
        if not isinstance(dtype, torch.dtype | None):
            raise ValueError(f"`dtype` must be a type such as torch.bfloat16 or its name, got {shown(dtype)}.")
        model, processor = load_checkpoint_parts(path)
        return cls(model.to(device=device, dtype=dtype), processor)

    @property
    def vocabulary(self) -> EncodedVocabulary | None:
        """Vocabulary of the next prediction: the one that was set, otherwise the one stored in the checkpoint."""
        return EncodedVocabulary.from_model(self.model) if self._vocabulary is None else self._vocabulary

    def set_vocabulary(
        self,
        vocabulary: VocabularyLike | EncodedVocabulary | None,
        *,
        void_labels: VocabularyLike | None = None,
        prompt_templates: TemplatesLike | None = None,
        reduction: str | None = None,
    ) -> None:
        """Set the classes of the following predictions.

        The model caches prompts, so that only new ones are encoded. If the vocabulary does not tell things from stuff,
        the kind of each name in the stored vocabulary is used.

        Args:
            vocabulary: K classes in any form that `Vocabulary.parse` accepts, such as "dog; sofa, couch; lamp", or an
                encoded vocabulary; None selects the vocabulary stored in the checkpoint.
            void_labels: V classes for image content that is none of the K classes; their pixels become void.
            prompt_templates: Prompt templates of the words; by default those of the processor.
            reduction: How the logits of several names of a class are reduced; see `EncodedVocabulary`.

        Raises:
            ValueError: As for `EncodedVocabulary.encode`, the checkpoint stores no vocabulary, or `prompt_templates`
                are given without words to encode.

        Warns:
            UserWarning: As for `EncodedVocabulary.encode`.
        """
        if vocabulary is None or isinstance(vocabulary, EncodedVocabulary):
            if prompt_templates is not None and void_labels is None:
                raise ValueError(
                    "`prompt_templates` apply to words, but an encoded or stored vocabulary was given: give words, or "
                    "remove `prompt_templates`."
                )
            encoded = self._stored_vocabulary() if vocabulary is None else vocabulary
            if reduction is not None:
                encoded = dataclasses.replace(encoded, reduction=reduction)
        else:
            encoded = EncodedVocabulary.encode(
                vocabulary, self.model, self.processor, prompt_templates=prompt_templates, reduction=reduction
            )
        if encoded.vocabulary.is_thing is None and vocabulary is not None:
            # Before void classes, which have kinds of their own.
            encoded = encoded.with_is_thing_from(self.model.vocabulary)
        self._vocabulary = encoded.with_void(
            void_labels, self.model, self.processor, prompt_templates=prompt_templates
        )

    def predict(
        self, images: ImageLike | Sequence[ImageLike], task: str = "semantic", **options
    ) -> Result | list[Result]:
        """Segment one image, or several images as one batch.

        A result does not depend on the other images of the batch. `predict_batches` segments any number of images.

        Args:
            images: Image of any type that `GKCImageProcessor` accepts, or a list or batched array of images.
            task: "semantic", "instance" or "panoptic".
            options: Fields of `PredictionOptions`, such as `return_scores=True` or `void_threshold=0.4`.

        Returns:
            A `SemanticResult`, `InstanceResult` or `PanopticResult`; for several images a list of results.

        Raises:
            ValueError: No vocabulary is set, an option is invalid, or an image cannot be read; the message names the
                file or the index of the image.
            TypeError: An option is unknown, or an image is not of a supported type.
        """
        options = PredictionOptions.from_arguments(task, options)
        if not isinstance(images, list | tuple) and not (isinstance(images, np.ndarray | Tensor) and images.ndim == 4):
            return self.predict_prepared([self.prepare(images)], options)[0]
        names = (place_name(index) for index in range(len(images)))
        return self.predict_prepared(
            [self.prepare(image, name=name) for image, name in zip(images, names, strict=True)], options
        )

    def predict_batches(
        self,
        images: Iterable[ImageLike],
        task: str = "semantic",
        *,
        batch_size: int = 1,
        prefetch_images: int | None = None,
        on_error: str = "raise",
        **options,
    ) -> Iterator[Result | FailedImage]:
        """Segment any number of images, and read the next images in a thread while the model computes.

        At most `batch_size + prefetch_images` images are held in memory, so that `images` may be endless. Later calls
        of `set_vocabulary` do not affect the iterator.

        Args:
            images: Iterable of images of any type that `predict` accepts, such as a list, a generator or a data set.
            task: "semantic", "instance" or "panoptic".
            batch_size: Images per forward pass; the results do not depend on it.
            prefetch_images: Images to read ahead; by default `batch_size`. 0 uses no thread.
            on_error: Handling of an image that cannot be read or segmented: "raise" its error, "yield" a
                `FailedImage` in place of its result, or "skip" it with a log warning. Errors of the iterable itself
                are always raised.
            options: As for `predict`.

        Returns:
            An iterator over the results, in the order of the images.

        Raises:
            ValueError: As for `predict`; invalid arguments raise before an image is read.
            TypeError: As for `predict`, or `images` is a single image or no ordered iterable.
        """
        options = PredictionOptions.from_arguments(task, options)
        if is_single_image(images):
            raise TypeError(
                f"`images` must be an iterable of images, such as a list, got one image ({type(images).__name__}): "
                "put it into a list, or use `predict`."
            )
        if not isinstance(images, Iterable) or isinstance(images, Mapping | set | frozenset):
            raise TypeError(f"`images` must be an iterable of images, such as a list, got a {type(images).__name__}.")
        batch_size = check_whole_number("batch_size", batch_size, 1)
        ahead = batch_size if prefetch_images is None else check_whole_number("prefetch_images", prefetch_images, 0)
        if on_error not in ON_ERROR:
            raise ValueError(f"`on_error` must be one of {', '.join(ON_ERROR)}, got {shown(on_error)}.")
        return self._predict_stream(images, options, self._known_vocabulary(), batch_size, ahead, on_error)

    def prepare(self, image: Any, **settings) -> PreparedImage:
        """Read and preprocess one image for `forward`, see `prepare_image`."""
        return prepare_image(image, self.processor, **settings)

    def forward(self, images: Sequence[PreparedImage], vocabulary: EncodedVocabulary | None = None) -> Any:
        """Compute the outputs of the model for a batch of preprocessed images.

        Args:
            images: B images that `prepare` returned.
            vocabulary: Vocabulary of the outputs; by default that of the predictor.

        Returns:
            A `GKCForOpenVocabSegmentationOutput`, without gradients.
        """
        vocabulary = self._known_vocabulary() if vocabulary is None else vocabulary
        device = input_device(self.model)
        with torch.no_grad():
            return self.model(
                pixel_values=_stack([image.pixel_values for image in images]).to(device),
                pixel_mask=_stack([image.pixel_mask for image in images]).to(device),
                **vocabulary.model_inputs(),
            )

    def post_process(
        self,
        outputs: Any,
        sizes: Sequence[tuple[int, int]],
        options: PredictionOptions,
        vocabulary: EncodedVocabulary | None = None,
    ) -> list[Result]:
        """Convert outputs of `forward` to results.

        Args:
            outputs: Outputs of the model for B images.
            sizes: (height, width) of each result, usually `PreparedImage.size`.
            options: Task and options of the results.
            vocabulary: Vocabulary of the outputs; by default that of the predictor.

        Raises:
            ValueError: A threshold or `void_id` does not fit the outputs.
        """
        vocabulary = self._known_vocabulary() if vocabulary is None else vocabulary
        arguments = options.post_processing_arguments() | {
            "target_sizes": list(sizes),
            "void_label_ids": vocabulary.void_ids,
        }
        labels, void_id = vocabulary.labels, options.void_id
        if options.task == "semantic":
            void_id = void_label(len(labels)) if void_id is None else void_id
            found = self.processor.post_process_semantic_segmentation(outputs, **arguments, void_id=void_id)
            maps = [
                (each["segmentation"], each["scores"]) if options.return_scores else (each, None) for each in found
            ]
            return [
                SemanticResult(segmentation=classes, void_id=void_id, labels=labels, scores=scores)
                for classes, scores in maps
            ]
        if options.task == "instance":
            result_class, void_id = InstanceResult, INSTANCE_VOID if void_id is None else void_id
            found = self.processor.post_process_instance_segmentation(outputs, **arguments, void_id=void_id)
        else:
            result_class, void_id = PanopticResult, PANOPTIC_VOID if void_id is None else void_id
            stuff = vocabulary.vocabulary.stuff_ids
            found = self.processor.post_process_panoptic_segmentation(
                outputs, **arguments, void_id=void_id, label_ids_to_fuse=stuff
            )
        return [
            result_class(
                segmentation=each["segmentation"],
                void_id=void_id,
                labels=labels,
                segments=[Segment(label=labels[info["label_id"]], **info) for info in each["segments_info"]],
            )
            for each in found
        ]

    def predict_prepared(
        self,
        images: Sequence[PreparedImage],
        options: PredictionOptions,
        vocabulary: EncodedVocabulary | None = None,
    ) -> list[Result]:
        """Segment preprocessed images as one batch, by `forward` and `post_process`."""
        vocabulary = self._known_vocabulary() if vocabulary is None else vocabulary
        if not images:
            return []
        outputs = self.forward(images, vocabulary)
        results = self.post_process(outputs, [image.size for image in images], options, vocabulary)
        if options.return_images:
            for result, image in zip(results, images, strict=True):
                result.image = image.image
        return results

    def _known_vocabulary(self) -> EncodedVocabulary:
        return self._stored_vocabulary() if self._vocabulary is None else self._vocabulary

    def _stored_vocabulary(self) -> EncodedVocabulary:
        stored = EncodedVocabulary.from_model(self.model)
        if stored is None:
            raise ValueError(
                'No vocabulary is set: call `predictor.set_vocabulary("dog; sofa, couch; lamp")`, or store one in the '
                "checkpoint by `model.set_vocabulary(...)`."
            )
        return stored

    def _predict_stream(
        self,
        images: Iterable[ImageLike],
        options: PredictionOptions,
        vocabulary: EncodedVocabulary,
        batch_size: int,
        ahead: int,
        on_error: str,
    ) -> Iterator[Result | FailedImage]:
        with closing(prefetch(enumerate(images), self._prepare_entry, ahead)) as entries:
            for batch in _batches(entries, batch_size):
                for result in self._predict_entries(batch, options, vocabulary):
                    if isinstance(result, FailedImage) and on_error == "raise":
                        raise result.error
                    if isinstance(result, FailedImage) and on_error == "skip":
                        place, reason = place_name(result.index), shortened(str(result.error))
                        logger.warning("Skipped %s", reason if place in reason else f"{place}: {reason}")
                    else:
                        yield result

    def _prepare_entry(self, numbered: tuple[int, Any]) -> "_Entry | FailedImage":
        index, image = numbered
        try:
            return _Entry(index, image, self.prepare(image, name=place_name(index)))
        except Exception as error:  # an error of any type must not prevent the other images from being segmented
            return FailedImage(index, image, error)

    def _predict_entries(
        self,
        entries: Sequence["_Entry | FailedImage"],
        options: PredictionOptions,
        vocabulary: EncodedVocabulary,
    ) -> list[Result | FailedImage]:
        """Segment a batch; if it fails, segment its images one by one to find out which of them fail."""
        prepared = [entry for entry in entries if isinstance(entry, _Entry)]
        try:
            results = iter(self.predict_prepared([entry.prepared for entry in prepared], options, vocabulary))
        except Exception as error:  # such as insufficient memory for one of the images
            if len(entries) > 1:
                return [result for entry in entries for result in self._predict_entries([entry], options, vocabulary)]
            error.add_note(f"The error was raised for {place_name(prepared[0].index)}.")
            return [FailedImage(prepared[0].index, prepared[0].image, error)]
        return [next(results) if isinstance(entry, _Entry) else entry for entry in entries]


@dataclass(frozen=True, eq=False)
class _Entry:
    """Preprocessed image of an iterable, with its index and the item of the iterable."""

    index: int
    image: Any
    prepared: PreparedImage


def _batches(entries: Iterable[Item], batch_size: int) -> Iterator[list[Item]]:
    """Group entries into batches; entries before an error of the iterator form a smaller batch."""
    batch: list[Item] = []
    try:
        for entry in entries:
            batch.append(entry)
            if len(batch) == batch_size:
                yield batch
                batch = []
    except Exception:
        if batch:
            yield batch
        raise
    if batch:
        yield batch


def _stack(tensors: Sequence[Tensor]) -> Tensor:
    """Pad tensors (1, ..., h_i, w_i) with zeros at the right and bottom, and join them to one (B, ..., h, w)."""
    height, width = (max(tensor.shape[axis] for tensor in tensors) for axis in (-2, -1))
    return torch.cat([F.pad(t, (0, width - t.shape[-1], 0, height - t.shape[-2])) for t in tensors])


__all__ = [
    "FailedImage",
    "GKCPredictor",
    "InstanceResult",
    "PanopticResult",
    "PredictionOptions",
    "PreparedImage",
    "Segment",
    "SegmentationResult",
    "SemanticResult",
    "prefetch",
    "prepare_image",
]
