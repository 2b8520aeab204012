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
"""Graph of an exported model: the traceable module, tracing, conversion to ONNX and comparison with the model.

Letters: B images, Q queries, K classes, P prompts, D text-embedding width, (H, W) input size.
"""

import importlib
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..class_embeddings import GKCClassEmbeddings
from ..classifiers import ClassPrompts

OUTPUTS = ("class_queries_logits", "masks_queries_logits", "query_embeds")
TOLERANCE = 1e-3
# Rounding may flip the sign of a mask logit near zero, which changes the positions that a query attends to. Such an
# image cannot be used for the comparison, so several are tried.
CHECKED_IMAGES = 3
# A protocol buffer is limited to 2 GiB: larger weights go into a second file.
MAX_SINGLE_FILE_BYTES = 1_800_000_000
RUNTIME_PACKAGE = "onnxruntime"


class ExportableSegmenter(nn.Module):
    """Image path and classifier of a model, traceable for any number of classes.

    Args:
        model: Model in fp32; its modules are shared, not copied.
        embeddings: Embeddings to fix in the graph, or None to take one embedding per class as an input.
    """

    def __init__(self, model: Any, embeddings: GKCClassEmbeddings | None = None):
        super().__init__()
        self.model, self.classifier = model.model, model.classifier
        self.prompts = class_weights = None
        if embeddings is not None:
            self.prompts = _prompts(model, embeddings)
            with torch.no_grad():
                class_weights = self.classifier.class_weights(self.prompts)
        self.register_buffer("class_weights", class_weights)
        self.eval()

    def forward(self, pixel_values: Tensor, class_embeds: Tensor | None = None) -> dict[str, Tensor]:
        """Return the three outputs by name.

        Args:
            pixel_values: Images (B, 3, H, W).
            class_embeds: Class embeddings (K, D), unless they are fixed in the graph.
        """
        segments = self.model(pixel_values, output_stages=False, return_dict=True)
        prompts = self.prompts
        if class_embeds is not None:
            prompts = ClassPrompts(class_embeds, None, class_embeds.shape[0], "max")
        class_logits, query_embeds = self.classifier(segments, prompts, class_weights=self.class_weights)
        return dict(zip(OUTPUTS, (class_logits, segments.masks_queries_logits, query_embeds), strict=True))


def _prompts(model: Any, embeddings: GKCClassEmbeddings) -> ClassPrompts:
    """Return the embeddings in the classifier's form, in fp32 on the CPU."""
    embeds, class_ids = embeddings.class_embeds.detach().cpu().float(), embeddings.class_ids.cpu()
    check_width(model, embeds)
    return model.resolve_vocabulary(class_embeds=embeds, class_ids=class_ids)


def one_embed_per_class(model: Any, embeddings: GKCClassEmbeddings) -> Tensor:
    """Return class embeddings for the graph's input `class_embeds` that give the same logits as the model.

    A logit is linear in the embedding, so the mean of the logits of a class's names is the logit of their mean
    embedding. For reduction `mean` it is therefore not normalized, while it is for `embedding_mean`.

    Args:
        model: A `GKCForOpenVocabSegmentation`.
        embeddings: Embeddings (P, D) of prompts and their class ids (P,).

    Returns:
        Embeddings (K, D) in fp32 on the CPU.

    Raises:
        ValueError: The embeddings have another width than the model's, or a class has several names and the model
            takes the maximum over them.
    """
    return model.classifier.class_embeds(_prompts(model, embeddings))


def check_width(model: Any, class_embeds: Tensor) -> None:
    """Check that class embeddings belong to the model's text embedding space.

    Raises:
        ValueError: `class_embeds` is not of shape (P, D) with the model's D.
    """
    width = model.config.projection_dim
    if class_embeds.ndim != 2 or class_embeds.shape[1] != width:
        raise ValueError(
            f"The class embeddings have the shape {tuple(class_embeds.shape)}, but this model's text embedding space "
            f"has the width {width}: encode the vocabulary with this model."
        )


def trace(segmenter: ExportableSegmenter, height: int, width: int, fixed: bool) -> torch.export.ExportedProgram:
    """Trace the module for images of one size, any batch size and, unless they are fixed, any number of classes.

    Raises:
        ValueError: torch cannot trace the model.
    """
    example = {"pixel_values": torch.zeros(2, 3, height, width)}
    if not fixed:
        example["class_embeds"] = torch.zeros(3, segmenter.model.config.projection_dim)
    dimensions = {name: {0: torch.export.Dim(axis)} for name, axis in _free_axes(fixed).items()}
    with torch.no_grad(), _quiet(), _export_errors():
        return torch.export.export(segmenter, (), example, dynamic_shapes=dimensions, strict=False)


def _free_axes(fixed: bool) -> dict[str, str]:
    """Return the name of the dynamic first axis of each input."""
    return {"pixel_values": "batch"} | ({} if fixed else {"class_embeds": "classes"})


def write_onnx(program: torch.export.ExportedProgram, path: Path, opset: int, fixed: bool) -> None:
    """Write a traced graph as ONNX; weights that exceed the limit of one file go into a second file.

    Raises:
        ValueError: torch has no ONNX equivalent for a part of the model.
    """
    axes = _free_axes(fixed)
    num_bytes = sum(value.numel() * value.element_size() for value in program.state_dict.values())
    with _quiet(), _export_errors():
        torch.onnx.export(
            program,
            (),
            path,
            input_names=list(axes),
            output_names=list(OUTPUTS),
            dynamic_shapes={name: {0: axis} for name, axis in axes.items()},
            opset_version=opset,
            dynamo=True,
            external_data=num_bytes > MAX_SINGLE_FILE_BYTES,
            verbose=False,
        )


@contextmanager
def _export_errors() -> Iterator[None]:
    """Replace an error of torch's exporters by its first line."""
    try:
        yield
    except Exception as error:  # torch's exporters raise errors of many types
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise ValueError(f"torch cannot export this model: {reason.strip()}") from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Suppress warnings and log messages that torch and onnxscript emit about their own internals."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)


def load_graph(graph: Path) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    """Return a function that runs a written graph."""
    if graph.suffix == ".pt2":
        with _quiet():
            program = torch.export.load(graph).module()
        return lambda inputs: program(**inputs)
    session = importlib.import_module(RUNTIME_PACKAGE).InferenceSession(graph, providers=["CPUExecutionProvider"])

    def run(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        values = session.run(list(OUTPUTS), {name: value.numpy() for name, value in inputs.items()})
        return {name: torch.from_numpy(value) for name, value in zip(OUTPUTS, values, strict=True)}

    return run


@torch.no_grad()
def compare(
    run: Callable[[dict[str, Tensor]], dict[str, Tensor]],
    model: Any,
    size: tuple[int, int],
    embeddings: GKCClassEmbeddings | None,
    fixed: bool,
) -> float:
    """Return the largest difference between the mask logits of graph and model on a random image.

    Args:
        run: Function that runs the graph.
        model: The model in fp32.
        size: Height and width of the graph's images.
        embeddings: Embeddings of the classes; None uses random ones.
        fixed: Whether the embeddings are fixed in the graph.

    Raises:
        ValueError: The mask or class logits differ by more than the tolerance.
    """
    generator = torch.Generator().manual_seed(0)
    if embeddings is None:
        embeds = F.normalize(torch.randn(5, model.config.projection_dim, generator=generator), dim=-1)
        embeddings = GKCClassEmbeddings(class_embeds=embeds, class_ids=torch.arange(5))
    extra = {} if fixed else {"class_embeds": one_embed_per_class(model, embeddings)}
    differences = []
    for _ in range(CHECKED_IMAGES):
        pixel_values = torch.randn(1, 3, *size, generator=generator)
        expected, found = model(pixel_values, **embeddings), run({"pixel_values": pixel_values} | extra)
        masks, classes = (
            float((found[name] - expected[name]).abs().max()) for name in ("masks_queries_logits", OUTPUTS[0])
        )
        if max(masks, classes) <= TOLERANCE:
            return masks
        differences.append(f"{masks:.2g} (masks) and {classes:.2g} (classes)")
    raise ValueError(f"The graph's logits differ from the model's by {'; '.join(differences)}: it was not written.")


__all__ = [
    "RUNTIME_PACKAGE",
    "ExportableSegmenter",
    "check_width",
    "compare",
    "load_graph",
    "one_embed_per_class",
    "trace",
    "write_onnx",
]
