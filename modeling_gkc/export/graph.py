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
"""The graph behind `export`: a module that can be traced, its trace, its ONNX form, and the comparison with the model.

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

from ..class_embedder import SMALLEST_PROBABILITY
from ..class_embeddings import GKCClassEmbeddings, average_class_embeds, count_classes

OUTPUTS = ("class_queries_logits", "masks_queries_logits", "query_embeds")
TOLERANCE = 1e-3
# A mask logit within rounding of zero may fall on either side, which changes what a query attends to; such an image
# says nothing of the graph, another one does.
CHECKED_IMAGES = 3
# A protocol buffer ends at 2 GiB: larger weights go into a file beside the graph.
MAX_SINGLE_FILE_BYTES = 1_800_000_000
RUNTIME_PACKAGE = "onnxruntime"


class ExportableSegmenter(nn.Module):
    """
    The image path of a segmenter, and its classification without anything that depends on the words' number.

    Args:
        model: In fp32; its modules are shared, not copied.
        words: What to bake in, or None to take one embedding per class as an input.
    """

    def __init__(self, model: Any, words: GKCClassEmbeddings | None = None):
        super().__init__()
        self.model = model.model
        self.classifier = (_ConvexClassifier if model.is_convex else _CosineClassifier)(model, words)
        self.eval()

    def forward(self, pixel_values: Tensor, class_embeds: Tensor | None = None) -> dict[str, Tensor]:
        """(B, 3, H, W) images and (K, D) words, unless they are baked in, to the three outputs by name."""
        segments = self.model(pixel_values, output_stages=False, return_dict=True)
        class_logits, query_embeds = self.classifier(segments, class_embeds)
        return dict(zip(OUTPUTS, (class_logits, segments.masks_queries_logits, query_embeds), strict=True))


class _CosineClassifier(nn.Module):
    """Cosines of queries and words, as `GKCForOpenVocabSegmentation.class_logits`; of words baked in also the best."""

    def __init__(self, model: Any, words: GKCClassEmbeddings | None):
        super().__init__()
        self.class_embedder = model.class_embedder
        self.register_buffer("no_object", F.normalize(model.no_object_embedding.detach(), dim=-1)[None])
        self.register_buffer("temperature", model.temperature.detach().clone())
        targets = rows = None
        if words is not None and _takes_best(model, words):
            targets, rows = words.class_embeds, _rows_of_classes(words.class_ids)
        elif words is not None:
            targets = one_embed_per_class(model, words)
        self.register_buffer("targets", targets)
        self.register_buffer("rows", rows)

    def forward(self, stage: Any, class_embeds: Tensor | None) -> tuple[Tensor, Tensor]:
        """(B, Q, K + 1) logits and (B, Q, D) embeddings."""
        query_embeds = self.class_embedder(stage)
        words = self.targets if class_embeds is None else class_embeds
        logits = self.temperature * query_embeds @ torch.cat([words, self.no_object]).T
        if self.rows is not None:
            logits = torch.cat([logits[..., self.rows].amax(dim=-1), logits[..., -1:]], dim=-1)
        return logits, query_embeds


class _ConvexClassifier(nn.Module):
    """Shares of a head's classes, as `GKCConvexClassEmbedder` gives them to words; for words baked in a constant."""

    def __init__(self, model: Any, words: GKCClassEmbeddings | None):
        super().__init__()
        self.class_embedder = model.class_embedder
        self.register_buffer("temperature", model.temperature.detach().clone())
        shares = None
        if words is not None:
            embeds, class_ids = words.class_embeds, words.class_ids
            if model.config.prompt_reduction == "embedding_mean":
                embeds, class_ids = average_class_embeds(embeds, class_ids), None
            num_classes = count_classes(words.class_ids, len(words.class_embeds))
            with torch.no_grad():
                shares = self.class_embedder.shares(embeds, class_ids, num_classes)
        self.register_buffer("shares", shares)

    def forward(self, stage: Any, class_embeds: Tensor | None) -> tuple[Tensor, Tensor]:
        """(B, Q, K + 1) logits and (B, Q, D) embeddings."""
        probabilities = self.class_embedder.head_probabilities(stage)
        if class_embeds is None:
            logits = (probabilities @ self.shares).clamp(min=SMALLEST_PROBABILITY).log()
        else:
            logits = self.class_embedder.class_logits(probabilities, class_embeds, None, class_embeds.shape[0])
        return self.temperature * logits, self.class_embedder.embed(probabilities)


def _takes_best(model: Any, words: GKCClassEmbeddings) -> bool:
    """Whether a class's logit is the best of its names', which no single embedding can give."""
    return model.config.prompt_reduction == "max" and len(words.class_ids.unique()) < len(words.class_ids)


def _rows_of_classes(class_ids: Tensor) -> Tensor:
    """(K, most names) rows of each class's names; a class with fewer repeats its first."""
    rows = [(class_ids == index).nonzero().flatten() for index in range(int(class_ids.max()) + 1)]
    most = max(map(len, rows))
    return torch.stack([torch.cat([own, own[:1].expand(most - len(own))]) for own in rows])


def one_embed_per_class(model: Any, words: GKCClassEmbeddings) -> Tensor:
    """
    The rows of the graph's input `class_embeds`, which give the logits that the model gives for the words.

    A logit is linear in the embedding, so the mean of several names' logits is the logit of the mean embedding: that
    mean is not normalised, while `embedding_mean` is.

    Args:
        model: A `GKCForOpenVocabSegmentation`.
        words: Embeddings (P, D) of names and their classes (P,).

    Returns:
        (K, D) fp32 on the CPU.

    Raises:
        ValueError: the embeddings have another width than the model's, or a class has several names and the model
            takes the best of them.
    """
    embeds, class_ids = words.class_embeds.detach().cpu().float(), words.class_ids.cpu()
    check_width(model, embeds)
    num_classes = count_classes(class_ids, len(embeds))
    if num_classes == len(embeds):
        return embeds[class_ids.argsort()]
    reduction = model.config.prompt_reduction
    if reduction == "embedding_mean":
        return average_class_embeds(embeds, class_ids)
    if model.is_convex or reduction == "max":
        raise ValueError(
            "this model takes the best of several names of a class, which one embedding per class cannot give: bake "
            "the words in (fixed), or name each class once."
        )
    sums = embeds.new_zeros(num_classes, embeds.shape[1]).index_add(0, class_ids, embeds)
    return sums / class_ids.bincount()[:, None]


def check_width(model: Any, class_embeds: Tensor) -> None:
    """
    Refuses words of another text space.

    Raises:
        ValueError: `class_embeds` are not (P, D) of the model's D.
    """
    width = model.config.projection_dim
    if class_embeds.ndim != 2 or class_embeds.shape[1] != width:
        raise ValueError(
            f"the words' embeddings are {tuple(class_embeds.shape)}, but this model's text space has the width "
            f"{width}: encode them with this model."
        )


def trace(segmenter: ExportableSegmenter, height: int, width: int, fixed: bool) -> torch.export.ExportedProgram:
    """
    The graph for images of one size, any number of them, and any number of words where they are an input.

    Raises:
        ValueError: torch cannot trace the model.
    """
    example = {"pixel_values": torch.zeros(2, 3, height, width)}
    if not fixed:
        example["class_embeds"] = torch.zeros(3, _text_width(segmenter))
    dimensions = {name: {0: torch.export.Dim(axis)} for name, axis in _free_axes(fixed).items()}
    with torch.no_grad(), _quiet(), _export_errors():
        return torch.export.export(segmenter, (), example, dynamic_shapes=dimensions, strict=False)


def _text_width(segmenter: ExportableSegmenter) -> int:
    return segmenter.model.config.projection_dim


def _free_axes(fixed: bool) -> dict[str, str]:
    """Name of the first axis of each input."""
    return {"pixel_values": "batch"} | ({} if fixed else {"class_embeds": "classes"})


def write_onnx(program: torch.export.ExportedProgram, path: Path, opset: int, fixed: bool) -> None:
    """
    Write a traced graph as ONNX; weights beyond what one file can hold go into another beside it.

    Raises:
        ValueError: torch has no ONNX form for a part of the model.
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
    """What torch says over pages becomes a line."""
    try:
        yield
    except Exception as error:  # torch's exporters raise errors of many types
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise ValueError(f"torch cannot export this model: {reason.strip()}") from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what torch and onnxscript say of their own parts."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)


def load_graph(graph: Path) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    """A function that runs a graph that was written."""
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
    words: GKCClassEmbeddings | None,
    fixed: bool,
) -> float:
    """Largest difference of mask logits on a random image.

    Raises:
        ValueError: it is beyond the tolerance, or the class logits' is.
    """
    generator = torch.Generator().manual_seed(0)
    if words is None:
        embeds = F.normalize(torch.randn(5, model.config.projection_dim, generator=generator), dim=-1)
        words = GKCClassEmbeddings(class_embeds=embeds, class_ids=torch.arange(5))
    extra = {} if fixed else {"class_embeds": one_embed_per_class(model, words)}
    differences = []
    for _ in range(CHECKED_IMAGES):
        pixel_values = torch.randn(1, 3, *size, generator=generator)
        expected, found = model(pixel_values, **words), run({"pixel_values": pixel_values} | extra)
        masks, classes = (
            float((found[name] - expected[name]).abs().max()) for name in ("masks_queries_logits", OUTPUTS[0])
        )
        if max(masks, classes) <= TOLERANCE:
            return masks
        differences.append(f"{masks:.2g} (masks) and {classes:.2g} (classes)")
    raise ValueError(f"the graph's logits differ from the model's by {'; '.join(differences)}: it was not written.")


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
