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
"""Ours against transformers' Mask2Former, against our own backbone, and the memory of each.

The two sides have the same weights: transformers' Mask2Former with ResNet-50, random, and what
`modeling_gkc.conversion.from_mask2former` makes of it. That their masks agree is checked before anything is timed.
They differ in what names a mask: transformers has a class head of K classes, ours a projection into the space of words
and the cosines with K words, whose embeddings are cached, as in use.

* `model`: image tensor -> mask logits and class logits;
* `whole`: image file -> label map of the picture's size, each side with its own image processor and post-processing;
* `floor`: the backbone of ours alone, in the same rounds: its BatchNorm is folded where that of the whole is;
* `memory`: the whole way in a process of its own.

`eager` is the model as it was loaded. `compiled` is `torch.compile`, on our side by `optimize_for_inference`, on
transformers' side of all but the class head, with the same options. In bf16 both run wholly in bf16, and transformers'
logits are made fp32 before its post-processing, which is faster so.
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
    forget_peak,
    memory_mb,
    no_compiler,
    progress,
    take_turns,
)
from .models import COMPILED, EAGER, GRAPHS, OPTIMIZED, Preset, is_compiled, mode_name

THEIRS, OURS = "transformers", "ours"
BACKBONE = "backbone of ours"
FP32_BOUND = 1e-3  # in standard deviations of the mask logits: an attention bit may flip by rounding
BF16_BOUND = 0.05
MODEL_GOALS = {(EAGER, "fp32"): 2.5, (OPTIMIZED, "fp32"): 2.5, (COMPILED, "fp32"): 1.6, (COMPILED, "bf16"): 2.0}
AGAINST_FP32_GOAL = 5.0
WHOLE_GOAL = 3.0
WORDS_GOAL = 1.1
FLOOR_GOALS = {"cpu": 2.5, "cuda": 2.0}


@dataclass
class Pair:
    """Both sides in one mode."""

    mode: str
    dtype: str
    ours: GKCForOpenVocabSegmentation
    theirs: Mask2FormerForUniversalSegmentation | None = None

    @property
    def name(self) -> str:
        """Of the mode."""
        return mode_name(self.mode, self.dtype)

    def sides(self) -> list[tuple[str, torch.nn.Module]]:
        """Transformers', if it runs in this mode, and ours, by name."""
        return [(side, model) for side, model in ((THEIRS, self.theirs), (OURS, self.ours)) if model is not None]


def modes(preset: Preset, options: Options, size: int) -> list[tuple[str, str]]:
    """(mode, type) to be measured at a size; bf16 without compilation only on accelerators."""
    compiled = [] if options.device == "cpu" else [GRAPHS]
    compiled = [COMPILED, *compiled] if options.compile and size in preset.compiled_sizes else []
    return [
        (mode, dtype)
        for dtype in options.dtypes
        for mode in [EAGER, OPTIMIZED, *compiled]
        if is_compiled(mode) or dtype == "fp32" or options.device != "cpu"
    ]


@contextmanager
def _reason(result: Result, arm: str) -> Iterator[None]:
    """What fails is noted as not measured, with the reason."""
    try:
        yield
    except (RuntimeError, torch._dynamo.exc.TorchDynamoException) as error:
        result.not_measured[arm] = _first_line(error)
        progress(f"    not measured: {arm}: {result.not_measured[arm]}")


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def lacks_compiler(result: Result, mode: str, arm: str, options: Options) -> bool:
    """Whether the mode cannot be measured here, which is then noted."""
    missing = no_compiler() if is_compiled(mode) and options.device == "cpu" else None
    if missing:
        result.not_measured[arm] = missing
    return bool(missing)


@torch.no_grad()
def make_pairs(preset: Preset, options: Options, size: int, result: Result, batch_size: int = 1) -> list[Pair]:
    """Both sides in every mode, run once, after their masks were found to agree."""
    source = models.make_source(preset, preset.num_classes)
    converted = models.make_converted(source, preset)
    expected = source(models.random_pixels(size)).masks_queries_logits
    pairs = []
    for mode, dtype in modes(preset, options, size):
        name = mode_name(mode, dtype)
        if lacks_compiler(result, mode, name, options):
            continue
        progress(f"    preparing {name}")
        pair = Pair(mode, dtype, models.prepare_ours(converted, mode, dtype, options.device, size, batch_size))
        masks = None
        if mode != OPTIMIZED:  # which is ours alone
            with _reason(result, f"{THEIRS}, {name}"):
                theirs = models.prepare_source(source, mode, dtype, options.device)
                masks = first_masks(theirs, pair, size, batch_size)
                pair.theirs = theirs
        result.agreement += check_agreement(pair, size, masks, expected, batch_size)
        pairs.append(pair)
    return pairs


@torch.no_grad()
def first_masks(model: torch.nn.Module, pair: Pair, size: int, batch_size: int = 1, **words: Tensor) -> Tensor:
    """Mask logits (1, Q, H/4, W/4) of the picture by which agreement is checked, the batch full of it."""
    weight = next(pair.ours.parameters())
    pixels = models.random_pixels(size, 1, weight.device.type, weight.dtype).repeat(batch_size, 1, 1, 1)
    return model(pixels, **words).masks_queries_logits[:1].float().cpu()


def check_agreement(
    pair: Pair, size: int, theirs: Tensor | None, expected: Tensor, batch_size: int = 1
) -> list[dict[str, Any]]:
    """Compares both sides' masks with those of transformers in fp32, not compiled.

    Args:
        pair: Both sides.
        size: Of the image.
        theirs: Masks of transformers in the pair's mode; None if it does not run in it.
        expected: Masks of transformers in fp32, not compiled, on the processor.
        batch_size: For which both were compiled.

    Raises:
        harness.Disagreement: ours are off by more than rounding explains: in bf16, and on a GPU, whose convolutions
            round more, than half as much again as transformers itself.
    """
    words = models.random_words(3, pair.ours.config.projection_dim, pair.ours.device.type)
    ours = first_masks(pair.ours, pair, size, batch_size, class_embeds=words)
    names = {side: f"masks of {side}, {pair.name}, against {THEIRS}, eager, fp32" for side in (THEIRS, OURS)}
    is_exact = pair.dtype == "fp32" and pair.ours.device.type == "cpu"
    found = [] if theirs is None else [compare(names[THEIRS], theirs, expected, FP32_BOUND if is_exact else None)]
    if is_exact:
        return [*found, compare(names[OURS], ours, expected, FP32_BOUND)]
    allowed = max([BF16_BOUND, *(1.5 * other["rms"] for other in found)])
    return [*found, compare(names[OURS], ours, expected, allowed, "rms")]


def arm_name(side: str, mode: str, num_classes: int) -> str:
    """Of one side in one mode asked for so many words."""
    return f"{side}, {mode}, {num_classes} words"


Call = Callable[[], Any]


def model_call(side: str, model: torch.nn.Module, num_classes: int, pixels: Tensor) -> Call:
    """Image tensor -> mask and class logits."""
    if side == OURS:
        words = models.random_words(num_classes, model.config.projection_dim, pixels.device.type)
        return lambda: model(pixels, class_embeds=words)
    put_head = models.with_head(model, num_classes)

    def run() -> Any:
        put_head()
        return model(pixels)

    return run


def whole_call(side: str, model: torch.nn.Module, num_classes: int, size: int, path: Path, target: tuple) -> Call:
    """Image file -> label map of the size `target` (height, width)."""
    weight = next(model.parameters())
    square = {"height": size, "width": size}
    if side == OURS:
        processor = GKCImageProcessor(size=square)
        words = models.random_words(num_classes, model.config.projection_dim, weight.device.type)

        def run_ours() -> Tensor:
            inputs = processor(images=str(path), return_tensors="pt").to(weight.device)
            pixels = inputs["pixel_values"].to(weight.dtype)
            outputs = model(pixels, pixel_mask=inputs["pixel_mask"], class_embeds=words)
            return processor.post_process_semantic_segmentation(outputs, target_sizes=[target])[0]

        return run_ours
    processor = Mask2FormerImageProcessorPil(size=square)
    put_head = models.with_head(model, num_classes)

    def run_theirs() -> Tensor:
        put_head()
        inputs = processor(images=models.read_picture(path), return_tensors="pt").to(weight.device)
        outputs = model(inputs["pixel_values"].to(weight.dtype), pixel_mask=inputs["pixel_mask"])
        outputs.masks_queries_logits = outputs.masks_queries_logits.float()
        outputs.class_queries_logits = outputs.class_queries_logits.float()
        return processor.post_process_semantic_segmentation(outputs, target_sizes=[target])[0]

    return run_theirs


@torch.no_grad()
def measure_images(preset: Preset, options: Options, size: int) -> list[Result]:
    """`model` with `floor`, and `whole`, at one size: all modes and numbers of words, in turn."""
    model = Result(f"Image tensor to mask and class logits, {size} x {size}, ResNet-50")
    pairs = make_pairs(preset, options, size, model)
    _measure_model(model, pairs, preset, options, size)
    whole = Result(f"Image file to label map, {size} x {size}, ResNet-50", not_measured=model.not_measured)
    _measure_whole(whole, pairs, preset, options, size)
    return [model, whole]


def _measure_model(result: Result, pairs: list[Pair], preset: Preset, options: Options, size: int) -> None:
    calls: dict[str, Call] = {}
    for pair in pairs:
        pixels = models.random_pixels(size, 1, options.device, DTYPES[pair.dtype])
        for side, each in pair.sides():
            for count in preset.classes:
                calls[arm_name(side, pair.name, count)] = model_call(side, each, count, pixels)
        calls[f"{BACKBONE}, {pair.name}"] = backbone_call(pair.ours, pair.mode, pixels)
    taken = _turns(calls, preset, options, "model")
    result.add(taken, *_ratios(taken, pairs, preset, MODEL_GOALS), *_words_ratios(taken, pairs, preset))
    for pair in pairs:
        result.add_ratio(_floor_ratio(taken, pair, preset.num_classes))


def _measure_whole(result: Result, pairs: list[Pair], preset: Preset, options: Options, size: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = models.write_picture(Path(folder), preset)
        calls = {
            arm_name(side, pair.name, count): whole_call(side, each, count, size, path, preset.picture[::-1])
            for pair in pairs
            for side, each in pair.sides()
            for count in preset.classes
        }
        taken = _turns(calls, preset, options, "whole")
    goals = dict.fromkeys(((pair.mode, pair.dtype) for pair in pairs), WHOLE_GOAL)
    result.add(taken, *_ratios(taken, pairs, preset, goals))
    result.notes.append(f"The file is a JPEG of {preset.picture[0]} x {preset.picture[1]}, as is the label map.")


def _floor_ratio(taken: Rounds, pair: Pair, num_classes: int, batch_size: int = 1) -> dict | None:
    """Ours over its backbone; the goal is for what is served: compiled, and on a GPU in batches and bf16."""
    is_served = is_compiled(pair.mode) and (taken.device == "cpu" or (batch_size > 1 and pair.dtype == "bf16"))
    goal = {"at_most": FLOOR_GOALS[taken.device]} if is_served else {}
    over, under = arm_name(OURS, pair.name, num_classes), f"{BACKBONE}, {pair.name}"
    return taken.ratio(f"ours / its backbone, {pair.name}", over, under, **goal)


def _turns(calls: dict[str, Call], preset: Preset, options: Options, name: str) -> Rounds:
    progress(f"    timing {name}: {len(calls)} arms")
    return take_turns(calls, preset.rounds, limit=preset.limit, device=options.device)


def _ratios(taken: Rounds, pairs: list[Pair], preset: Preset, goals: dict) -> list[dict | None]:
    """Transformers over ours, in the same mode, and in fp32 over ours in bf16."""
    found = []
    for pair in pairs:
        for count in preset.classes:
            goal = {"at_least": goals[pair.mode, pair.dtype]} if (pair.mode, pair.dtype) in goals else {}
            if pair.dtype == "bf16":
                goal |= {"needs": "amx"} if taken.device == "cpu" else {}
            found.append(_against_theirs(taken, pair, count, **goal))
            if pair.dtype == "bf16" and taken.device == "cpu":
                name = f"{THEIRS}, eager, fp32 / ours, {pair.name}, {count} words"
                over = arm_name(THEIRS, mode_name(EAGER, "fp32"), count)
                under = arm_name(OURS, pair.name, count)
                found.append(taken.ratio(name, over, under, at_least=AGAINST_FP32_GOAL, needs="amx"))
    return found


def _against_theirs(taken: Rounds, pair: Pair, count: int, **goal: float) -> dict | None:
    """Transformers over ours in the same mode; in the one that is ours alone, over transformers as it was loaded."""
    mode, name = pair.name, f"{THEIRS} / ours, {pair.name}, {count} words"
    if pair.mode == OPTIMIZED:
        mode = mode_name(EAGER, pair.dtype)
        name = f"{THEIRS}, eager / ours, {pair.name}, {count} words"
    return taken.ratio(name, arm_name(THEIRS, mode, count), arm_name(OURS, pair.name, count), **goal)


def _words_ratios(taken: Rounds, pairs: list[Pair], preset: Preset) -> list[dict | None]:
    """The most words over the fewest, ours."""
    few, many = preset.classes[0], preset.classes[-1]
    return [
        taken.ratio(
            f"ours, {pair.name}, {many} words / {few} words",
            arm_name(OURS, pair.name, many),
            arm_name(OURS, pair.name, few),
            at_most=WORDS_GOAL,
        )
        for pair in pairs
    ]


def backbone_call(model: GKCForOpenVocabSegmentation, mode: str, pixels: Tensor) -> Call:
    """The backbone as the image path calls it."""
    backbone, pixels = model.model.backbone, channels_last(pixels)
    if is_compiled(mode):
        backbone = torch.compile(backbone, **models.compile_options(mode, pixels.device.type))
    return lambda: backbone(pixels, return_dict=True)


@torch.no_grad()
def measure_batch(preset: Preset, options: Options, size: int) -> list[Result]:
    """Throughput of a batch on an accelerator, image tensors -> mask and class logits, and the floor."""
    count, words = preset.batch_size, preset.num_classes
    result = Result(f"Image tensors to mask and class logits, {size} x {size}, ResNet-50, batch {count}")
    pairs = make_pairs(preset, options, size, result, count)
    calls: dict[str, Call] = {}
    for pair in pairs:
        pixels = models.random_pixels(size, count, options.device, DTYPES[pair.dtype])
        for side, each in pair.sides():
            calls[arm_name(side, pair.name, words)] = model_call(side, each, words, pixels)
        calls[f"{BACKBONE}, {pair.name}"] = backbone_call(pair.ours, pair.mode, pixels)
    taken = _turns(calls, preset, options, f"batches of {count}")
    result.add(taken)
    for pair in pairs:
        result.add_ratio(_against_theirs(taken, pair, words))
        result.add_ratio(_floor_ratio(taken, pair, words, count))
    for arm, seconds in result.seconds.items():
        result.notes.append(f"{arm}: {count / seconds['clock']['median']:.1f} images a second.")
    return [result]


@torch.no_grad()
def measure_memory(preset: Preset, options: Options, side: str, mode: str, dtype: str) -> list[Result]:
    """Memory of this process over its first call, which compiles, and over later ones; image file -> label map."""
    size, arm = preset.sizes[0], f"{side}, {mode_name(mode, dtype)}"
    result = Result(memory_title(preset))
    if lacks_compiler(result, mode, arm, options):
        return [result]
    if side == OURS:
        model = models.prepare_ours(models.make_ours(preset, "resnet"), mode, dtype, options.device, size)
    else:
        model = models.prepare_source(models.make_source(preset, preset.num_classes), mode, dtype, options.device)
    gc.collect()
    with tempfile.TemporaryDirectory() as folder:
        path = models.write_picture(Path(folder), preset)
        call = whole_call(side, model, preset.num_classes, size, path, preset.picture[::-1])
        result.megabytes[arm] = memory_of(call, options.device)
    return [result]


def memory_title(preset: Preset) -> str:
    """All arms of one table."""
    size = preset.sizes[0]
    return f"Memory, image file to label map, {size} x {size}, {preset.num_classes} words"


def memory_of(call: Call, device: str = "cpu") -> dict[str, float]:
    """MB held before `call`, the most of the process once it was called twice, and the most of two later calls.

    Twice, as torch.compile may compile anew for the second call.
    """
    if device == "cuda":
        return _memory_of_cuda(call)
    found = {"before": memory_mb("VmRSS")}
    call()
    call()
    found["peak"] = memory_mb("VmHWM")
    forget_peak()
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
