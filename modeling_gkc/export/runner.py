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
"""Segment a picture with the exported graph of a folder; needs numpy, Pillow and onnxruntime only.

`export_segmenter` copies this file as run.py, with `image_reading` and `atomic_files` beside it, into the folder of an
ONNX graph.

Letters: Q queries, K classes, (h, w) the grid of the mask logits, (H, W) the picture.
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
    sys.exit("onnxruntime is not installed: pip install onnxruntime")

_NUMBERS_AT_ONCE = 2**23


def pixel_values(image: Image.Image, settings: dict[str, Any]) -> np.ndarray:
    """
    The graph's input for one picture.

    Args:
        image: Upright, 8-bit RGB, as `open_rgb` gives it.
        settings: Content of export.json.

    Returns:
        (1, 3, height, width) of the graph's size, float32.
    """
    height, width = settings["size"]
    if image.size != (width, height):
        image = image.resize((width, height), Image.Resampling[settings["resample"].upper()])
    pixels = np.asarray(image, np.float32) * np.float32(settings["rescale_factor"])
    pixels = (pixels - np.float32(settings["image_mean"])) / np.float32(settings["image_std"])
    return np.ascontiguousarray(pixels.transpose(2, 0, 1)[None])


def label_map(class_logits: np.ndarray, mask_logits: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """
    The best class of every pixel, for some rows at a time.

    Args:
        class_logits: (Q, K + 1), the last column no-object.
        mask_logits: (Q, h, w).
        size: Height and width of the result, (H, W).

    Returns:
        (H, W) numbers of classes, uint8 if there are at most 256 classes, else uint16.
    """
    shares = np.exp(class_logits - class_logits.max(axis=-1, keepdims=True))
    shares = (shares / shares.sum(axis=-1, keepdims=True))[:, :-1]  # (Q, K)
    rows, columns = (_interpolation_matrix(*sides) for sides in zip(mask_logits.shape[1:], size, strict=True))
    stretched = mask_logits @ columns.T  # (Q, h, W)
    labels = np.empty(size, np.uint8 if shares.shape[1] <= 256 else np.uint16)
    step = max(1, _NUMBERS_AT_ONCE // (size[1] * sum(shares.shape)))
    for start in range(0, size[0], step):
        masks = 0.5 + 0.5 * np.tanh(rows[start : start + step] @ stretched / 2)  # sigmoid, (Q, rows, W)
        labels[start : start + step] = np.tensordot(shares, masks, (0, 0)).argmax(axis=0)
    return labels


def _interpolation_matrix(source: int, target: int) -> np.ndarray:
    """Weights (target, source) of bilinear interpolation along one side, without antialiasing."""
    center = np.clip((np.arange(target) + 0.5) * (source / target) - 0.5, 0, source - 1)
    return np.clip(1 - np.abs(center[:, None] - np.arange(source)), 0, None).astype(np.float32)


def write_label_map(labels: np.ndarray, colors: np.ndarray, path: Path) -> None:
    """
    Write class numbers as a PNG file, which appears only once it is complete.

    Args:
        labels: (H, W), uint8 or uint16. A uint8 map is shown in the colors of its classes.
        colors: (K, 3), 0..255.
        path: File to write.
    """
    image = Image.fromarray(labels)
    if labels.dtype == np.uint8:
        image.putpalette(colors.astype(np.uint8).tobytes())
    with atomic_path(path) as temporary:
        image.save(temporary, "PNG")


def load_classes(folder: Path, settings: dict[str, Any]) -> tuple[list[str], np.ndarray, dict[str, np.ndarray]]:
    """
    The words of an exported folder.

    Returns:
        Names of the K classes, their colors (K, 3), and the graph's input of words: none if they are in the graph.
    """
    if settings["words"] == "input":
        with np.load(folder / "class_embeds.npz") as words:
            return words["names"].tolist(), words["colors"], {"class_embeds": words["class_embeds"]}
    classes = settings["classes"]
    return [entry["name"] for entry in classes], np.array([entry["color"] for entry in classes]), {}


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the label map of one picture, and print each class with its share of the pixels."""
    parser = argparse.ArgumentParser(description="Segment a picture with an exported graph.")
    parser.add_argument("folder", type=Path, help="folder that `gkc export` has written")
    parser.add_argument("picture", type=Path, help="image file of any kind that Pillow reads")
    parser.add_argument("labels", type=Path, help="PNG file to write: the number of its class at every pixel")
    asked = parser.parse_args(arguments)
    if asked.labels.suffix.lower() != ".png":
        parser.error(f"{asked.labels}: name a .png file, since other formats change the numbers of the classes")
    try:
        image = open_rgb(asked.picture)
    except Exception as error:  # Pillow's decoders raise errors of many types
        parser.error(f"{asked.picture} cannot be read as an image: {error}")
    settings = json.loads((asked.folder / "export.json").read_text(encoding="utf-8"))
    names, colors, inputs = load_classes(asked.folder, settings)
    session = onnxruntime.InferenceSession(asked.folder / settings["graph"], providers=["CPUExecutionProvider"])
    inputs["pixel_values"] = pixel_values(image, settings)
    class_logits, mask_logits = session.run(["class_queries_logits", "masks_queries_logits"], inputs)
    labels = label_map(class_logits[0], mask_logits[0], image.size[::-1])
    write_label_map(labels, colors, asked.labels)
    for index, count in zip(*np.unique(labels, return_counts=True), strict=True):
        print(f"{names[index]}: {count / labels.size:.1%}")  # noqa: T201


if __name__ == "__main__":
    main()
