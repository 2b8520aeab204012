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
"""Models of random weights that the benchmarks of inference compare, and the sizes of it all."""

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
EAGER, OPTIMIZED, COMPILED, GRAPHS = "eager", "optimised", "compiled", "CUDA graphs"


@dataclass(frozen=True)
class Preset:
    """Sizes of what is measured; the dicts are fields of configurations, empty for those of the published models.

    Attributes:
        sizes: Sides of the square images.
        operator_sizes: Sides of the images whose maps the operator alone works on.
        classes: Numbers of words; the middle one where one is enough.
        compiled_sizes: Those of `sizes` that are measured under torch.compile too, which takes minutes each.
        rounds: Of every comparison, if there is time.
        limit: Seconds after which a comparison begins no further round.
        clipseg_words: Numbers of words that CLIPSeg is asked for.
        clipseg_batch: Words that it is given at a time, and of which one call is timed.
        rival_rounds: Rounds against the rivals that take many seconds.
        batch_size: Images of a batch whose throughput is measured on an accelerator.
        crop_size: Side of the crops that a two-stage segmenter shows to CLIP.
        picture: (width, height) of the image file.
        rival_modes: (mode, type) in which the two-stage segmenter is compared.
        compiled_memory: Whether memory is measured under torch.compile too: each arm compiles in its own process.
    """

    sizes: tuple[int, ...]
    compiled_sizes: tuple[int, ...]
    operator_sizes: tuple[int, ...]
    classes: tuple[int, int, int]
    rounds: int
    limit: float
    clipseg_words: tuple[int, ...] = (20, 150)
    clipseg_batch: int = 5
    rival_rounds: int = 2
    batch_size: int = 32
    crop_size: int = 224
    picture: tuple[int, int] = (640, 480)
    rival_modes: tuple[tuple[str, str], ...] = ((OPTIMIZED, "fp32"),)
    compiled_memory: bool = False
    resnet: dict[str, Any] = field(default_factory=dict)
    clip_resnet: dict[str, Any] = field(default_factory=dict)
    mask2former: dict[str, Any] = field(default_factory=dict)
    text: dict[str, Any] = field(default_factory=dict)
    clipseg: dict[str, Any] = field(default_factory=dict)

    @property
    def num_classes(self) -> int:
        """Where one number of words is enough."""
        return self.classes[1]


PRESETS = {
    "complete": Preset(
        sizes=(512, 640),
        compiled_sizes=(512, 640),
        operator_sizes=(512, 1024),
        classes=(20, 150, 847),
        rounds=7,
        limit=120,
        rival_rounds=3,
        rival_modes=((OPTIMIZED, "fp32"), (COMPILED, "bf16")),
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
        rival_rounds=1,
    ),
    "toy": Preset(
        sizes=(64,),
        compiled_sizes=(64,),
        operator_sizes=(64,),
        classes=(3, 5, 7),
        rounds=2,
        limit=20,
        clipseg_words=(2, 4),
        clipseg_batch=2,
        batch_size=2,
        crop_size=32,
        picture=(80, 60),
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
    """Whether a mode needs a compiler."""
    return mode in (COMPILED, GRAPHS)


def mode_name(mode: str, dtype: str) -> str:
    """As arms are called: `compiled, bf16`."""
    return f"{mode}, {dtype}"


def text_config(preset: Preset, whole: bool = False) -> CLIPTextConfig:
    """RN50's text tower; unless `whole` without its vocabulary and layers, as its embeddings are cached."""
    if preset.text:
        return CLIPTextConfig(**preset.text)
    config = GKCConfig().text_config
    if not whole:
        config.vocab_size, config.num_hidden_layers = 8, 1
        config.bos_token_id = config.eos_token_id = config.pad_token_id = 0
    return config


@torch.no_grad()
def make_source(preset: Preset, num_labels: int) -> Mask2FormerForUniversalSegmentation:
    """Transformers' Mask2Former with ResNet-50, of random weights."""
    torch.manual_seed(0)
    backbone = ResNetConfig(**preset.resnet, out_features=STAGES)
    config = Mask2FormerConfig(backbone_config=backbone, num_labels=num_labels, **preset.mask2former)
    return _spread(Mask2FormerForUniversalSegmentation(config).eval(), "pixel_level_module.encoder.")


def _spread(model: nn.Module, backbone: str) -> nn.Module:
    """Adds to all weights but the backbone's, so that masks have insides and outsides."""
    for name, parameter in model.model.named_parameters():
        if not name.startswith(backbone):
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def make_converted(source: Mask2FormerForUniversalSegmentation, preset: Preset) -> GKCForOpenVocabSegmentation:
    """Ours, with the weights of the source; the projection into the space of words is random."""
    return from_mask2former(source, CLIPTextModelWithProjection(text_config(preset))).eval()


def _our_sizes(preset: Preset) -> dict[str, Any]:
    """The preset's sizes of a Mask2Former in the names of `GKCConfig`."""
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
def make_ours(preset: Preset, backbone: str = "clip_resnet") -> GKCForOpenVocabSegmentation:
    """Ours of random weights, text tower whole, with CLIP's RN50 (the paper's R-50 row) or a `resnet` as backbone."""
    torch.manual_seed(0)
    if backbone == "resnet":
        config = ResNetConfig(**preset.resnet, out_features=STAGES)
    else:
        config = CLIPResNetConfig(**preset.clip_resnet)
    text = text_config(preset, whole=True)
    config = GKCConfig(backbone_config=config, text_config=text, **_our_sizes(preset))
    return _spread(GKCForOpenVocabSegmentation(config).eval(), "backbone.")


def random_words(count: int, width: int, device: str = "cpu") -> Tensor:
    """(count, width) unit vectors, in place of the embeddings of words."""
    return F.normalize(torch.randn(count, width, generator=torch.Generator().manual_seed(count)), dim=-1).to(device)


def random_pixels(size: int, batch_size: int = 1, device: str = "cpu", dtype: torch.dtype = torch.float32) -> Tensor:
    """(B, 3, size, size), of blobs rather than of noise: all of a random model's masks would be noise too."""
    generator = torch.Generator().manual_seed(size)
    coarse = torch.randn(batch_size, 3, 8, 8, generator=generator)
    pixels = F.interpolate(coarse, size=(size, size), mode="bicubic")
    return (pixels + 0.2 * torch.randn(pixels.shape, generator=generator)).to(device, dtype)


def write_picture(folder: Path, preset: Preset) -> Path:
    """A file of a picture of coloured blobs."""
    path = folder / "picture.jpg"
    coarse = np.random.default_rng(0).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    Image.fromarray(coarse).resize(preset.picture, Image.Resampling.BICUBIC).save(path, quality=90)
    return path


def read_picture(path: Path) -> Image.Image:
    """The picture of a file, as transformers' image processors want it."""
    with Image.open(path) as picture:
        return picture.convert("RGB")


def prepare_source(
    source: Mask2FormerForUniversalSegmentation, mode: str, dtype: str, device: str
) -> Mask2FormerForUniversalSegmentation:
    """A copy of transformers' model as its user would speed it up.

    Its class head stays outside of the compiled part, so that one compilation serves every number of classes: it is
    one product of 100 x 256 with 256 x (K + 1) for each of ten stages.
    """
    model = copy.deepcopy(source).to(device, DTYPES[dtype])
    return _compile(model, mode)


def prepare_ours(
    model: GKCForOpenVocabSegmentation, mode: str, dtype: str, device: str, size: int, batch_size: int = 1
) -> GKCForOpenVocabSegmentation:
    """A copy of ours: eager as it was loaded, else by `optimize_for_inference`, `optimised` without compiling.

    Raises:
        RuntimeError: it could not be compiled.
    """
    model = copy.deepcopy(model).to(device)
    if mode == EAGER:
        return model.to(DTYPES[dtype])
    if mode == OPTIMIZED:
        return model.optimize_for_inference(dtype=DTYPES[dtype], compile=False)
    if device == "cuda" and mode == COMPILED:  # `compile=True` would record CUDA graphs there
        return _compile(model.optimize_for_inference(dtype=DTYPES[dtype], compile=False), mode)
    model.optimize_for_inference(dtype=DTYPES[dtype], compile=True, sizes=[(size, size)], batch_size=batch_size)
    if model.model._compiled_call_impl is None:
        raise RuntimeError("torch.compile failed and ours runs uncompiled: a compiled arm would not be one")
    return model


def _compile(model: nn.Module, mode: str) -> nn.Module:
    """Compiles the part that both models call `model`, the image path without the class head; in place."""
    if is_compiled(mode):
        model.model.compile(**compile_options(mode, next(model.parameters()).device.type))
    return model


def compile_options(mode: str, device: str) -> dict[str, Any]:
    """Arguments of torch.compile, the same for all that is compared."""
    if device == "cpu":
        return {"dynamic": False}
    return {"dynamic": False, "mode": "reduce-overhead" if mode == GRAPHS else None}


def with_head(model: Mask2FormerForUniversalSegmentation, num_classes: int) -> Callable[[], None]:
    """Makes a random class head; calling what is returned puts it into the model."""
    weight = next(model.parameters())
    head = nn.Linear(model.config.hidden_dim, num_classes + 1).to(weight.device, weight.dtype).eval()

    def put() -> None:
        model.class_predictor = head

    return put
