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
"""`gkc segment`: segment image files with a vocabulary."""

import argparse
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from ..atomic_files import atomic_path, atomic_write_json
from ..encoded_vocabulary import EncodedVocabulary
from ..label_text import error_line
from ..post_processing import encode_rle, void_label
from ..predictor import FailedImage, GKCPredictor, Result, Segment, SemanticResult
from ..prompt_templates import resolve_templates
from ..visualization import DrawnSegment, draw_overlay, label_map, shade
from ..vocabulary import Vocabulary, color_palette
from .checks import OUTPUT_SUFFIXES
from .common import (
    UserError,
    default_model_path,
    load_checkpoint,
    parse_vocabulary,
    pick_device,
    user_errors,
    warnings_as_lines,
)

IMAGES_AHEAD = 1


def segment(arguments: argparse.Namespace) -> int:
    """Run `gkc segment` with arguments that passed `check_segment`, and return the exit code."""
    folder, (images, skipped) = Path(arguments.out), arguments.found
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    predictor = _load(arguments)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out: cannot create the folder: {error_line(error)}") from error
    for line in skipped:
        print(f"gkc: {line}", file=sys.stderr)

    options = {"task": arguments.task, "return_images": True, "void_threshold": arguments.void_threshold}
    if arguments.task == "semantic":
        # Label maps are unsigned images, so that void needs a value above all classes, including void classes.
        void_id = void_label(len(predictor.vocabulary.vocabulary))
        options |= {"return_scores": True, "void_id": void_id}
    else:
        options |= {"threshold": arguments.threshold, "void_id": 0}
    results = predictor.predict_batches(
        (image.path for image in images), prefetch_images=IMAGES_AHEAD, on_error="yield", **options
    )
    failures = 0
    with closing(results):
        for image, result in zip(tqdm(images, unit="image", disable=None), results, strict=True):
            try:
                if isinstance(result, FailedImage):
                    raise result.error
                overlay = _write_result(result, predictor, image.path, folder / image.name)
                tqdm.write(str(overlay), file=sys.stdout)
            except UserError:
                raise
            except Exception as error:  # an error of any type must not prevent the other images from being segmented
                failures += 1
                reason = error_line(error)
                reason = reason if str(image.path) in reason else f"{image.path}: {reason}"
                tqdm.write(f"gkc: skipped: {reason}", file=sys.stderr)
    if failures:
        print(f"gkc: {failures} of {len(images)} images could not be segmented", file=sys.stderr)
    return 1 if failures else 0


def _load(arguments: argparse.Namespace) -> GKCPredictor:
    """Load the checkpoint, and return its predictor with the vocabulary of the arguments."""
    # Arguments are checked before the model is loaded, so that a typing error is reported at once.
    labels = parse_vocabulary("--labels", arguments.labels)
    void_labels = parse_vocabulary("--void-labels", arguments.void_labels)
    templates = None
    if arguments.templates:
        with user_errors("--templates"):
            templates = resolve_templates(arguments.templates)
    model, processor = load_checkpoint(arguments.model or default_model_path())
    with user_errors("--device"):
        model.to(pick_device(arguments.device))
    predictor = GKCPredictor(model, processor)
    if arguments.vocab is None and labels is None and model.vocabulary is None:
        raise UserError("the checkpoint stores no vocabulary: give one with --labels")
    with user_errors("--labels" if arguments.vocab is None else "--vocab"), warnings_as_lines():
        vocabulary = labels if arguments.vocab is None else EncodedVocabulary.load(arguments.vocab, model)
        predictor.set_vocabulary(vocabulary, prompt_templates=templates)
    if void_labels is not None:
        with user_errors("--void-labels"), warnings_as_lines():
            predictor.set_vocabulary(predictor.vocabulary, void_labels=void_labels, prompt_templates=templates)
    return predictor


def _write_result(result: Result, predictor: GKCPredictor, path: Path, target: Path) -> Path:
    """Write the files TARGET.overlay.png, .labels.png and .json of one image, and return the path of the overlay."""
    if not result.segments:
        message = "no segments were found; use other --labels, or lower --threshold or --void-threshold"
        tqdm.write(f"gkc: {path}: {message}", file=sys.stderr)
    vocabulary, segmentation = predictor.vocabulary, result.segmentation.cpu().numpy()
    is_semantic = isinstance(result, SemanticResult)
    drawn = _drawn_segments(result.segments, vocabulary.vocabulary, is_semantic)
    description = {
        "image": str(path),
        "size": [result.image.height, result.image.width],
        "task": result.task,
        "model": str(predictor.model.name_or_path),
        "labels": vocabulary.labels,
        "void_id": result.void_id,
        "void_labels": [vocabulary.vocabulary.labels[index] for index in vocabulary.void_ids],
        "segments": [_describe(segment, segmentation) for segment in result.segments],
    }
    colors = {segment.id: segment.color for segment in drawn}
    output_images = (
        draw_overlay(result.image, segmentation, drawn),
        label_map(segmentation, colors, max_id=result.void_id),
    )
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        for image, suffix in zip(output_images, OUTPUT_SUFFIXES, strict=True):
            with atomic_path(f"{target}{suffix}") as temporary:
                image.save(temporary)
        atomic_write_json(f"{target}.json", description, indent=1)
    except OSError as error:  # the folder or disk is at fault, so that the next image would fail too
        raise UserError(f"--out: cannot write the results of {path}: {error_line(error)}") from error
    return Path(f"{target}{OUTPUT_SUFFIXES[0]}")


def _drawn_segments(segments: list[Segment], vocabulary: Vocabulary, is_semantic: bool) -> list[DrawnSegment]:
    """Choose the color of each segment: that of its class, or a distinct one if the classes have no colors."""
    segment_colors = None if is_semantic or vocabulary.colors else color_palette(len(segments))
    palette, label_ids = vocabulary.palette, [segment.label_id for segment in segments]
    drawn = []
    for index, segment in enumerate(segments):
        label, earlier = segment.label, label_ids[:index].count(segment.label_id)
        if label_ids.count(segment.label_id) > 1:
            label += f" {earlier + 1}"
        color = segment_colors[index] if segment_colors else shade(palette[segment.label_id], earlier)
        drawn.append(DrawnSegment(segment.id, label, color, None if is_semantic else segment.score))
    return drawn


def _describe(segment: Segment, segmentation: np.ndarray) -> dict[str, Any]:
    """Return the entry of a segment in the JSON file; boxes are [x, y, width, height] in pixels."""
    inside = segmentation == segment.id
    rows, columns = np.flatnonzero(inside.any(axis=1)), np.flatnonzero(inside.any(axis=0))
    top, left = int(rows[0]), int(columns[0])
    return {
        "id": segment.id,
        "label_id": segment.label_id,
        "label": segment.label,
        "score": round(segment.score, 6),
        "area": int(inside.sum()),
        "bbox": [left, top, int(columns[-1]) - left + 1, int(rows[-1]) - top + 1],
        "segmentation": encode_rle(inside),
    }


__all__ = ["segment"]
