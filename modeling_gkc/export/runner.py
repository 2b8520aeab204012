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
"""Segment an image with an exported ONNX graph; needs only numpy, Pillow and onnxruntime.

`export_segmenter` copies this file as run.py, together with `image_reading` and `atomic_files`, into the folder of an
ONNX graph.

Letters: Q queries, K classes, (h, w) size of the mask logits, (H, W) size of the image.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..atomic_files import atomic_path
from ..image_reading import open_rgb

try:
    import onnxruntime
except ImportError:
    sys.exit("onnxruntime is not installed: run pip install onnxruntime")

_MAX_BLOCK_NUMBERS = 2**23


def pixel_values(image: Image.Image, settings: dict[str, Any]) -> np.ndarray:
    """Return the graph's input for one image.

    Args:
        image: Upright 8-bit RGB image, as returned by `open_rgb`.
        settings: Content of export.json.

    Returns:
        Array (1, 3, height, width) of the graph's size in float32.
    """
    height, width = settings["size"]
    if image.size != (width, height):
        image = image.resize((width, height), Image.Resampling[settings["resample"].upper()])
    pixels = np.asarray(image, np.float32) * np.float32(settings["rescale_factor"])
    pixels = (pixels - np.float32(settings["image_mean"])) / np.float32(settings["image_std"])
    return np.ascontiguousarray(pixels.transpose(2, 0, 1)[None])


def label_map(class_logits: np.ndarray, mask_logits: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Return the most probable class of every pixel, computed in blocks of rows to bound memory.

    Args:
        class_logits: Array (Q, K + 1), whose last column is no-object.
        mask_logits: Array (Q, h, w).
        size: Height and width of the result, (H, W).

    Returns:
        Class ids (H, W), uint8 if there are at most 256 classes, else uint16.
    """
    class_probabilities = np.exp(class_logits - class_logits.max(axis=-1, keepdims=True))
    class_probabilities = (class_probabilities / class_probabilities.sum(axis=-1, keepdims=True))[:, :-1]  # (Q, K)
    rows, columns = (_interpolation_matrix(*sides) for sides in zip(mask_logits.shape[1:], size, strict=True))
    stretched = mask_logits @ columns.T  # (Q, h, W)
    labels = np.empty(size, np.uint8 if class_probabilities.shape[1] <= 256 else np.uint16)
    step = max(1, _MAX_BLOCK_NUMBERS // (size[1] * sum(class_probabilities.shape)))
    for start in range(0, size[0], step):
        masks = 0.5 + 0.5 * np.tanh(rows[start : start + step] @ stretched / 2)  # sigmoid, (Q, rows, W)
        labels[start : start + step] = np.tensordot(class_probabilities, masks, (0, 0)).argmax(axis=0)
    return labels


def _interpolation_matrix(source: int, target: int) -> np.ndarray:
    """Return the weights (target, source) of bilinear interpolation along one side, without antialiasing."""
    center = np.clip((np.arange(target) + 0.5) * (source / target) - 0.5, 0, source - 1)
    return np.clip(1 - np.abs(center[:, None] - np.arange(source)), 0, None).astype(np.float32)


def write_label_map(labels: np.ndarray, colors: np.ndarray, path: Path) -> None:
    """Write a label map as a PNG file, which appears only once it is complete.

    Args:
        labels: Class ids (H, W), uint8 or uint16. A uint8 map gets a palette with the colors of its classes.
        colors: Colors (K, 3), 0 to 255.
        path: File to write.
    """
    image = Image.fromarray(labels)
    if labels.dtype == np.uint8:
        image.putpalette(colors.astype(np.uint8).tobytes())
    with atomic_path(path) as temporary:
        image.save(temporary, "PNG")


def load_classes(folder: Path, settings: dict[str, Any]) -> tuple[list[str], np.ndarray, dict[str, np.ndarray]]:
    """Load the classes of an exported folder.

    Returns:
        Names of the K classes, their colors (K, 3) and the graph's class inputs, which are empty if the vocabulary is
        fixed in the graph.
    """
    if settings["words"] == "input":
        with np.load(folder / "class_embeds.npz") as stored:
            return stored["names"].tolist(), stored["colors"], {"class_embeds": stored["class_embeds"]}
    classes = settings["classes"]
    return [entry["name"] for entry in classes], np.array([entry["color"] for entry in classes]), {}


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the label map of one image and print each class with its percentage of the pixels."""
    parser = argparse.ArgumentParser(description="Segment an image with an exported graph.")
    parser.add_argument("folder", type=Path, help="folder written by `gkc export`")
    parser.add_argument("image", type=Path, help="image file in any format that Pillow reads")
    parser.add_argument("labels", type=Path, help="PNG file to write, whose pixel values are class ids")
    options = parser.parse_args(arguments)
    if options.labels.suffix.lower() != ".png":
        parser.error(f"{options.labels}: name a .png file, because other formats change the class ids")
    try:
        image = open_rgb(options.image)
    except Exception as error:  # Pillow's decoders raise errors of many types
        parser.error(f"{options.image} cannot be read as an image: {error}")
    settings = json.loads((options.folder / "export.json").read_text(encoding="utf-8"))
    names, colors, inputs = load_classes(options.folder, settings)
    session = onnxruntime.InferenceSession(options.folder / settings["graph"], providers=["CPUExecutionProvider"])
    inputs["pixel_values"] = pixel_values(image, settings)
    class_logits, mask_logits = session.run(["class_queries_logits", "masks_queries_logits"], inputs)
    labels = label_map(class_logits[0], mask_logits[0], image.size[::-1])
    write_label_map(labels, colors, options.labels)
    for index, count in zip(*np.unique(labels, return_counts=True), strict=True):
        print(f"{names[index]}: {count / labels.size:.1%}")  # noqa: T201


if __name__ == "__main__":
    main()
