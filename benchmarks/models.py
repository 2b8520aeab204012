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
"""Models with random weights for the inference benchmarks, and the presets that define all sizes."""

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    Mask2FormerConfig,
    Mask2FormerForUniversalSegmentation,
    ResNetConfig,
)

from modeling_gkc.configuration_gkc import CLIPResNetConfig, GKCConfig
from modeling_gkc.conversion import from_mask2former
from modeling_gkc.modeling_gkc import GKCForOpenVocabSegmentation

from .harness import DTYPES

STAGES = ["stage1", "stage2", "stage3", "stage4"]
EAGER, OPTIMIZED, COMPILED, GRAPHS = "eager", "optimized", "compiled", "CUDA graphs"


@dataclass(frozen=True)
class Preset:
    """Sizes of a benchmark run.

    The dicts are fields of model configurations; an empty dict stands for the published model's sizes.

    Attributes:
        sizes: Side lengths of the square input images in pixels.
        compiled_sizes: Those of `sizes` that are also measured under torch.compile, which takes minutes each.
        operator_sizes: Side lengths of the images whose feature maps the operator is measured on.
        classes: Numbers of classes; the middle one is used where one number is enough.
        rounds: Number of rounds of every comparison, as long as the time limit allows.
        limit: Seconds after which a comparison starts no further round.
        clipseg_classes: Numbers of classes that CLIPSeg is compared at.
        clipseg_batch: Number of classes given to CLIPSeg in one call, which is the call that is timed.
        baseline_rounds: Number of rounds for baselines that take many seconds per call.
        batch_size: Number of images of the batch whose throughput is measured on an accelerator.
        crop_size: Side length of the crops that a two-stage segmenter passes to CLIP.
        image_file_size: Size (width, height) of the image file.
        baseline_modes: Pairs of (mode, data type) at which the two-stage segmenter is compared.
        compiled_memory: Whether memory is also measured under torch.compile, where each process compiles by itself.
        resnet: Fields of `ResNetConfig`.
        clip_resnet: Fields of `CLIPResNetConfig`.
        mask2former: Fields of `Mask2FormerConfig`.
        text: Fields of `CLIPTextConfig`.
        clipseg: Fields of `CLIPSegConfig`.
    """

    sizes: tuple[int, ...]
    compiled_sizes: tuple[int, ...]
    operator_sizes: tuple[int, ...]
    classes: tuple[int, int, int]
    rounds: int
    limit: float
    clipseg_classes: tuple[int, ...] = (20, 150)
    clipseg_batch: int = 5
    baseline_rounds: int = 2
    batch_size: int = 32
    crop_size: int = 224
    image_file_size: tuple[int, int] = (640, 480)
    baseline_modes: tuple[tuple[str, str], ...] = ((OPTIMIZED, "fp32"),)
    compiled_memory: bool = False
    resnet: dict[str, Any] = field(default_factory=dict)
    clip_resnet: dict[str, Any] = field(default_factory=dict)
    mask2former: dict[str, Any] = field(default_factory=dict)
    text: dict[str, Any] = field(default_factory=dict)
    clipseg: dict[str, Any] = field(default_factory=dict)

    @property
    def num_classes(self) -> int:
        """Number of classes for measurements that use only one."""
        return self.classes[1]


PRESETS = {
    "complete": Preset(
        sizes=(512, 640),
        compiled_sizes=(512, 640),
        operator_sizes=(512, 1024),
        classes=(20, 150, 847),
        rounds=7,
        limit=120,
        baseline_rounds=3,
        baseline_modes=((OPTIMIZED, "fp32"), (COMPILED, "bf16")),
        compiled_memory=True,
    ),
    "full": Preset(
        sizes=(512, 640),
        compiled_sizes=(512,),
        operator_sizes=(512, 1024),
        classes=(20, 150, 847),
        rounds=5,
        limit=110,
    ),
    "quick": Preset(
        sizes=(512,),
        compiled_sizes=(),
        operator_sizes=(512,),
        classes=(20, 150, 847),
        rounds=2,
        limit=10,
        baseline_rounds=1,
    ),
    "toy": Preset(
        sizes=(64,),
        compiled_sizes=(64,),
        operator_sizes=(64,),
        classes=(3, 5, 7),
        rounds=2,
        limit=20,
        clipseg_classes=(2, 4),
        clipseg_batch=2,
        batch_size=2,
        crop_size=32,
        image_file_size=(80, 60),
        resnet={"embedding_size": 8, "hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1]},
        clip_resnet={
            "width": 8,
            "depths": [1, 1, 1, 1],
            "num_attention_heads": 4,
            "image_size": 32,
            "projection_dim": 16,
        },
        mask2former={
            "feature_size": 32,
            "mask_feature_size": 32,
            "hidden_dim": 32,
            "encoder_feedforward_dim": 32,
            "dim_feedforward": 32,
            "encoder_layers": 1,
            "decoder_layers": 4,
            "num_attention_heads": 4,
            "num_queries": 10,
        },
        text={
            "vocab_size": 64,
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "projection_dim": 16,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
        clipseg={
            "vision_config": {
                "hidden_size": 16,
                "intermediate_size": 32,
                "num_hidden_layers": 3,
                "num_attention_heads": 2,
                "image_size": 32,
                "patch_size": 8,
            },
            "text_config": {
                "vocab_size": 64,
                "hidden_size": 16,
                "intermediate_size": 32,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
            },
            "extract_layers": [0, 1, 2],
            "reduce_dim": 16,
            "decoder_num_attention_heads": 2,
        },
    ),
}


def is_compiled(mode: str) -> bool:
    """Return whether a mode uses torch.compile."""
    return mode in (COMPILED, GRAPHS)


def mode_name(mode: str, dtype: str) -> str:
    """Return the label of a mode and data type, for example `compiled, bf16`."""
    return f"{mode}, {dtype}"


def text_config(preset: Preset, whole: bool = False) -> CLIPTextConfig:
    """Return the configuration of RN50's text encoder.

    Args:
        preset: Sizes to use.
        whole: Whether to keep the vocabulary and all layers, which a model with cached class embeddings does not use.
    """
    if preset.text:
        return CLIPTextConfig(**preset.text)
    config = GKCConfig().text_config
    if not whole:
        config.vocab_size, config.num_hidden_layers = 8, 1
        config.bos_token_id = config.eos_token_id = config.pad_token_id = 0
    return config


@torch.no_grad()
def make_mask2former(preset: Preset, num_labels: int) -> Mask2FormerForUniversalSegmentation:
    """Return transformers' Mask2Former with ResNet-50 and random weights."""
    torch.manual_seed(0)
    backbone = ResNetConfig(**preset.resnet, out_features=STAGES)
    config = Mask2FormerConfig(backbone_config=backbone, num_labels=num_labels, **preset.mask2former)
    return _perturb(Mask2FormerForUniversalSegmentation(config).eval(), "pixel_level_module.encoder.")


def _perturb(model: nn.Module, backbone: str) -> nn.Module:
    """Add noise to all weights outside of the backbone, so that masks contain positive and negative pixels."""
    for name, parameter in model.model.named_parameters():
        if not name.startswith(backbone):
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def make_converted(source: Mask2FormerForUniversalSegmentation, preset: Preset) -> GKCForOpenVocabSegmentation:
    """Return GKC with the weights of a Mask2Former; its projection into the text embedding space is random."""
    return from_mask2former(source, CLIPTextModelWithProjection(text_config(preset))).eval()


def _gkc_sizes(preset: Preset) -> dict[str, Any]:
    """Translate the preset's Mask2Former sizes into fields of `GKCConfig`."""
    names = {
        "hidden_dim": "hidden_size",
        "encoder_feedforward_dim": "encoder_ffn_dim",
        "dim_feedforward": "decoder_ffn_dim",
    }
    sizes = {names.get(name, name): value for name, value in preset.mask2former.items() if name != "feature_size"}
    if "decoder_layers" in sizes:
        sizes["decoder_layers"] -= 1  # transformers counts the prediction before the first layer
    return sizes


@torch.no_grad()
def make_gkc(preset: Preset, backbone: str = "clip_resnet") -> GKCForOpenVocabSegmentation:
    """Return GKC with random weights and the whole text encoder.

    Args:
        preset: Sizes to use.
        backbone: `clip_resnet`, CLIP's RN50 as in the paper's R-50 row, or `resnet`.
    """
    torch.manual_seed(0)
    if backbone == "resnet":
        config = ResNetConfig(**preset.resnet, out_features=STAGES)
    else:
        config = CLIPResNetConfig(**preset.clip_resnet)
    text = text_config(preset, whole=True)
    config = GKCConfig(backbone_config=config, text_config=text, **_gkc_sizes(preset))
    return _perturb(GKCForOpenVocabSegmentation(config).eval(), "backbone.")


def random_class_embeds(count: int, width: int, device: str = "cpu") -> Tensor:
    """Return random unit vectors (count, width) in place of encoded class names."""
    return F.normalize(torch.randn(count, width, generator=torch.Generator().manual_seed(count)), dim=-1).to(device)


def random_pixels(size: int, batch_size: int = 1, device: str = "cpu", dtype: torch.dtype = torch.float32) -> Tensor:
    """Return random images (B, 3, size, size) of smooth blobs.

    On pure noise, all masks of a model with random weights would be noise too.
    """
    generator = torch.Generator().manual_seed(size)
    coarse = torch.randn(batch_size, 3, 8, 8, generator=generator)
    pixels = F.interpolate(coarse, size=(size, size), mode="bicubic")
    return (pixels + 0.2 * torch.randn(pixels.shape, generator=generator)).to(device, dtype)


def write_image(folder: Path, preset: Preset) -> Path:
    """Write a JPEG of smooth colored blobs into the folder and return its path."""
    path = folder / "image.jpg"
    coarse = np.random.default_rng(0).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    Image.fromarray(coarse).resize(preset.image_file_size, Image.Resampling.BICUBIC).save(path, quality=90)
    return path


def read_image(path: Path) -> Image.Image:
    """Open an image file in RGB, the form that transformers' image processors expect."""
    with Image.open(path) as image:
        return image.convert("RGB")


def prepare_mask2former(
    source: Mask2FormerForUniversalSegmentation, mode: str, dtype: str, device: str
) -> Mask2FormerForUniversalSegmentation:
    """Return a copy of transformers' model, compiled if the mode says so.

    Its class head stays outside of the compiled part, so that one compilation serves every number of classes: it is
    one product of 100 x 256 with 256 x (K + 1) for each of ten stages.
    """
    model = copy.deepcopy(source).to(device, DTYPES[dtype])
    return _compile(model, mode)


def prepare_gkc(
    model: GKCForOpenVocabSegmentation, mode: str, dtype: str, device: str, size: int, batch_size: int = 1
) -> GKCForOpenVocabSegmentation:
    """Return a copy of GKC in the given mode.

    In mode `eager` the model stays as it was loaded; all other modes use `optimize_for_inference`, of which
    `optimized` does not compile.

    Raises:
        RuntimeError: The model could not be compiled.
    """
    model = copy.deepcopy(model).to(device)
    if mode == EAGER:
        return model.to(DTYPES[dtype])
    if mode == OPTIMIZED:
        return model.optimize_for_inference(dtype=DTYPES[dtype], compile=False)
    if device == "cuda" and mode == COMPILED:  # `compile=True` would record CUDA graphs there
        return _compile(model.optimize_for_inference(dtype=DTYPES[dtype], compile=False), mode)
    sizes = [(size, size)]
    model = model.optimize_for_inference(DTYPES[dtype], compile=True, sizes=sizes, batch_size=batch_size)
    if model.model._compiled_call_impl is None:
        raise RuntimeError("torch.compile failed and GKC would run uncompiled: the mode 'compiled' cannot be measured")
    return model


def _compile(model: nn.Module, mode: str) -> nn.Module:
    """Compile in place the submodule that both models call `model`, the image path without the class head."""
    if is_compiled(mode):
        model.model.compile(**compile_options(mode, next(model.parameters()).device.type))
    return model


def compile_options(mode: str, device: str) -> dict[str, Any]:
    """Return the arguments of torch.compile, which are the same for all candidates."""
    if device == "cpu":
        return {"dynamic": False}
    return {"dynamic": False, "mode": "reduce-overhead" if mode == GRAPHS else None}


def random_head_setter(model: Mask2FormerForUniversalSegmentation, num_classes: int) -> Callable[[], None]:
    """Return a function that puts a random class head of `num_classes` classes into the model."""
    weight = next(model.parameters())
    head = nn.Linear(model.config.hidden_dim, num_classes + 1).to(weight.device, weight.dtype).eval()

    def put() -> None:
        model.class_predictor = head

    return put
