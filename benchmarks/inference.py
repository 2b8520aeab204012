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
"""GKC compared with transformers' Mask2Former and with its own backbone: time and memory.

Both models have the same weights: transformers' Mask2Former with ResNet-50 and random weights, and the model that
`modeling_gkc.conversion.from_mask2former` makes of it. Before anything is timed, their masks are checked to agree.
They differ in the classifier: Mask2Former has a class head of K classes, GKC a projection into the text embedding
space and the cosines with the cached embeddings of K classes.

* `model`: image tensor to mask logits and class logits;
* `end to end`: image file to label map of the image's size, each model with its own image processor and
  post-processing;
* `backbone`: GKC's backbone alone, in the same rounds; its BatchNorm is folded in the modes that fold GKC's;
* `memory`: end to end, in a process of its own.

`eager` is the model as it was loaded. `compiled` is `torch.compile` with the same options, for GKC by
`optimize_for_inference`, for Mask2Former of all but the class head. In bf16 both models run entirely in bf16, and
Mask2Former's logits are cast to fp32 before its post-processing, which is faster that way.
"""

import gc
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import Mask2FormerForUniversalSegmentation
from transformers.models.mask2former.image_processing_pil_mask2former import Mask2FormerImageProcessorPil

from modeling_gkc.image_processing_gkc import GKCImageProcessor
from modeling_gkc.modeling_clip_resnet import channels_last
from modeling_gkc.modeling_gkc import GKCForOpenVocabSegmentation

from . import models
from .harness import (
    DTYPES,
    Options,
    Result,
    Rounds,
    compare,
    memory_mb,
    missing_compiler,
    print_progress,
    reset_peak_memory,
    time_interleaved,
)
from .models import COMPILED, EAGER, GRAPHS, OPTIMIZED, Preset, is_compiled, mode_name

MASK2FORMER, GKC = "transformers", "GKC"
BACKBONE = "backbone of GKC"
FP32_BOUND = 1e-3  # standard deviations of the mask logits: rounding may flip a bit of an attention mask
BF16_BOUND = 0.05
MODEL_GOALS = {(EAGER, "fp32"): 2.5, (OPTIMIZED, "fp32"): 2.5, (COMPILED, "fp32"): 1.6, (COMPILED, "bf16"): 2.0}
AGAINST_FP32_GOAL = 5.0
END_TO_END_GOAL = 3.0
CLASS_COUNT_GOAL = 1.1
BACKBONE_GOALS = {"cpu": 2.5, "cuda": 2.0}


@dataclass
class Pair:
    """Both models in one mode; `mask2former` is None where transformers' model does not run in this mode."""

    mode: str
    dtype: str
    gkc: GKCForOpenVocabSegmentation
    mask2former: Mask2FormerForUniversalSegmentation | None = None

    @property
    def name(self) -> str:
        """Label of the mode and data type."""
        return mode_name(self.mode, self.dtype)

    def named_models(self) -> list[tuple[str, torch.nn.Module]]:
        """Return the models of this pair with their labels."""
        named = [(MASK2FORMER, self.mask2former), (GKC, self.gkc)]
        return [(library, model) for library, model in named if model is not None]


def modes(preset: Preset, options: Options, size: int) -> list[tuple[str, str]]:
    """Return the (mode, data type) pairs to measure at a size; bf16 is compiled only, except on accelerators."""
    compiled = [] if options.device == "cpu" else [GRAPHS]
    compiled = [COMPILED, *compiled] if options.compile and size in preset.compiled_sizes else []
    return [
        (mode, dtype)
        for dtype in options.dtypes
        for mode in [EAGER, OPTIMIZED, *compiled]
        if is_compiled(mode) or dtype == "fp32" or options.device != "cpu"
    ]


@contextmanager
def _record_failure(result: Result, candidate: str) -> Iterator[None]:
    """Record an error of torch as the reason why a candidate was not measured."""
    try:
        yield
    except (RuntimeError, torch._dynamo.exc.TorchDynamoException) as error:
        lines = str(error).strip().splitlines()
        result.not_measured[candidate] = lines[0] if lines else type(error).__name__
        print_progress(f"    not measured: {candidate}: {result.not_measured[candidate]}")


def lacks_compiler(result: Result, mode: str, candidate: str, options: Options) -> bool:
    """Return whether the mode needs a compiler that is missing, and record that as the reason."""
    missing = missing_compiler() if is_compiled(mode) and options.device == "cpu" else None
    if missing:
        result.not_measured[candidate] = missing
    return bool(missing)


@torch.no_grad()
def make_pairs(preset: Preset, options: Options, size: int, result: Result, batch_size: int = 1) -> list[Pair]:
    """Return both models in every mode, called once, after checking that their masks agree."""
    source = models.make_mask2former(preset, preset.num_classes)
    converted = models.make_converted(source, preset)
    expected = source(models.random_pixels(size)).masks_queries_logits
    pairs = []
    for mode, dtype in modes(preset, options, size):
        name = mode_name(mode, dtype)
        if lacks_compiler(result, mode, name, options):
            continue
        print_progress(f"    preparing {name}")
        pair = Pair(mode, dtype, models.prepare_gkc(converted, mode, dtype, options.device, size, batch_size))
        masks = None
        if mode != OPTIMIZED:  # a mode that only GKC has
            with _record_failure(result, f"{MASK2FORMER}, {name}"):
                mask2former = models.prepare_mask2former(source, mode, dtype, options.device)
                masks = first_masks(mask2former, pair, size, batch_size)
                pair.mask2former = mask2former
        result.agreement += check_agreement(pair, size, masks, expected, batch_size)
        pairs.append(pair)
    return pairs


@torch.no_grad()
def first_masks(model: torch.nn.Module, pair: Pair, size: int, batch_size: int = 1, **inputs: Tensor) -> Tensor:
    """Return the mask logits (1, Q, H/4, W/4) of the test image; the batch is filled with copies of it."""
    weight = next(pair.gkc.parameters())
    pixels = models.random_pixels(size, 1, weight.device.type, weight.dtype).repeat(batch_size, 1, 1, 1)
    return model(pixels, **inputs).masks_queries_logits[:1].float().cpu()


def check_agreement(
    pair: Pair, size: int, mask2former: Tensor | None, expected: Tensor, batch_size: int = 1
) -> list[dict[str, Any]]:
    """Compare both models' masks with those of transformers' eager model in fp32.

    Args:
        pair: Both models in one mode.
        size: Side length of the image in pixels.
        mask2former: Masks of transformers' model in the pair's mode; None if it does not run in it.
        expected: Masks of transformers' eager model in fp32 on the CPU.
        batch_size: Batch size for which both models were compiled.

    Raises:
        harness.OutputMismatch: GKC's masks differ by more than rounding explains. In bf16, and on a GPU, whose
            convolutions round more, the bound is 1.5 times the difference of transformers' own model in that mode.
    """
    class_embeds = models.random_class_embeds(3, pair.gkc.config.projection_dim, pair.gkc.device.type)
    gkc = first_masks(pair.gkc, pair, size, batch_size, class_embeds=class_embeds)
    reference = f"{MASK2FORMER}, eager, fp32"
    names = {library: f"masks of {library}, {pair.name}, against {reference}" for library in (MASK2FORMER, GKC)}
    is_exact = pair.dtype == "fp32" and pair.gkc.device.type == "cpu"
    found = (
        []
        if mask2former is None
        else [compare(names[MASK2FORMER], mask2former, expected, FP32_BOUND if is_exact else None)]
    )
    if is_exact:
        return [*found, compare(names[GKC], gkc, expected, FP32_BOUND)]
    allowed = max([BF16_BOUND, *(1.5 * other["rms"] for other in found)])
    return [*found, compare(names[GKC], gkc, expected, allowed, "rms")]


def candidate_name(library: str, mode: str, num_classes: int) -> str:
    """Return the label of a model in one mode at a number of classes."""
    return f"{library}, {mode}, {num_classes} classes"


Call = Callable[[], Any]


def model_call(library: str, model: torch.nn.Module, num_classes: int, pixels: Tensor) -> Call:
    """Return a call from image tensor to mask and class logits."""
    if library == GKC:
        class_embeds = models.random_class_embeds(num_classes, model.config.projection_dim, pixels.device.type)
        return lambda: model(pixels, class_embeds=class_embeds)
    set_head = models.random_head_setter(model, num_classes)

    def run() -> Any:
        set_head()
        return model(pixels)

    return run


def end_to_end_call(
    library: str, model: torch.nn.Module, num_classes: int, size: int, path: Path, target: tuple
) -> Call:
    """Return a call from image file to label map of the size `target` (height, width)."""
    weight = next(model.parameters())
    square = {"height": size, "width": size}
    if library == GKC:
        processor = GKCImageProcessor(size=square)
        class_embeds = models.random_class_embeds(num_classes, model.config.projection_dim, weight.device.type)

        def run_gkc() -> Tensor:
            inputs = processor(images=str(path), return_tensors="pt").to(weight.device)
            pixels = inputs["pixel_values"].to(weight.dtype)
            outputs = model(pixels, pixel_mask=inputs["pixel_mask"], class_embeds=class_embeds)
            return processor.post_process_semantic_segmentation(outputs, target_sizes=[target])[0]

        return run_gkc
    processor = Mask2FormerImageProcessorPil(size=square)
    set_head = models.random_head_setter(model, num_classes)

    def run_mask2former() -> Tensor:
        set_head()
        inputs = processor(images=models.read_image(path), return_tensors="pt").to(weight.device)
        outputs = model(inputs["pixel_values"].to(weight.dtype), pixel_mask=inputs["pixel_mask"])
        outputs.masks_queries_logits = outputs.masks_queries_logits.float()
        outputs.class_queries_logits = outputs.class_queries_logits.float()
        return processor.post_process_semantic_segmentation(outputs, target_sizes=[target])[0]

    return run_mask2former


@torch.no_grad()
def measure_images(preset: Preset, options: Options, size: int) -> list[Result]:
    """Time `model` with `backbone`, and `end to end`, at one size: all modes and numbers of classes, interleaved."""
    model = Result(f"Image tensor to mask and class logits, {size} x {size}, ResNet-50")
    pairs = make_pairs(preset, options, size, model)
    _measure_model(model, pairs, preset, options, size)
    end_to_end = Result(f"Image file to label map, {size} x {size}, ResNet-50", not_measured=model.not_measured)
    _measure_end_to_end(end_to_end, pairs, preset, options, size)
    return [model, end_to_end]


def _measure_model(result: Result, pairs: list[Pair], preset: Preset, options: Options, size: int) -> None:
    calls: dict[str, Call] = {}
    for pair in pairs:
        pixels = models.random_pixels(size, 1, options.device, DTYPES[pair.dtype])
        for library, each in pair.named_models():
            for count in preset.classes:
                calls[candidate_name(library, pair.name, count)] = model_call(library, each, count, pixels)
        calls[f"{BACKBONE}, {pair.name}"] = backbone_call(pair.gkc, pair.mode, pixels)
    timings = _time_calls(calls, preset, options, "model")
    result.add(timings, *_ratios(timings, pairs, preset, MODEL_GOALS), *_class_count_ratios(timings, pairs, preset))
    for pair in pairs:
        result.add_ratio(_backbone_ratio(timings, pair, preset.num_classes))


def _measure_end_to_end(result: Result, pairs: list[Pair], preset: Preset, options: Options, size: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = models.write_image(Path(folder), preset)
        target = preset.image_file_size[::-1]
        calls = {
            candidate_name(library, pair.name, count): end_to_end_call(library, each, count, size, path, target)
            for pair in pairs
            for library, each in pair.named_models()
            for count in preset.classes
        }
        timings = _time_calls(calls, preset, options, "end to end")
    goals = dict.fromkeys(((pair.mode, pair.dtype) for pair in pairs), END_TO_END_GOAL)
    result.add(timings, *_ratios(timings, pairs, preset, goals))
    width, height = preset.image_file_size
    result.notes.append(f"The file is a JPEG of {width} x {height} pixels; the label map has the same size.")


def _backbone_ratio(timings: Rounds, pair: Pair, num_classes: int, batch_size: int = 1) -> dict | None:
    """Return the time of GKC over that of its backbone.

    The goal holds for deployment: compiled, and on a GPU also in batches and bf16.
    """
    is_served = is_compiled(pair.mode) and (timings.device == "cpu" or (batch_size > 1 and pair.dtype == "bf16"))
    goal = {"at_most": BACKBONE_GOALS[timings.device]} if is_served else {}
    over, under = candidate_name(GKC, pair.name, num_classes), f"{BACKBONE}, {pair.name}"
    return timings.ratio(f"GKC / its backbone, {pair.name}", over, under, **goal)


def _time_calls(calls: dict[str, Call], preset: Preset, options: Options, name: str) -> Rounds:
    print_progress(f"    timing {name}: {len(calls)} candidates")
    return time_interleaved(calls, preset.rounds, limit=preset.limit, device=options.device)


def _ratios(timings: Rounds, pairs: list[Pair], preset: Preset, goals: dict) -> list[dict | None]:
    """Return the time of transformers' model over GKC's in each mode, and of its eager fp32 over GKC's bf16."""
    found = []
    for pair in pairs:
        for count in preset.classes:
            goal = {"at_least": goals[pair.mode, pair.dtype]} if (pair.mode, pair.dtype) in goals else {}
            if pair.dtype == "bf16":
                goal |= {"needs": "amx"} if timings.device == "cpu" else {}
            found.append(_speedup(timings, pair, count, **goal))
            if pair.dtype == "bf16" and timings.device == "cpu":
                name = f"{MASK2FORMER}, eager, fp32 / GKC, {pair.name}, {count} classes"
                over = candidate_name(MASK2FORMER, mode_name(EAGER, "fp32"), count)
                under = candidate_name(GKC, pair.name, count)
                found.append(timings.ratio(name, over, under, at_least=AGAINST_FP32_GOAL, needs="amx"))
    return found


def _speedup(timings: Rounds, pair: Pair, count: int, **goal: float) -> dict | None:
    """Return the time of transformers' model over GKC's in the same mode.

    In the mode that only GKC has, it is compared with transformers' eager model.
    """
    mode, name = pair.name, f"{MASK2FORMER} / GKC, {pair.name}, {count} classes"
    if pair.mode == OPTIMIZED:
        mode = mode_name(EAGER, pair.dtype)
        name = f"{MASK2FORMER}, eager / GKC, {pair.name}, {count} classes"
    return timings.ratio(name, candidate_name(MASK2FORMER, mode, count), candidate_name(GKC, pair.name, count), **goal)


def _class_count_ratios(timings: Rounds, pairs: list[Pair], preset: Preset) -> list[dict | None]:
    """Return GKC's time with the most classes over that with the fewest."""
    few, many = preset.classes[0], preset.classes[-1]
    return [
        timings.ratio(
            f"GKC, {pair.name}, {many} classes / {few} classes",
            candidate_name(GKC, pair.name, many),
            candidate_name(GKC, pair.name, few),
            at_most=CLASS_COUNT_GOAL,
        )
        for pair in pairs
    ]


def backbone_call(model: GKCForOpenVocabSegmentation, mode: str, pixels: Tensor) -> Call:
    """Return a call of the backbone as the image path makes it."""
    backbone, pixels = model.model.backbone, channels_last(pixels)
    if is_compiled(mode):
        backbone = torch.compile(backbone, **models.compile_options(mode, pixels.device.type))
    return lambda: backbone(pixels, return_dict=True)


@torch.no_grad()
def measure_batch(preset: Preset, options: Options, size: int) -> list[Result]:
    """Time a batch on an accelerator, from image tensors to mask and class logits, and the backbone alone."""
    count, num_classes = preset.batch_size, preset.num_classes
    result = Result(f"Image tensors to mask and class logits, {size} x {size}, ResNet-50, batch {count}")
    pairs = make_pairs(preset, options, size, result, count)
    calls: dict[str, Call] = {}
    for pair in pairs:
        pixels = models.random_pixels(size, count, options.device, DTYPES[pair.dtype])
        for library, each in pair.named_models():
            calls[candidate_name(library, pair.name, num_classes)] = model_call(library, each, num_classes, pixels)
        calls[f"{BACKBONE}, {pair.name}"] = backbone_call(pair.gkc, pair.mode, pixels)
    timings = _time_calls(calls, preset, options, f"batches of {count}")
    result.add(timings)
    for pair in pairs:
        result.add_ratio(_speedup(timings, pair, num_classes))
        result.add_ratio(_backbone_ratio(timings, pair, num_classes, count))
    for candidate, seconds in result.seconds.items():
        result.notes.append(f"{candidate}: {count / seconds['clock']['median']:.1f} images per second.")
    return [result]


@torch.no_grad()
def measure_memory(preset: Preset, options: Options, library: str, mode: str, dtype: str) -> list[Result]:
    """Measure this process's memory from image file to label map, during and after the calls that compile."""
    size, candidate = preset.sizes[0], f"{library}, {mode_name(mode, dtype)}"
    result = Result(memory_title(preset))
    if lacks_compiler(result, mode, candidate, options):
        return [result]
    if library == GKC:
        model = models.prepare_gkc(models.make_gkc(preset, "resnet"), mode, dtype, options.device, size)
    else:
        source = models.make_mask2former(preset, preset.num_classes)
        model = models.prepare_mask2former(source, mode, dtype, options.device)
    gc.collect()
    with tempfile.TemporaryDirectory() as folder:
        path = models.write_image(Path(folder), preset)
        call = end_to_end_call(library, model, preset.num_classes, size, path, preset.image_file_size[::-1])
        result.megabytes[candidate] = memory_of(call, options.device)
    return [result]


def memory_title(preset: Preset) -> str:
    """Return the heading that all memory measurements share, so that they form one table."""
    size = preset.sizes[0]
    return f"Memory, image file to label map, {size} x {size}, {preset.num_classes} classes"


def memory_of(call: Call, device: str = "cpu") -> dict[str, float]:
    """Measure memory in MB around four calls: on a CPU of the process, on a GPU of torch's allocator.

    Returns:
        `before`, the memory held before the first call; `peak`, the peak up to the end of the second call, because
        torch.compile may compile again for it; `later`, the peak of two more calls.
    """
    if device == "cuda":
        return _memory_of_cuda(call)
    found = {"before": memory_mb("VmRSS")}
    call()
    call()
    found["peak"] = memory_mb("VmHWM")
    reset_peak_memory()
    call()
    call()
    return found | {"later": memory_mb("VmHWM")}


def _memory_of_cuda(call: Call) -> dict[str, float]:
    found = {"before": torch.cuda.memory_allocated() / 2**20}
    call()
    call()
    found["peak"] = torch.cuda.max_memory_allocated() / 2**20
    torch.cuda.reset_peak_memory_stats()
    call()
    call()
    return found | {"later": torch.cuda.max_memory_allocated() / 2**20}
