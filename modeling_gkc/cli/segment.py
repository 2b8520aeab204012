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
"""`gkc segment`: cut pictures into words."""

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from ..atomic_files import atomic_path, atomic_write_json
from ..class_embeddings import GKCClassEmbeddings, add_void_words, encode_vocabulary, load_class_embeddings
from ..image_processing_gkc import read_image
from ..post_processing import encode_rle, semantic_segmentation, semantic_segments, void_label
from ..processing_gkc import GKCProcessor
from ..prompt_templates import resolve_templates
from ..visualization import DrawnSegment, draw_overlay, label_map, shade
from ..vocabulary import Vocabulary, color_palette
from .checks import OUTPUT_SUFFIXES
from .common import (
    UserError,
    default_model_path,
    error_line,
    load_checkpoint,
    pick_device,
    user_errors,
    warnings_as_lines,
)


@dataclass
class Words:
    """
    An encoded vocabulary, words that mean "none of these" included.

    Args:
        vocabulary: K + V classes.
        embeddings: Their text embeddings.
        void_ids: The V classes whose pixels become void.
    """

    vocabulary: Vocabulary
    embeddings: GKCClassEmbeddings
    void_ids: list[int]


@dataclass
class Segmenter:
    """A loaded model with its words and settings, ready for many images."""

    model: Any
    processor: GKCProcessor
    words: Words
    task: str
    threshold: float
    void_threshold: float | None

    @property
    def void_id(self) -> int:
        """Value of void pixels in the maps: one that fits into a picture without sign."""
        return void_label(len(self.words.vocabulary)) if self.task == "semantic" else 0

    @torch.inference_mode()
    def __call__(self, image: Image.Image) -> tuple[np.ndarray, list[dict[str, Any]]]:
        """Map (H, W) of ids, and the segments in it: `id`, `label_id` and `score`."""
        inputs = self.processor(images=image, return_tensors="pt").to(self.model.device)
        outputs = self.model(**inputs, **self.words.embeddings)
        size = (image.height, image.width)
        void = {
            "void_threshold": self.void_threshold,
            "void_label_ids": self.words.void_ids,
            "void_id": self.void_id,
        }
        if self.task == "semantic":
            return self._semantic(outputs, size, void)
        if self.task == "instance":
            (result,) = self.processor.post_process_instance_segmentation(
                outputs, target_sizes=[size], threshold=self.threshold, **void
            )
        else:
            stuff = self.words.vocabulary.stuff_ids
            (result,) = self.processor.post_process_panoptic_segmentation(
                outputs, target_sizes=[size], threshold=self.threshold, label_ids_to_fuse=stuff, **void
            )
        return result["segmentation"].cpu().numpy(), result["segments_info"]

    def _semantic(
        self, outputs: Any, size: tuple[int, int], void: dict[str, Any]
    ) -> tuple[np.ndarray, list[dict[str, Any]]]:
        content_sizes = outputs.content_sizes.tolist()
        labels, scores = semantic_segmentation(
            outputs.class_queries_logits[0],
            outputs.masks_queries_logits[0],
            content_size=tuple(content_sizes[0]),
            target_size=size,
            **void,
        )
        return labels.cpu().numpy(), semantic_segments(labels, scores, len(self.words.vocabulary))


def segment(arguments: argparse.Namespace) -> int:
    """Run `gkc segment` for arguments that `check_segment` has seen; the exit code."""
    folder, (images, left_out) = Path(arguments.out), arguments.found
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    segmenter = _load(arguments)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out: cannot make the folder {error_line(error)}") from error
    for line in left_out:
        print(f"gkc: {line}", file=sys.stderr)

    failures = 0
    model_name = str(segmenter.model.name_or_path)
    for image in tqdm(images, unit="image", disable=None):
        try:
            overlay = _segment_file(segmenter, image.path, folder / image.name, model_name)
            tqdm.write(str(overlay), file=sys.stdout)
        except UserError:
            raise
        except Exception as error:  # whatever is wrong with one file, the others are done
            failures += 1
            reason = error_line(error)
            reason = reason if str(image.path) in reason else f"{image.path}: {reason}"
            tqdm.write(f"gkc: skipped: {reason}", file=sys.stderr)
    if failures:
        print(f"gkc: {failures} of {len(images)} images could not be done", file=sys.stderr)
    return 1 if failures else 0


def _load(arguments: argparse.Namespace) -> Segmenter:
    # What was typed is read before the model, so that a slip costs no waiting.
    labels, void_labels = _typed("--labels", arguments.labels), _typed("--void-labels", arguments.void_labels)
    templates = None
    if arguments.templates:
        with user_errors("--templates"):
            templates = resolve_templates(arguments.templates)
    model, processor = load_checkpoint(arguments.model or default_model_path())
    with user_errors("--device"):
        model.to(pick_device(arguments.device))
    if templates:
        processor.prompt_templates = templates
    words = _words(arguments.vocab, labels, model, processor)
    with user_errors("--void-labels"), warnings_as_lines():
        words = Words(*add_void_words(words.vocabulary, words.embeddings, void_labels, model, processor))
    threshold = 0.5 if arguments.threshold is None else arguments.threshold
    return Segmenter(model, processor, words, arguments.task, threshold, arguments.void_threshold)


def _typed(option: str, text: str | None) -> Vocabulary | None:
    if text is None:
        return None
    with user_errors(option), warnings_as_lines():
        return Vocabulary.parse(text)


def _words(file: str | None, labels: Vocabulary | None, model: Any, processor: GKCProcessor) -> Words:
    if labels is not None:
        labels = labels.with_kinds_of(model.vocabulary)
        with user_errors("--labels"), warnings_as_lines():
            return Words(labels, encode_vocabulary(labels, model, processor), [])
    if file is not None:
        with user_errors("--vocab"):
            embeddings, vocabulary = load_class_embeddings(file, model)
        return Words(vocabulary.with_kinds_of(model.vocabulary), embeddings, [])
    if model.vocabulary is None:
        raise UserError("the checkpoint stores no words: name them with --labels")
    stored = GKCClassEmbeddings(class_embeds=model.vocabulary_embeds, class_ids=model.vocabulary_class_ids)
    return Words(model.vocabulary, stored, [])


def _segment_file(segmenter: Segmenter, path: Path, target: Path, model_name: str) -> Path:
    """Cut one picture and write `target` + .overlay.png, .labels.png and .json; gives the overlay's path."""
    image = read_image(path)
    segmentation, segments = segmenter(image)
    if not segments:
        message = "nothing was found; ask for other words, or lower --threshold or --void-threshold"
        tqdm.write(f"gkc: {path}: {message}", file=sys.stderr)
    vocabulary, void = segmenter.words.vocabulary, segmenter.void_id
    drawn = _drawn_segments(segments, vocabulary, semantic=segmenter.task == "semantic")
    result = {
        "image": str(path),
        "size": [image.height, image.width],
        "task": segmenter.task,
        "model": model_name,
        "labels": vocabulary.labels[: len(vocabulary) - len(segmenter.words.void_ids)],
        "void_id": void,
        "void_labels": [vocabulary.labels[index] for index in segmenter.words.void_ids],
        "segments": [_describe(segment, segmentation, vocabulary) for segment in segments],
    }
    colors = {segment.id: segment.color for segment in drawn}
    pictures = (draw_overlay(image, segmentation, drawn), label_map(segmentation, colors, max_id=void))
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        for picture, suffix in zip(pictures, OUTPUT_SUFFIXES, strict=True):
            with atomic_path(f"{target}{suffix}") as temporary:
                picture.save(temporary)
        atomic_write_json(f"{target}.json", result, indent=1)
    except OSError as error:  # of the folder or the disk, not of this picture: the next one would fail too
        raise UserError(f"--out: cannot write the results of {path}: {error_line(error)}") from error
    return Path(f"{target}{OUTPUT_SUFFIXES[0]}")


def _drawn_segments(segments: list[dict[str, Any]], vocabulary: Vocabulary, semantic: bool) -> list[DrawnSegment]:
    """Segments in the colours of their classes, or of their own where the classes have none."""
    spread = None if semantic or vocabulary.colors else color_palette(len(segments))
    palette, label_ids = vocabulary.palette, [segment["label_id"] for segment in segments]
    drawn = []
    for index, segment in enumerate(segments):
        label_id = label_ids[index]
        label, earlier = vocabulary.labels[label_id], label_ids[:index].count(label_id)
        if label_ids.count(label_id) > 1:
            label += f" {earlier + 1}"
        color = spread[index] if spread else shade(palette[label_id], earlier)
        drawn.append(DrawnSegment(segment["id"], label, color, None if semantic else segment["score"]))
    return drawn


def _describe(segment: dict[str, Any], segmentation: np.ndarray, vocabulary: Vocabulary) -> dict[str, Any]:
    inside = segmentation == segment["id"]
    rows, columns = np.flatnonzero(inside.any(axis=1)), np.flatnonzero(inside.any(axis=0))
    top, left = int(rows[0]), int(columns[0])
    return {
        "id": segment["id"],
        "label_id": segment["label_id"],
        "label": vocabulary.labels[segment["label_id"]],
        "score": round(segment["score"], 6),
        "area": int(inside.sum()),
        "bbox": [left, top, int(columns[-1]) - left + 1, int(rows[-1]) - top + 1],
        "segmentation": encode_rle(inside),
    }


__all__ = ["Segmenter", "Words", "segment"]
