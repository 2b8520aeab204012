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
"""What `GKCForOpenVocabSegmentation.optimize_for_inference` is made of: folding, compiling, warming up."""

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from transformers.models.resnet.modeling_resnet import (
    ResNetBasicLayer,
    ResNetBottleNeckLayer,
    ResNetConvLayer,
)
from transformers.utils import logging

from .argument_checks import check_size, check_whole_number, shown
from .label_text import error_line
from .modeling_clip_resnet import CLIPResNetConvLayer
from .padding import round_up

RESNET_PARTS = (CLIPResNetConvLayer, ResNetBasicLayer, ResNetBottleNeckLayer, ResNetConvLayer)

logger = logging.get_logger(__name__)


def fold_batch_norms(model: nn.Module) -> int:
    """Puts every BatchNorm that follows a convolution into its weights, and says how many.

    Such pairs are the children `convolution` and `normalization` of one module, as in transformers' ResNets and here.
    """
    folded = 0
    for module in model.modules():
        convolution, normalization = getattr(module, "convolution", None), getattr(module, "normalization", None)
        if type(convolution) is nn.Conv2d and type(normalization) is nn.BatchNorm2d:
            module.convolution = fuse_conv_bn_eval(convolution.eval(), normalization.eval())
            module.normalization = nn.Identity()
            folded += 1
    return folded


def work_in_place(model: nn.Module) -> None:
    """Lets the ReLUs of ResNets overwrite what they are given, which nothing else reads."""
    for module in model.modules():
        if isinstance(module, RESNET_PARTS) and type(module.activation) is nn.ReLU:
            module.activation.inplace = True


def compile_image_path(image_path: nn.Module) -> None:
    """Lets the forward pass be compiled at its first call: one graph for each padded size and number of images.

    On CUDA the graph is recorded as a CUDA graph. On processors the weights stay inputs of the graph: frozen into it,
    and laid out once as the kernels want them, they made compiling take twice as long and nothing faster.
    """
    if next(image_path.parameters()).device.type == "cuda":
        image_path.compile(dynamic=False, mode="reduce-overhead")
    else:
        image_path.compile(dynamic=False)


def run_or_uncompile(image_path: nn.Module, *inputs, **settings) -> object:
    """Calls the image path. Where it cannot be compiled, this is said once, and it goes on as it is."""
    try:
        return image_path(*inputs, **settings)
    except torch._dynamo.exc.BackendCompilerFailed as error:
        reason = error_line(error.inner_exception)
        logger.warning(
            f"The model runs uncompiled: torch.compile does not work here ({reason}). Install a C++ compiler, or give "
            "`compile=False`."
        )
        image_path._compiled_call_impl = None
        return image_path(*inputs, **settings)


def check_optimization(
    dtype: torch.dtype | None, sizes: Sequence[tuple[int, int]], batch_size: int
) -> list[tuple[int, int]]:
    """Check the arguments of `optimize_for_inference` before anything is changed; return the sizes.

    Raises:
        ValueError: If `dtype` is no floating-point type, `sizes` no list of (height, width), or `batch_size` below 1.
    """
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise ValueError(f"`dtype` must be a floating-point type such as torch.bfloat16, got {shown(dtype)}.")
    if isinstance(sizes, str | bytes) or not isinstance(sizes, Iterable):
        raise ValueError(f"`sizes` must be a list of (height, width), such as [(512, 512)], got {shown(sizes)}.")
    check_whole_number("batch_size", batch_size, 1)
    return [check_size(f"sizes[{index}]", size) for index, size in enumerate(sizes)]


def warm_up(
    run: Callable[[Tensor], object], sizes: Sequence[tuple[int, int]], batch_size: int, device: torch.device
) -> None:
    """Runs blank images (height, width) of each size, padded as images are: what is slow once, such as compiling."""
    for height, width in sizes:
        blank = torch.zeros(batch_size, 3, round_up(height), round_up(width), device=device)
        # A CUDA graph is recorded when a compiled one is called again.
        for _ in range(2 if device.type == "cuda" else 1):
            run(blank)


__all__ = [
    "check_optimization",
    "compile_image_path",
    "fold_batch_norms",
    "run_or_uncompile",
    "warm_up",
    "work_in_place",
]
