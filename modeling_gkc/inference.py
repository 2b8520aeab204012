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
"""Optimized model for inference: folded BatchNorm, in-place activations and a compiled image path."""

import copy
import inspect
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from transformers.models.resnet.modeling_resnet import (
    ResNetBasicLayer,
    ResNetBottleNeckLayer,
    ResNetConvLayer,
)
from transformers.utils import logging
from transformers.utils.generic import can_return_tuple

from .argument_checks import check_flags, check_size, check_whole_number, shown
from .class_embeddings import TextEmbeddingCache
from .label_text import error_line
from .modeling_clip_resnet import CLIPResNetConvLayer
from .modeling_outputs import GKCForOpenVocabSegmentationOutput, GKCModelOutput
from .open_vocabulary import OpenVocabularyMixin
from .padding import (
    check_pixel_values,
    content_sizes_of,
    full_content_sizes,
    pad_to_stride,
    round_up,
    run_by_padded_size,
)
from .pretrained_model import GKCPreTrainedModel

VOCABULARY_ARGUMENTS = {*inspect.signature(OpenVocabularyMixin.resolve_vocabulary).parameters} - {"self"}
RESNET_PARTS = (CLIPResNetConvLayer, ResNetBasicLayer, ResNetBottleNeckLayer, ResNetConvLayer)

logger = logging.get_logger(__name__)


def fold_batch_norms(model: nn.Module) -> int:
    """Fold every BatchNorm that follows a convolution into the weights of the convolution.

    The pairs are found by their names: children `convolution` and `normalization` of one module, as in transformers'
    ResNet and in `CLIPResNetConvLayer`.

    Args:
        model: Model to change in place.

    Returns:
        The number of folded BatchNorm modules.
    """
    folded = 0
    for module in model.modules():
        convolution, normalization = getattr(module, "convolution", None), getattr(module, "normalization", None)
        if type(convolution) is nn.Conv2d and type(normalization) is nn.BatchNorm2d:
            module.convolution = fuse_conv_bn_eval(convolution.eval(), normalization.eval())
            module.normalization = nn.Identity()
            folded += 1
    return folded


def enable_inplace_relu(model: nn.Module) -> None:
    """Make the ReLU modules of ResNets operate in place, which is safe because nothing else reads their inputs."""
    for module in model.modules():
        if isinstance(module, RESNET_PARTS) and type(module.activation) is nn.ReLU:
            module.activation.inplace = True


def compile_image_path(image_path: nn.Module) -> None:
    """Enable torch.compile for the forward pass, with one graph for each padded size and batch size.

    Compilation happens at the first call of each shape, with CUDA graphs on CUDA. On CPUs the weights are not frozen
    into the graph, because freezing doubled the compilation time and did not make inference faster.
    """
    if next(image_path.parameters()).device.type == "cuda":
        image_path.compile(dynamic=False, mode="reduce-overhead")
    else:
        image_path.compile(dynamic=False)


def run_or_uncompile(image_path: nn.Module, *inputs, **settings) -> object:
    """Call the image path; if torch.compile fails, log a warning and continue without compilation."""
    try:
        return image_path(*inputs, **settings)
    except torch._dynamo.exc.BackendCompilerFailed as error:
        reason = error_line(error.inner_exception)
        logger.warning(
            f"The model runs uncompiled, because torch.compile failed ({reason}): install a C++ compiler, or give "
            "`compile=False`."
        )
        image_path._compiled_call_impl = None
        return image_path(*inputs, **settings)


def check_optimization(
    dtype: torch.dtype | None, compile: bool, sizes: Sequence[tuple[int, int]], batch_size: int
) -> list[tuple[int, int]]:
    """Check the arguments of `optimize_for_inference` and return the sizes.

    Raises:
        ValueError: If `dtype` is not a floating-point type, `compile` is not True or False, `sizes` is not a list of
            (height, width), or `batch_size` is below 1.
    """
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise ValueError(f"`dtype` must be a floating-point type such as torch.bfloat16, got {shown(dtype)}.")
    check_flags(compile=compile)
    if isinstance(sizes, str | bytes) or not isinstance(sizes, Iterable):
        raise ValueError(f"`sizes` must be a list of (height, width), such as [(512, 512)], got {shown(sizes)}.")
    check_whole_number("batch_size", batch_size, 1)
    return [check_size(f"sizes[{index}]", size) for index, size in enumerate(sizes)]


def warm_up(
    run: Callable[[Tensor], object], sizes: Sequence[tuple[int, int]], batch_size: int, device: torch.device
) -> None:
    """Run blank images of each size (height, width), so that compilation does not delay the first real images."""
    for height, width in sizes:
        blank = torch.zeros(batch_size, 3, round_up(height), round_up(width), device=device)
        # The first call compiles; CUDA graphs are recorded at the second call.
        for _ in range(2 if device.type == "cuda" else 1):
            run(blank)


class OptimizedGKC(OpenVocabularyMixin, GKCPreTrainedModel):
    """Faster model for inference only, created by `GKCForOpenVocabSegmentation.optimize_for_inference`.

    It can replace the original model in processors, predictors and pipelines. Its forward pass takes no labels and
    returns no intermediate stages, and it cannot be saved; use the original model for both.

    Args:
        model: A `GKCForOpenVocabSegmentation`, which is copied and not changed.
        dtype: As in `optimize_for_inference`.
        compile: As in `optimize_for_inference`.
        sizes: As in `optimize_for_inference`.
        batch_size: As in `optimize_for_inference`.

    Raises:
        ValueError: As in `check_optimization`.
    """

    def __init__(
        self,
        model: Any,
        dtype: torch.dtype | None = None,
        compile: bool = True,
        sizes: Sequence[tuple[int, int]] = (),
        batch_size: int = 1,
    ):
        sizes = check_optimization(dtype, compile, sizes, batch_size)
        super().__init__(model.config)
        for name in ("model", "classifier", "text_model"):
            setattr(self, name, copy.deepcopy(getattr(model, name)))
        for name in ("vocabulary_embeds", "vocabulary_class_ids"):
            self.register_buffer(name, copy.deepcopy(getattr(model, name)))
        self.text_cache = TextEmbeddingCache()
        self.eval().requires_grad_(False)
        fold_batch_norms(self.model.backbone)
        enable_inplace_relu(self.model.backbone)
        self.classifier.keep_last_stage()
        if dtype is not None:
            self.to(dtype)
        if compile:
            compile_image_path(self.model)
        warm_up(self._segment, sizes, batch_size, self.device)

    def train(self, mode: bool = True) -> "OptimizedGKC":
        """Set evaluation mode, or raise a ValueError if `mode` is true: an optimized model cannot be trained."""
        if mode:
            raise ValueError("An optimized model cannot be trained: train the original model.")
        return super().train(mode)

    def requires_grad_(self, requires_grad: bool = True) -> "OptimizedGKC":
        """Exclude all weights from training, or raise a ValueError if `requires_grad` is true."""
        if requires_grad:
            raise ValueError("An optimized model cannot be trained: train the original model.")
        return super().requires_grad_(False)

    def gradient_checkpointing_enable(self, *args, **kwargs) -> None:
        """Raise a ValueError: an optimized model cannot be trained."""
        raise ValueError("An optimized model cannot be trained: train the original model.")

    def optimize_for_inference(self, *args, **kwargs) -> "OptimizedGKC":
        """Raise a ValueError: the model is optimized already."""
        raise ValueError("The model is optimized already: optimize the original model to change the settings.")

    def save_pretrained(self, *args, **kwargs) -> None:
        """Raise a ValueError: an optimized model is not a checkpoint."""
        raise ValueError("An optimized model cannot be saved: save the original model.")

    @can_return_tuple
    def forward(
        self,
        pixel_values: Tensor,
        pixel_mask: Tensor | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        original_sizes: Tensor | None = None,
        **vocabulary,
    ) -> GKCForOpenVocabSegmentationOutput:
        """Segment images into the classes of a vocabulary.

        Args:
            pixel_values: As in `GKCForOpenVocabSegmentation.forward`.
            pixel_mask: As in `GKCForOpenVocabSegmentation.forward`.
            output_hidden_states: As in `GKCForOpenVocabSegmentation.forward`.
            output_attentions: As in `GKCForOpenVocabSegmentation.forward`.
            original_sizes: As in `GKCForOpenVocabSegmentation.forward`.
            vocabulary: The arguments of `resolve_vocabulary`, such as `input_ids` or `class_embeds`.

        Returns:
            The output without losses and stages.

        Raises:
            TypeError: If another argument is given.
            ValueError: As in `GKCForOpenVocabSegmentation.forward`.
        """
        unsupported = sorted(set(vocabulary) - VOCABULARY_ARGUMENTS)
        if unsupported:
            raise TypeError(
                f"An optimized model takes no `{unsupported[0]}`: call the original model for losses and stages. The "
                f"arguments of the vocabulary are {', '.join(sorted(VOCABULARY_ARGUMENTS))}."
            )
        prompts = self.resolve_vocabulary(**vocabulary)
        requested = self.requested_outputs(output_hidden_states, output_attentions)
        check_pixel_values(pixel_values, self.model.num_channels)
        image_size = pixel_values.shape[-2:]
        pixel_values, pixel_mask, _ = pad_to_stride(pixel_values, pixel_mask)
        segment = partial(self._segment, **requested)
        if pixel_mask is not None:
            content_sizes = content_sizes_of(pixel_mask)
            segments = run_by_padded_size(segment, pixel_values, content_sizes)
        else:
            content_sizes, segments = full_content_sizes(pixel_values, image_size), segment(pixel_values)
        logits, query_embeds = self.classifier(segments, prompts)
        return GKCForOpenVocabSegmentationOutput(
            class_queries_logits=logits,
            masks_queries_logits=segments.masks_queries_logits,
            query_embeds=query_embeds,
            content_sizes=content_sizes,
            **segments.states(),
        )

    def _segment(
        self, pixel_values: Tensor, output_hidden_states: bool = False, output_attentions: bool = False
    ) -> GKCModelOutput:
        """Run the image path in one grad mode and memory format, since each needs a compiled graph of its own."""
        with torch.inference_mode(False), torch.no_grad():
            pixel_values = pixel_values.to(self.dtype, copy=True, memory_format=torch.channels_last)
            return run_or_uncompile(
                self.model,
                pixel_values,
                output_stages=False,
                output_hidden_states=output_hidden_states,
                output_attentions=output_attentions,
                return_dict=True,
            )


__all__ = ["OptimizedGKC", "compile_image_path", "enable_inplace_relu", "fold_batch_norms"]
