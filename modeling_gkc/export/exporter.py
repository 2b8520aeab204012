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
"""Export of the image path and its vocabulary as one graph: ONNX, or a program of `torch.export`.

`export_segmenter` writes a folder:

    model.onnx or model.pt2   the graph, fp32
    export.json               inputs, outputs and preprocessing of the graph, see `describe`
    class_embeds.npz          unless the vocabulary is fixed in the graph: `names` (K,), `class_embeds` (K, D) and
                              `colors` (K, 3)
    run.py                    for ONNX: segments an image with numpy, Pillow and onnxruntime only; it imports
                              image_reading.py and atomic_files.py from the same folder

The graph takes `pixel_values` (B, 3, H, W) and, unless the vocabulary is fixed, `class_embeds` (K, D), one row per
class. It returns `class_queries_logits` (B, Q, K + 1), whose last column is no-object, `masks_queries_logits`
(B, Q, H/4, W/4) and `query_embeds` (B, Q, D). B and K are dynamic, H and W are static. The text encoder is not
exported.

Letters: B images, Q queries, K classes, P prompts, D text-embedding width, (H, W) input size.
"""

import copy
import dataclasses
import importlib.util
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from transformers.image_utils import PILImageResampling

from .. import atomic_files, image_reading
from ..atomic_files import atomic_folder, check_new_folder
from ..class_embeddings import GKCClassEmbeddings
from ..configuration_gkc import GKCConfig
from ..encoded_vocabulary import EncodedVocabulary
from ..inference import OptimizedGKC
from ..padding import SIZE_DIVISOR
from ..vocabulary import Vocabulary, VocabularyLike
from . import runner
from .formats import DEFAULT_OPSET, FORMATS
from .graph import (
    RUNTIME_PACKAGE,
    ExportableSegmenter,
    check_width,
    compare,
    load_graph,
    one_embed_per_class,
    trace,
    write_onnx,
)

SETTINGS_FILE = "export.json"
SETTINGS_FORMAT = "gkc-export-1"
CLASS_EMBEDS_FILE = "class_embeds.npz"
RUNNER_FILE = "run.py"
ONNX_PACKAGES = ("onnx", "onnxscript")
# Modules of this library that are copied next to an ONNX graph, by their names there.
RUNNER_SOURCES = {
    RUNNER_FILE: runner.__file__,
    "image_reading.py": image_reading.__file__,
    "atomic_files.py": atomic_files.__file__,
}


@dataclass
class ExportedSegmenter:
    """Result of `export_segmenter`.

    Args:
        folder: Folder that was written.
        graph: Path of the graph.
        settings: Content of export.json.
        difference: Largest difference between the mask logits of graph and model on a random image; None if they were
            not compared.
    """

    folder: Path
    graph: Path
    settings: dict[str, Any]
    difference: float | None


def write_class_embeds(path: str | Path, model: Any, encoded: EncodedVocabulary) -> None:
    """Write the classes of a graph that takes them as input: `names` (K,), `class_embeds` (K, D) and `colors` (K, 3).

    Nothing in the file is pickled.

    Args:
        path: File to write, .npz.
        model: The `GKCForOpenVocabSegmentation` that was exported.
        encoded: The K classes.

    Raises:
        ValueError: See `one_embed_per_class`.
    """
    class_embeds, vocabulary = one_embed_per_class(model, encoded).numpy(), encoded.vocabulary
    with open(path, "wb") as file:
        np.savez(
            file,
            names=np.array(vocabulary.labels),
            class_embeds=class_embeds,
            colors=np.array(vocabulary.palette, np.uint8),
        )


def check_size(size: int | tuple[int, int]) -> tuple[int, int]:
    """Check the image size of a graph and return its height and width.

    Args:
        size: Side length of a square, or (height, width).

    Raises:
        ValueError: A side is not a positive multiple of 32, the coarsest stride.
    """
    height, width = (size, size) if isinstance(size, int) else size
    if min(height, width) < 1 or height % SIZE_DIVISOR or width % SIZE_DIVISOR:
        nearest = [max(round(side / SIZE_DIVISOR), 1) * SIZE_DIVISOR for side in (height, width)]
        raise ValueError(
            f"The sides must be multiples of {SIZE_DIVISOR}, got {height}x{width}: use {nearest[0]}x{nearest[1]}."
        )
    return height, width


def check_packages(graph_format: str, check: bool | None = None) -> bool:
    """Check the packages that the export needs and return whether the graph can be compared with the model.

    Args:
        graph_format: "onnx" or "torch-export".
        check: True requires the comparison, None requests it if onnxruntime is installed.

    Raises:
        ValueError: The format is unknown.
        ImportError: A required package is missing; the message names the command that installs it.
    """
    if graph_format not in FORMATS:
        raise ValueError(f"The format must be one of {', '.join(FORMATS)}, got {graph_format!r}.")
    if graph_format == "torch-export":
        return check is not False
    missing = [name for name in ONNX_PACKAGES if importlib.util.find_spec(name) is None]
    has_runtime = importlib.util.find_spec(RUNTIME_PACKAGE) is not None
    if check and not has_runtime:
        missing.append(RUNTIME_PACKAGE)
    if missing:
        raise ImportError(f"Cannot import {' and '.join(missing)}: run pip install {' '.join(missing)}")
    return has_runtime and check is not False


def export_segmenter(
    model: Any,
    processor: Any,
    folder: str | Path,
    *,
    format: str = "onnx",
    size: int | tuple[int, int] = 512,
    vocabulary: VocabularyLike | EncodedVocabulary | None = None,
    fixed: bool = False,
    opset: int = DEFAULT_OPSET,
    check: bool | None = None,
    progress: Callable[[str], None] = lambda step: None,
) -> ExportedSegmenter:
    """Export a model as a graph that runs without this library; an ONNX graph also runs without torch.

    The graph computes in fp32, independent of the data type of the model's weights. The model is not changed.

    Args:
        model: A `GKCForOpenVocabSegmentation`.
        processor: Its `GKCProcessor`.
        folder: New folder to write; it appears only once it is complete.
        format: "onnx", or "torch-export" for `torch.export.load`.
        size: Image size of the graph in pixels: one side, or (height, width), multiples of 32.
        vocabulary: Classes in any form that `Vocabulary.parse` accepts, or encoded (default: the vocabulary stored in
            the model, if any).
        fixed: Store the class embeddings in the graph instead of taking them as a second input.
        opset: ONNX operator set version, at least 18.
        check: Whether to compare the graph with the model on a random image (default: if onnxruntime is installed).
        progress: Function called with a message before each step.

    Raises:
        ValueError: An argument is invalid, the model was optimized for inference, `fixed` is set without a vocabulary,
            the embeddings do not fit the model, torch cannot export the model, or the logits of graph and model differ
            by more than 1e-3.
        FileExistsError: The folder exists and is not empty.
        ImportError: onnx or onnxscript is missing.
    """
    folder, (height, width) = Path(folder), check_size(size)
    if isinstance(model, OptimizedGKC):
        raise ValueError("An optimized model cannot be exported: export the original model.")
    if model.config.model_type != GKCConfig.model_type:
        raise ValueError(
            f"A {model.config.model_type!r} cannot be exported: convert its segmenter by `gkc convert mask2former`, "
            "or train a student by `python -m train distil`, and export that."
        )
    check_new_folder(folder)
    compares = check_packages(format, check)
    if format == "onnx" and opset < DEFAULT_OPSET:
        raise ValueError(f"The opset must be at least {DEFAULT_OPSET}, got {opset}.")
    encoded = _encode(model, processor, vocabulary)
    embeddings = None if encoded is None else GKCClassEmbeddings(encoded.class_embeds, encoded.class_ids)
    if fixed and embeddings is None:
        raise ValueError("A fixed graph needs a vocabulary, and the model stores none: pass `vocabulary`.")
    with atomic_folder(folder) as unfinished:
        if encoded is not None and not fixed:
            write_class_embeds(unfinished / CLASS_EMBEDS_FILE, model, encoded)
        reference = _fp32_copy(model, keeps_attention=format != "onnx")
        progress(f"tracing the image path at {height} x {width}")
        program = trace(ExportableSegmenter(reference, embeddings if fixed else None), height, width, fixed)
        graph = unfinished / FORMATS[format]
        progress(f"writing {graph.name}")
        write_onnx(program, graph, opset, fixed) if format == "onnx" else torch.export.save(program, graph)
        difference = None
        if compares:
            progress("comparing the graph with the model")
            difference = compare(load_graph(graph), reference, (height, width), embeddings, fixed)
        classes = None if encoded is None else encoded.vocabulary
        settings = describe(model, processor, graph.name, (height, width), classes, fixed)
        settings |= {"opset": opset} if format == "onnx" else {}
        settings["largest_mask_difference"] = difference
        text = json.dumps(settings, indent=1, ensure_ascii=False)
        (unfinished / SETTINGS_FILE).write_text(text + "\n", encoding="utf-8")
        if format == "onnx":
            _write_runner(unfinished)
    return ExportedSegmenter(folder, folder / FORMATS[format], settings, difference)


def _encode(
    model: Any, processor: Any, vocabulary: VocabularyLike | EncodedVocabulary | None
) -> EncodedVocabulary | None:
    """Return the vocabulary of the graph with embeddings in fp32 on the CPU, None if there is none."""
    if vocabulary is None:
        encoded = EncodedVocabulary.from_model(model)
        if encoded is None:
            return None
    elif isinstance(vocabulary, EncodedVocabulary):
        encoded = vocabulary
    else:
        encoded = EncodedVocabulary.encode(vocabulary, model, processor)
    if encoded.void_ids or encoded.reduction not in (None, model.config.prompt_reduction):
        raise ValueError("A graph has neither void classes nor a reduction of its own: encode the vocabulary without.")
    check_width(model, encoded.class_embeds)
    class_embeds, class_ids = encoded.class_embeds.detach().cpu().float(), encoded.class_ids.cpu()
    encoded = dataclasses.replace(encoded, class_embeds=class_embeds, class_ids=class_ids)
    return encoded.with_is_thing_from(model.vocabulary)


def _fp32_copy(model: Any, keeps_attention: bool) -> Any:
    """Return a copy in fp32 on the CPU, so that tracing does not change the user's model."""
    model = copy.deepcopy(model).cpu().float().eval().requires_grad_(False)
    for module in model.modules():
        if isinstance(getattr(module, "config", None), GKCConfig):
            module.config.deformable_attention = "grid_sample"  # the kernel that ONNX has an operator for
    if not keeps_attention:
        # In ONNX, fused attention becomes the same products, but with another memory layout than in the trace.
        model.set_attn_implementation("eager")
    return model


def describe(
    model: Any,
    processor: Any,
    graph: str,
    size: tuple[int, int],
    vocabulary: Vocabulary | None,
    fixed: bool,
) -> dict[str, Any]:
    """Describe how to run a graph: the content of export.json.

    `words` is "fixed" or "input"; `classes` lists the classes in the order of the logits' columns, before no-object.
    An image is resized to `size` (height, width) without keeping its aspect ratio, with Pillow's filter `resample`;
    then each channel is (value * `rescale_factor` - `image_mean`) / `image_std`.
    """
    images = processor.image_processor
    height, width = size
    config = model.config
    shapes = {"pixel_values": ["batch", 3, height, width]}
    if not fixed:
        shapes["class_embeds"] = ["classes", config.projection_dim]
    num_classes = len(vocabulary) if fixed else "classes"
    return {
        "format": SETTINGS_FORMAT,
        "graph": graph,
        "inputs": shapes,
        "outputs": {
            "class_queries_logits": ["batch", config.num_queries, f"{num_classes} + 1"],
            "masks_queries_logits": ["batch", config.num_queries, height // 4, width // 4],
            "query_embeds": [
                "batch",
                config.num_queries,
                config.projection_dim * (1 if config.ensemble == "none" else 2),
            ],
        },
        "dtype": "float32",
        "size": [height, width],
        "resize": "to size, not keeping the aspect ratio",
        "resample": PILImageResampling(images.resample).name.lower(),
        "rescale_factor": images.rescale_factor if images.do_rescale else 1.0,
        "image_mean": _three(images.image_mean) if images.do_normalize else [0.0] * 3,
        "image_std": _three(images.image_std) if images.do_normalize else [1.0] * 3,
        "words": "fixed" if fixed else "input",
        "logits": "one column per class, then no-object",
        "classes": [] if vocabulary is None else _classes(vocabulary),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }


def _three(values: Any) -> list[float]:
    return [float(value) for value in (values if isinstance(values, list | tuple) else [values] * 3)]


def _classes(vocabulary: Vocabulary) -> list[dict[str, Any]]:
    kinds = vocabulary.is_thing or [None] * len(vocabulary)
    columns = zip(vocabulary.names, kinds, vocabulary.palette, strict=True)
    return [
        {"name": names[0], "synonyms": list(names[1:]), "is_thing": is_thing, "color": list(color)}
        for names, is_thing, color in columns
    ]


def _write_runner(folder: Path) -> None:
    """Copy run.py and the modules it imports; in a script, imports have no leading dots."""
    for name, source in RUNNER_SOURCES.items():
        text = Path(source).read_text(encoding="utf-8")
        (folder / name).write_text(re.sub(r"^from \.\.(?=\w)", "from ", text, flags=re.MULTILINE), encoding="utf-8")


__all__ = [
    "ExportedSegmenter",
    "check_packages",
    "check_size",
    "describe",
    "export_segmenter",
    "write_class_embeds",
]
