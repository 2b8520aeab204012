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
"""GKC compared with earlier ways of open-vocabulary segmentation: two-stage segmentation and CLIPSeg.

* Two-stage: the same masks, by GKC, then CLIP's RN50 on the 224 x 224 crop of each of the 100 masked regions, gray
  outside of the mask, and the cosines with K classes, as in ZegFormer (Ding et al., CVPR 2022) and OVSeg (Liang et
  al., CVPR 2023). An empty mask is replaced by the whole image, so that there are always 100 crops.
* CLIPSeg (Lueddecke and Ecker, CVPR 2022) of transformers, in the sizes of its release rd64 (ViT-B/16), at 352 x 352:
  `as documented`, where the image is passed once for every class, and `image encoded once`, where the user calls its
  parts. Its class names are given as embeddings, as are GKC's.

All weights are random.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import CLIPSegConfig, CLIPSegForImageSegmentation

from modeling_gkc.configuration_gkc import CLIPResNetConfig
from modeling_gkc.modeling_clip_resnet import CLIPResNetVisionModel
from modeling_gkc.modeling_gkc import GKCForOpenVocabSegmentation
from train.teacher.crops import crop_region, normalize_crops

from . import models
from .harness import DTYPES, Options, Result, time_interleaved
from .inference import BACKBONE, backbone_call, lacks_compiler, memory_of, memory_title
from .models import EAGER, Preset, is_compiled, mode_name

CLIPSEG_SIDE = 352
TWO_STAGE_GOAL = 10.0


class TwoStage:
    """Two-stage segmenter: predict masks, then classify each masked region with CLIP.

    Args:
        segmenter: Model that predicts the masks.
        vision_model: CLIP's image encoder.
        class_embeds: Class embeddings (K, D).
        crop_size: Side length of the crops in pixels.
        image: The image (H, W, 3) in uint8, in the size of the segmenter's input.
    """

    def __init__(
        self,
        segmenter: GKCForOpenVocabSegmentation,
        vision_model: Callable[..., Any],
        class_embeds: Tensor,
        crop_size: int,
        image: np.ndarray,
    ):
        self.segmenter, self.vision_model, self.class_embeds = segmenter, vision_model, class_embeds
        self.crop_size, self.image = crop_size, image

    def __call__(self, pixels: Tensor) -> Tensor:
        """Return the class logits (Q, K) of the masks of one image (1, 3, H, W)."""
        masks = self.segmenter.model(pixels, output_stages=False, return_dict=True).masks_queries_logits
        crops = normalize_crops(self.crops(masks), pixels)
        embeds = F.normalize(self.vision_model(crops).image_embeds.float(), dim=-1)
        return 100 * embeds @ self.class_embeds.T

    def crops(self, masks: Tensor) -> Tensor:
        """Return the crops (Q, side, side, 3) in uint8 of the regions under the mask logits (1, Q, H/4, W/4)."""
        grid = self.image.shape[:2]
        whole = F.interpolate(masks.float(), size=grid, mode="bilinear", align_corners=False)[0] > 0
        whole[~whole.flatten(1).any(dim=1)] = True
        crops = [crop_region(self.image, mask, self.crop_size) for mask in whole.cpu().numpy()]
        return torch.from_numpy(np.stack(crops))


def make_two_stage(preset: Preset, mode: str, dtype: str, options: Options, size: int) -> TwoStage:
    """Build the two-stage segmenter with both stages in one mode."""
    segmenter = models.prepare_gkc(models.make_gkc(preset), mode, dtype, options.device, size)
    torch.manual_seed(1)
    tower = CLIPResNetVisionModel(CLIPResNetConfig(**preset.clip_resnet)).eval().to(options.device, DTYPES[dtype])
    tower = tower.to(memory_format=torch.channels_last)
    if is_compiled(mode):
        tower = torch.compile(tower, **models.compile_options(mode, options.device))
    class_embeds = models.random_class_embeds(preset.num_classes, segmenter.config.projection_dim, options.device)
    image = np.random.default_rng(0).integers(0, 256, (size, size, 3), dtype=np.uint8)
    return TwoStage(segmenter, tower, class_embeds, preset.crop_size, image)


def _baseline_modes(preset: Preset, options: Options) -> list[tuple[str, str]]:
    kept = [(mode, dtype) for mode, dtype in preset.baseline_modes if dtype in options.dtypes]
    return [(mode, dtype) for mode, dtype in kept if options.compile or not is_compiled(mode)]


@torch.no_grad()
def measure_two_stage(preset: Preset, options: Options, size: int) -> list[Result]:
    """Time GKC and the two-stage segmenter from image tensor to mask and class logits."""
    result = Result(f"GKC against two stages, image tensor to logits, {size} x {size}, CLIP RN50")
    calls: dict[str, Callable[[], Any]] = {}
    for mode, dtype in _baseline_modes(preset, options):
        name = mode_name(mode, dtype)
        if lacks_compiler(result, mode, name, options):
            continue
        baseline = make_two_stage(preset, mode, dtype, options, size)
        pixels = models.random_pixels(size, 1, options.device, DTYPES[dtype])
        calls[f"two stages, {name}"] = partial(baseline, pixels)
        calls[f"GKC, {name}"] = partial(baseline.segmenter, pixels, class_embeds=baseline.class_embeds)
        calls[f"{BACKBONE}, {name}"] = backbone_call(baseline.segmenter, mode, pixels)
    timings = time_interleaved(calls, preset.baseline_rounds, limit=preset.limit, device=options.device)
    names = [mode_name(*mode) for mode in _baseline_modes(preset, options)]
    result.add(timings)
    for name in names:
        whole, stages = f"GKC, {name}", f"two stages, {name}"
        result.add_ratio(timings.ratio(f"two stages / GKC, {name}", stages, whole, at_least=TWO_STAGE_GOAL))
        result.add_ratio(timings.ratio(f"GKC / its backbone, CLIP RN50, {name}", whole, f"{BACKBONE}, {name}"))
    return [result]


class CLIPSeg:
    """CLIPSeg called with class embeddings that were encoded before.

    Args:
        preset: Sizes to use.
        device: Device on which the model runs.
    """

    def __init__(self, preset: Preset, device: str):
        torch.manual_seed(0)
        config = CLIPSegConfig(**(preset.clipseg or {"vision_config": {"patch_size": 16}}))
        self.model = CLIPSegForImageSegmentation(config).eval().to(device)
        self.side = config.vision_config.image_size if preset.clipseg else CLIPSEG_SIDE
        self.pixels = models.random_pixels(self.side, 1, device)

    def random_class_embeds(self, count: int) -> Tensor:
        """Return random class embeddings (count, D)."""
        return models.random_class_embeds(count, self.model.config.projection_dim, self.pixels.device.type)

    def as_documented(self, class_embeds: Tensor) -> Tensor:
        """Return logits (K, side, side); the image is encoded once for every class."""
        pixels = self.pixels.expand(len(class_embeds), -1, -1, -1)
        return self.model(pixel_values=pixels, conditional_embeddings=class_embeds).logits

    def encoded_once(self, class_embeds: Tensor, batch: int) -> Tensor:
        """Return the logits of `as_documented`, encoding the image once and decoding `batch` classes at a time."""
        found = self.model.clip.get_image_features(
            self.pixels, interpolate_pos_encoding=True, output_hidden_states=True, return_dict=True
        )
        states = [found.hidden_states[index + 1] for index in self.model.extract_layers]
        logits = [
            self.model.decoder([state.expand(len(part), -1, -1) for state in states], part).logits
            for part in class_embeds.split(batch)
        ]
        return torch.cat([each.reshape(-1, self.side, self.side) for each in logits])


@torch.no_grad()
def measure_clipseg(preset: Preset, options: Options, size: int) -> list[Result]:
    """Time GKC and CLIPSeg from image tensor to logits, both eager and in fp32."""
    result = Result(f"GKC, {size} x {size}, against CLIPSeg, {CLIPSEG_SIDE} x {CLIPSEG_SIDE}, eager, fp32")
    baseline, gkc = CLIPSeg(preset, options.device), models.make_gkc(preset).to(options.device)
    pixels = models.random_pixels(size, 1, options.device)
    batch = baseline.random_class_embeds(preset.clipseg_batch)
    part = f"CLIPSeg as documented, one call of {len(batch)} classes"
    calls: dict[str, Callable[[], Any]] = {part: lambda: baseline.as_documented(batch)}
    for count in preset.clipseg_classes:
        name = f"CLIPSeg, image encoded once, {count} classes"
        calls[name] = partial(baseline.encoded_once, baseline.random_class_embeds(count), 10)
        class_embeds = models.random_class_embeds(count, gkc.config.projection_dim, options.device)
        calls[f"GKC, {count} classes"] = partial(gkc, pixels, class_embeds=class_embeds)
    timings = time_interleaved(calls, preset.baseline_rounds, limit=preset.limit, device=options.device)
    ratios = []
    for count in preset.clipseg_classes:
        under, once = f"GKC, {count} classes", f"CLIPSeg, image encoded once, {count} classes"
        documented = f"CLIPSeg as documented / GKC, {count} classes"
        ratios.append(timings.ratio(documented, part, under, scale=count / len(batch)))
        ratios.append(timings.ratio(f"CLIPSeg, image encoded once / GKC, {count} classes", once, under))
    result.add(timings, *ratios)
    result.notes.append(
        f"CLIPSeg as documented was timed on {len(batch)} classes per call; the ratios multiply that time, because "
        "its cost is proportional to the number of classes."
    )
    return [result]


@torch.no_grad()
def measure_baseline_memory(preset: Preset, options: Options, baseline: str) -> list[Result]:
    """Measure this process's memory with `two-stage` or `clipseg`, from image tensor to logits, eager and in fp32."""
    result = Result(memory_title(preset))
    size = preset.sizes[0]
    if baseline == "two-stage":
        model = make_two_stage(preset, EAGER, "fp32", options, size)
        pixels = models.random_pixels(size, 1, options.device)
        result.megabytes["two stages, eager, fp32, to logits"] = memory_of(lambda: model(pixels), options.device)
        return [result]
    clipseg = CLIPSeg(preset, options.device)
    class_embeds = clipseg.random_class_embeds(preset.clipseg_batch)
    candidate = f"CLIPSeg as documented, eager, fp32, {len(class_embeds)} classes per call, to logits"
    result.megabytes[candidate] = memory_of(lambda: clipseg.as_documented(class_embeds), options.device)
    return [result]
