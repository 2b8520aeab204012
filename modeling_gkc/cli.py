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
"""The `gkc` command: cut pictures into words from the command line."""

import argparse
import json
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm
from transformers.utils import logging as transformers_logging

from .image_processing_gkc import read_image
from .post_processing import encode_rle, semantic_segmentation, void_label
from .processing_gkc import GKCProcessor
from .visualization import DrawnSegment, draw_overlay, label_map
from .vocabulary import Vocabulary, color_palette

TASKS = ("semantic", "instance", "panoptic")
IMAGE_SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}
OUTPUT_SUFFIXES = (".overlay.png", ".labels.png")
MODEL_VARIABLE = "GKC_MODEL"
SHIPPED_MODEL = "gkc-mini"

SEGMENT_EXAMPLES = """\
Words are separated by ";", several names of one thing by ",".

examples:
  gkc segment cat.jpg --labels "cat; sofa, couch; lamp"
  gkc segment photos/ --labels "road; car; person" --out cut
  gkc segment photos/ --task panoptic               the words stored in the checkpoint
  gkc segment cat.jpg --labels "cat; dog" --void-threshold 0.4
                                                    pixels that are neither stay void
  gkc segment cat.jpg --model my-checkpoint --task instance --threshold 0.3

For NAME.jpg it writes NAME.overlay.png (picture with outlines and a legend), NAME.labels.png (the ids: classes from 0
and void 255, or 65535 with more than 255 classes, for --task semantic; else segments from 1 and void 0) and NAME.json
(size as [height, width]; for every segment its label, score, area in pixels, bbox [x, y, width, height] and COCO
run-length encoding).

exit code: 0 all images done, 1 some could not be done (each is named), 2 the command was wrong.
"""


class UserError(Exception):
    """Something the user can put right; shown as one line, without a traceback."""


@dataclass
class Segmenter:
    """A loaded model with its words and settings, ready for many images."""

    model: Any
    processor: GKCProcessor
    vocabulary: Vocabulary
    words: dict[str, torch.Tensor]
    task: str
    threshold: float
    void_threshold: float | None

    @torch.inference_mode()
    def __call__(self, image: Image.Image) -> tuple[np.ndarray, list[dict[str, Any]]]:
        """Map (H, W) of ids, and the segments in it: `id`, `label_id` and `score`."""
        inputs = self.processor(images=image, return_tensors="pt").to(self.model.device)
        outputs = self.model(**inputs, **self.words)
        size = (image.height, image.width)
        if self.task == "semantic":
            return self._semantic(outputs, size)
        if self.task == "instance":
            result = self.processor.post_process_instance_segmentation(outputs, [size], threshold=self.threshold)[0]
        else:
            result = self.processor.post_process_panoptic_segmentation(
                outputs, [size], threshold=self.threshold, label_ids_to_fuse=self.vocabulary.stuff_ids
            )[0]
        return result["segmentation"].cpu().numpy(), result["segments_info"]

    def _semantic(self, outputs: Any, size: tuple[int, int]) -> tuple[np.ndarray, list[dict[str, Any]]]:
        content_sizes = outputs.content_sizes.tolist()
        labels, scores = semantic_segmentation(
            outputs.class_queries_logits[0],
            outputs.masks_queries_logits[0],
            content_size=tuple(content_sizes[0]),
            target_size=size,
            void_threshold=self.void_threshold,
        )
        labels, scores = labels.cpu().numpy(), scores.cpu().numpy()
        areas = np.bincount(labels.ravel(), minlength=len(self.vocabulary))[: len(self.vocabulary)]
        totals = np.bincount(labels.ravel(), weights=scores.ravel(), minlength=len(self.vocabulary))
        segments = [
            {"id": index, "label_id": index, "score": totals[index] / areas[index]}
            for index in np.flatnonzero(areas).tolist()
        ]
        return labels, segments


def main(argv: Sequence[str] | None = None) -> int:
    """
    Run the command.

    Args:
        argv: Arguments without the program's name; None takes those of the process.

    Returns:
        The exit code: 0 all images done, 1 some could not be done, 2 an error of the user.

    Raises:
        SystemExit: with code 2 for arguments that cannot be parsed, with 0 for `--help`.
    """
    parser = _parser()
    arguments = parser.parse_args(argv)
    try:
        return arguments.run(arguments)
    except UserError as error:
        print(f"gkc: error: {error}", file=sys.stderr)
        return 2


def default_model_path() -> Path:
    """
    Folder of the checkpoint to use when none is named, found without network.

    It is the one named by the environment variable GKC_MODEL; else `hub_card/gkc-mini` beside this package, as in a
    clone; else `share/gkc/gkc-mini` of the Python environment, where the wheel puts it.

    Raises:
        UserError: GKC_MODEL names no folder, or nothing was found.
    """
    named = os.environ.get(MODEL_VARIABLE)
    if named:
        if not Path(named).is_dir():
            raise UserError(f"the environment variable {MODEL_VARIABLE} names no folder: {named}")
        return Path(named)
    package = Path(__file__).resolve().parent
    for folder in (package.parent / "hub_card" / SHIPPED_MODEL, Path(sys.prefix) / "share" / "gkc" / SHIPPED_MODEL):
        if (folder / "config.json").is_file():
            return folder
    raise UserError(f"no model was found beside this package: name one with --model or {MODEL_VARIABLE}")


def find_images(inputs: Sequence[str]) -> list[Path]:
    """
    Images that the command line names, in order and each once.

    Args:
        inputs: Files, taken as they are, and folders, of which all pictures are taken in the order of their names
            (without sub-folders and without the command's own results).

    Raises:
        UserError: a folder has no pictures.
    """
    images: dict[Path, Path] = {}
    for given in map(Path, inputs):
        found = [given]
        if given.is_dir():
            found = sorted(path for path in given.iterdir() if _is_picture(path))
            if not found:
                raise UserError(f"no pictures in the folder {given}")
        for path in found:
            images.setdefault(path.resolve(), path)
    return list(images.values())


def output_names(images: Sequence[Path]) -> list[str]:
    """
    A name for the results of each image, all different even where letter case does not count.

    It is the file's name without its ending; where several images share it, the folder's name is put before it and the
    ending kept; a number follows where even that is taken.
    """
    shared: dict[str, int] = {}
    for path in images:
        shared[path.stem.casefold()] = shared.get(path.stem.casefold(), 0) + 1
    names, taken = [], {stem for stem, count in shared.items() if count == 1}
    for path in images:
        name = path.stem
        if shared[name.casefold()] > 1:
            full = f"{path.resolve().parent.name}-{path.name}"
            name = next(
                candidate
                for candidate in (full if index == 1 else f"{full}-{index}" for index in range(1, len(images) + 2))
                if candidate.casefold() not in taken
            )
            taken.add(name.casefold())
        names.append(name)
    return names


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="gkc",
        description="Cut pictures into words: open-vocabulary segmentation.",
        epilog='example: gkc segment cat.jpg --labels "cat; sofa, couch; lamp"\n'
        "`gkc segment --help` explains the rest.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    segment = commands.add_parser(
        "segment",
        help="cut pictures into words",
        description="Cut pictures into the words that you type.",
        epilog=SEGMENT_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    segment.set_defaults(run=_segment)
    add = segment.add_argument
    add("images", nargs="+", metavar="IMAGE", help="a picture, or a folder of pictures")
    add("--labels", metavar="WORDS", help="the words; without it, those stored in the checkpoint")
    add("--model", metavar="DIR", help=f"checkpoint; without it, {MODEL_VARIABLE} or the one shipped with gkc")
    add("--task", choices=TASKS, default="semantic", help="what to find (default: %(default)s)")
    add("--out", metavar="DIR", default="gkc-out", help="folder of the results (default: %(default)s)")
    add("--threshold", type=_share, help="lowest score of an instance or panoptic segment, 0 to 1 (default: 0.5)")
    add("--void-threshold", type=float, metavar="SCORE", help="semantic: pixels whose best score is below become void")
    add("--device", default="auto", help="cpu, cuda, cuda:1, mps or auto (default: %(default)s)")
    add("--threads", type=_count, help="processor threads (default: as torch chooses)")
    return parser


def _share(text: str) -> float:
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"must lie between 0 and 1, got {text}")
    return value


def _count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {text}")
    return value


def _segment(arguments: argparse.Namespace) -> int:
    _check_thresholds(arguments)
    images = find_images(arguments.images)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    segmenter = _load(arguments)
    folder = Path(arguments.out)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make the folder {folder}: {error.strerror}") from error

    failures = 0
    model_name = str(segmenter.model.name_or_path)
    for path, name in tqdm(list(zip(images, output_names(images), strict=True)), unit="image", disable=None):
        try:
            overlay = _segment_file(segmenter, path, folder / name, model_name)
            tqdm.write(str(overlay), file=sys.stdout)
        except Exception as error:  # whatever is wrong with one file, the others are done
            failures += 1
            reason = str(error) or type(error).__name__
            reason = reason if str(path) in reason else f"{path}: {reason}"
            tqdm.write(f"gkc: skipped: {reason.splitlines()[0]}", file=sys.stderr)
    if failures:
        print(f"gkc: {failures} of {len(images)} images could not be done", file=sys.stderr)
    return 1 if failures else 0


def _check_thresholds(arguments: argparse.Namespace) -> None:
    if arguments.task == "semantic" and arguments.threshold is not None:
        raise UserError("--threshold is for --task instance and panoptic; a semantic map has --void-threshold")
    if arguments.task != "semantic" and arguments.void_threshold is not None:
        raise UserError(f"--void-threshold is for --task semantic; {arguments.task} has --threshold")


def _load(arguments: argparse.Namespace) -> Segmenter:
    with _user_errors("--labels"), _warnings_as_lines():
        vocabulary = None if arguments.labels is None else Vocabulary.parse(arguments.labels)
    model, processor = _load_checkpoint(arguments.model or default_model_path())
    with _user_errors("--device"):
        model.to(_device(arguments.device))
    stored = model.config.vocabulary
    words = {}
    if vocabulary is not None:
        _take_stored_kinds(vocabulary, model.config)
        with _user_errors("--labels"), _warnings_as_lines():
            prompts = processor(text=vocabulary, return_tensors="pt").to(model.device)
        words = dict(model.get_class_embeddings(**prompts))
    elif stored is None:
        raise UserError("the checkpoint stores no words: name them with --labels")
    else:
        with warnings.catch_warnings(action="ignore"):
            vocabulary = Vocabulary(stored, model.config.vocabulary_is_thing)
    threshold = 0.5 if arguments.threshold is None else arguments.threshold
    return Segmenter(model, processor, vocabulary, words, arguments.task, threshold, arguments.void_threshold)


def _load_checkpoint(path: str | Path) -> tuple[Any, GKCProcessor]:
    from .modeling_gkc import GKCForOpenVocabSegmentation

    is_folder = Path(path).is_dir()
    if not is_folder and (Path(path).is_absolute() or str(path).count("/") != 1 or str(path).startswith(".")):
        raise UserError(f"--model: there is no folder {path}")
    shows_bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        model = GKCForOpenVocabSegmentation.from_pretrained(path).eval()
        processor = GKCProcessor.from_pretrained(path)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"--model: {path} is no checkpoint of gkc: {str(error).splitlines()[0]}") from error
    finally:
        if shows_bars:
            transformers_logging.enable_progress_bar()
    return model, processor


def _take_stored_kinds(vocabulary: Vocabulary, config: Any) -> None:
    """Give typed words the thing/stuff kind of the same words in the checkpoint, so that stuff can be merged."""
    if vocabulary.is_thing is not None or not config.vocabulary_is_thing:
        return
    kinds = {
        name.casefold(): is_thing
        for names, is_thing in zip(config.vocabulary, config.vocabulary_is_thing, strict=True)
        for name in names
    }
    vocabulary.is_thing = [kinds.get(label.casefold()) for label in vocabulary.labels]


def _device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"there is no device {name} here")
    return device


def _segment_file(segmenter: Segmenter, path: Path, target: Path, model_name: str) -> Path:
    """Cut one picture and write `target` + .overlay.png, .labels.png and .json; gives the overlay's path."""
    image = read_image(path)
    segmentation, segments = segmenter(image)
    vocabulary, task = segmenter.vocabulary, segmenter.task
    semantic = task == "semantic"
    drawn = _drawn_segments(segments, vocabulary, semantic)
    void = void_label(len(vocabulary)) if semantic else 0
    result = {
        "image": str(path),
        "size": [image.height, image.width],
        "task": task,
        "model": model_name,
        "labels": vocabulary.labels,
        "void_id": void,
        "segments": [_describe(segment, segmentation, vocabulary) for segment in segments],
    }
    overlay = Path(f"{target}.overlay.png")
    draw_overlay(image, segmentation, drawn).save(overlay)
    colors = {segment.id: segment.color for segment in drawn}
    label_map(segmentation, colors, max_id=void).save(f"{target}.labels.png")
    Path(f"{target}.json").write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return overlay


def _drawn_segments(segments: list[dict[str, Any]], vocabulary: Vocabulary, semantic: bool) -> list[DrawnSegment]:
    if semantic:
        labels, colors = vocabulary.labels, vocabulary.palette
        return [DrawnSegment(s["id"], labels[s["id"]], colors[s["id"]]) for s in segments]
    label_ids = [segment["label_id"] for segment in segments]
    drawn = []
    for index, (segment, color) in enumerate(zip(segments, color_palette(len(segments)), strict=True)):
        label = vocabulary.labels[label_ids[index]]
        if label_ids.count(label_ids[index]) > 1:
            label += f" {label_ids[: index + 1].count(label_ids[index])}"
        drawn.append(DrawnSegment(segment["id"], label, color, segment["score"]))
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


def _is_picture(path: Path) -> bool:
    is_result = path.name.endswith(OUTPUT_SUFFIXES)
    return path.is_file() and path.suffix.lower() in IMAGE_SUFFIXES and not is_result


@contextmanager
def _user_errors(option: str) -> Iterator[None]:
    """Errors in what the user gave for an option become one line that names it."""
    try:
        yield
    except (ValueError, TypeError, RuntimeError) as error:
        raise UserError(f"{option}: {str(error).splitlines()[0]}") from error


@contextmanager
def _warnings_as_lines() -> Iterator[None]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        yield
    for warning in caught:
        print(f"gkc: warning: {warning.message}", file=sys.stderr)


__all__ = ["Segmenter", "UserError", "default_model_path", "find_images", "main", "output_names"]
