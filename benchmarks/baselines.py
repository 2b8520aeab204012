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
"""Ours against what open-vocabulary segmentation was done with before: two stages, and CLIPSeg.

* Two stages: the same masks, by our own segmenter, then CLIP's RN50 on the 224 x 224 crop of every one of the 100
  masked regions, grey outside, and the cosines with K words: the way of ZegFormer (Ding et al., CVPR 2022) and OVSeg
  (Liang et al., CVPR 2023). A mask without a pixel shows the whole image, so that there are always 100.
* CLIPSeg (Lueddecke and Ecker, CVPR 2022) of transformers, in the sizes of its release rd64 (ViT-B/16), at 352 x 352:
  `as documented`, where the image is given once for every word, and `image encoded once`, where its user takes it
  apart. Its words are given as embeddings, as ours are.

Weights are random.
"""

from collections.abc import Callable
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
from .harness import DTYPES, Options, Result, take_turns
from .inference import BACKBONE, backbone_call, lacks_compiler, memory_of, memory_title
from .models import EAGER, Preset, is_compiled, mode_name

CLIPSEG_SIDE = 352
TWO_STAGE_GOAL = 10.0


class TwoStage:
    """Masks first, names then: CLIP looks at each masked region.

    Args:
        segmenter: Whose masks are taken.
        vision_model: CLIP's image tower.
        words: (K, D) embeddings.
        crop_size: Side of the crops.
        picture: (H, W, 3) uint8, of the size that the segmenter sees.
    """

    def __init__(
        self,
        segmenter: GKCForOpenVocabSegmentation,
        vision_model: Callable[..., Any],
        words: Tensor,
        crop_size: int,
        picture: np.ndarray,
    ):
        self.segmenter, self.vision_model, self.words = segmenter, vision_model, words
        self.crop_size, self.picture = crop_size, picture

    def __call__(self, pixels: Tensor) -> Tensor:
        """(Q, K) logits of the masks of one image (1, 3, H, W)."""
        masks = self.segmenter.model(pixels, output_stages=False, return_dict=True).masks_queries_logits
        crops = normalize_crops(self.crops(masks), pixels)
        embeds = F.normalize(self.vision_model(crops).image_embeds.float(), dim=-1)
        return 100 * embeds @ self.words.T

    def crops(self, masks: Tensor) -> Tensor:
        """(Q, side, side, 3) uint8, what CLIP is shown of each of the masks (1, Q, H/4, W/4)."""
        grid = self.picture.shape[:2]
        whole = F.interpolate(masks.float(), size=grid, mode="bilinear", align_corners=False)[0] > 0
        whole[~whole.flatten(1).any(dim=1)] = True
        crops = [crop_region(self.picture, mask, self.crop_size) for mask in whole.cpu().numpy()]
        return torch.from_numpy(np.stack(crops))


def make_two_stage(preset: Preset, mode: str, dtype: str, options: Options, size: int) -> TwoStage:
    """Both stages in one mode."""
    segmenter = models.prepare_ours(models.make_ours(preset), mode, dtype, options.device, size)
    torch.manual_seed(1)
    tower = CLIPResNetVisionModel(CLIPResNetConfig(**preset.clip_resnet)).eval().to(options.device, DTYPES[dtype])
    tower = tower.to(memory_format=torch.channels_last)
    if is_compiled(mode):
        tower = torch.compile(tower, **models.compile_options(mode, options.device))
    words = models.random_words(preset.num_classes, segmenter.config.projection_dim, options.device)
    picture = np.random.default_rng(0).integers(0, 256, (size, size, 3), dtype=np.uint8)
    return TwoStage(segmenter, tower, words, preset.crop_size, picture)


def _rival_modes(preset: Preset, options: Options) -> list[tuple[str, str]]:
    kept = [(mode, dtype) for mode, dtype in preset.rival_modes if dtype in options.dtypes]
    return [(mode, dtype) for mode, dtype in kept if options.compile or not is_compiled(mode)]


@torch.no_grad()
def measure_two_stage(preset: Preset, options: Options, size: int) -> list[Result]:
    """Image tensor -> mask and class logits, ours and two-stage with the masks of ours."""
    result = Result(f"Ours against two stages, image tensor to logits, {size} x {size}, CLIP RN50")
    calls: dict[str, Callable[[], Any]] = {}
    for mode, dtype in _rival_modes(preset, options):
        name = mode_name(mode, dtype)
        if lacks_compiler(result, mode, name, options):
            continue
        rival = make_two_stage(preset, mode, dtype, options, size)
        pixels = models.random_pixels(size, 1, options.device, DTYPES[dtype])
        calls[f"two stages, {name}"] = lambda rival=rival, pixels=pixels: rival(pixels)
        calls[f"ours, {name}"] = lambda rival=rival, pixels=pixels: rival.segmenter(pixels, class_embeds=rival.words)
        calls[f"{BACKBONE}, {name}"] = backbone_call(rival.segmenter, mode, pixels)
    taken = take_turns(calls, preset.rival_rounds, limit=preset.limit, device=options.device)
    names = [mode_name(*mode) for mode in _rival_modes(preset, options)]
    result.add(taken)
    for name in names:
        whole, stages = f"ours, {name}", f"two stages, {name}"
        result.add_ratio(taken.ratio(f"two stages / ours, {name}", stages, whole, at_least=TWO_STAGE_GOAL))
        result.add_ratio(taken.ratio(f"ours / its backbone, CLIP RN50, {name}", whole, f"{BACKBONE}, {name}"))
    return [result]


class CLIPSeg:
    """CLIPSeg asked for words whose embeddings are there.

    Args:
        preset: Sizes.
        device: Where it computes.
    """

    def __init__(self, preset: Preset, device: str):
        torch.manual_seed(0)
        config = CLIPSegConfig(**(preset.clipseg or {"vision_config": {"patch_size": 16}}))
        self.model = CLIPSegForImageSegmentation(config).eval().to(device)
        self.side = config.vision_config.image_size if preset.clipseg else CLIPSEG_SIDE
        self.pixels = models.random_pixels(self.side, 1, device)

    def words(self, count: int) -> Tensor:
        """(count, D) embeddings."""
        return models.random_words(count, self.model.config.projection_dim, self.pixels.device.type)

    def as_documented(self, words: Tensor) -> Tensor:
        """(K, side, side) logits; the image is encoded for every word."""
        pixels = self.pixels.expand(len(words), -1, -1, -1)
        return self.model(pixel_values=pixels, conditional_embeddings=words).logits

    def encoded_once(self, words: Tensor, batch: int) -> Tensor:
        """As `as_documented`, with the image encoded once and the decoder run on `batch` words at a time."""
        found = self.model.clip.get_image_features(
            self.pixels, interpolate_pos_encoding=True, output_hidden_states=True, return_dict=True
        )
        states = [found.hidden_states[index + 1] for index in self.model.extract_layers]
        logits = [
            self.model.decoder([state.expand(len(part), -1, -1) for state in states], part).logits
            for part in words.split(batch)
        ]
        return torch.cat([each.reshape(-1, self.side, self.side) for each in logits])


@torch.no_grad()
def measure_clipseg(preset: Preset, options: Options, size: int) -> list[Result]:
    """Image tensor -> logits, eager and fp32 on both sides."""
    result = Result(f"Ours, {size} x {size}, against CLIPSeg, {CLIPSEG_SIDE} x {CLIPSEG_SIDE}, eager, fp32")
    rival, ours = CLIPSeg(preset, options.device), models.make_ours(preset).to(options.device)
    pixels = models.random_pixels(size, 1, options.device)
    batch = rival.words(preset.clipseg_batch)
    part = f"CLIPSeg as documented, one call of {len(batch)} words"
    calls: dict[str, Callable[[], Any]] = {part: lambda: rival.as_documented(batch)}
    for count in preset.clipseg_words:
        words, ours_words = rival.words(count), models.random_words(count, ours.config.projection_dim, options.device)
        calls[f"CLIPSeg, image encoded once, {count} words"] = lambda words=words: rival.encoded_once(words, 10)
        calls[f"ours, {count} words"] = lambda words=ours_words: ours(pixels, class_embeds=words)
    taken = take_turns(calls, preset.rival_rounds, limit=preset.limit, device=options.device)
    ratios = []
    for count in preset.clipseg_words:
        under, once = f"ours, {count} words", f"CLIPSeg, image encoded once, {count} words"
        documented = f"CLIPSeg as documented / ours, {count} words"
        ratios.append(taken.ratio(documented, part, under, scale=count / len(batch)))
        ratios.append(taken.ratio(f"CLIPSeg, image encoded once / ours, {count} words", once, under))
    result.add(taken, *ratios)
    result.notes.append(
        f"CLIPSeg as documented was timed on {len(batch)} words a call; in the ratios that time is multiplied, as its "
        "cost is per word."
    )
    return [result]


@torch.no_grad()
def measure_rival_memory(preset: Preset, options: Options, rival: str) -> list[Result]:
    """Memory of this process with `two-stage` or `clipseg`, image tensor -> logits, eager and fp32."""
    result = Result(memory_title(preset))
    size = preset.sizes[0]
    if rival == "two-stage":
        model = make_two_stage(preset, EAGER, "fp32", options, size)
        pixels = models.random_pixels(size, 1, options.device)
        result.megabytes["two stages, eager, fp32, to logits"] = memory_of(lambda: model(pixels), options.device)
        return [result]
    clipseg = CLIPSeg(preset, options.device)
    words = clipseg.words(preset.clipseg_batch)
    arm = f"CLIPSeg as documented, eager, fp32, {len(words)} words a call, to logits"
    result.megabytes[arm] = memory_of(lambda: clipseg.as_documented(words), options.device)
    return [result]
