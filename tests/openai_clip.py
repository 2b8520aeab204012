"""Synthetic weights of OpenAI's CLIP ResNets, with the names, shapes and file format of the published ones."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass
class Size:
    """Sizes of a CLIP ResNet; the attention heads of its text encoder have the width 64."""

    width: int
    depths: tuple[int, int, int, int]
    image_size: int
    projection_dim: int
    text_width: int
    text_layers: int = 12
    context: int = 77
    vocab_size: int = 49408


PUBLISHED = {
    "RN50": Size(64, (3, 4, 6, 3), 224, 1024, 512),
    "RN101": Size(64, (3, 4, 23, 3), 224, 512, 512),
    "RN50x4": Size(80, (4, 6, 10, 6), 288, 640, 640),
    "RN50x16": Size(96, (6, 8, 18, 8), 384, 768, 768),
    "RN50x64": Size(128, (3, 15, 36, 10), 448, 1024, 1024),
}
TINY = Size(4, (1, 2, 1, 1), 64, 24, 128, text_layers=2, context=12, vocab_size=40)


def shapes(size: Size) -> dict[str, tuple[int, ...]]:
    """Return the shape of every weight of a model by OpenAI's names."""
    return _image_shapes(size) | _text_shapes(size)


def _image_shapes(size: Size) -> dict[str, tuple[int, ...]]:
    found = _convolution("visual.conv1", "visual.bn1", 3, size.width // 2, 3)
    found |= _convolution("visual.conv2", "visual.bn2", size.width // 2, size.width // 2, 3)
    found |= _convolution("visual.conv3", "visual.bn3", size.width // 2, size.width, 3)
    channels = size.width
    for stage, depth in enumerate(size.depths):
        inner = size.width * 2**stage
        for block in range(depth):
            prefix = f"visual.layer{stage + 1}.{block}"
            found |= _convolution(f"{prefix}.conv1", f"{prefix}.bn1", channels, inner, 1)
            found |= _convolution(f"{prefix}.conv2", f"{prefix}.bn2", inner, inner, 3)
            found |= _convolution(f"{prefix}.conv3", f"{prefix}.bn3", inner, 4 * inner, 1)
            if block == 0:
                found |= _convolution(f"{prefix}.downsample.0", f"{prefix}.downsample.1", channels, 4 * inner, 1)
            channels = 4 * inner
    found["visual.attnpool.positional_embedding"] = ((size.image_size // 32) ** 2 + 1, channels)
    for name, rows in (("q", channels), ("k", channels), ("v", channels), ("c", size.projection_dim)):
        found |= _linear(f"visual.attnpool.{name}_proj", channels, rows)
    return found


def _text_shapes(size: Size) -> dict[str, tuple[int, ...]]:
    width = size.text_width
    found = {
        "positional_embedding": (size.context, width),
        "text_projection": (width, size.projection_dim),
        "logit_scale": (),
        "token_embedding.weight": (size.vocab_size, width),
        "ln_final.weight": (width,),
        "ln_final.bias": (width,),
    }
    for layer in range(size.text_layers):
        prefix = f"transformer.resblocks.{layer}"
        found |= {f"{prefix}.attn.in_proj_weight": (3 * width, width), f"{prefix}.attn.in_proj_bias": (3 * width,)}
        found |= _linear(f"{prefix}.attn.out_proj", width, width)
        found |= _linear(f"{prefix}.mlp.c_fc", width, 4 * width) | _linear(f"{prefix}.mlp.c_proj", 4 * width, width)
        for norm in ("ln_1", "ln_2"):
            found |= {f"{prefix}.{norm}.weight": (width,), f"{prefix}.{norm}.bias": (width,)}
    return found


def _convolution(name: str, norm: str, channels: int, out_channels: int, kernel: int) -> dict[str, tuple[int, ...]]:
    parts = ("weight", "bias", "running_mean", "running_var")
    weight = {f"{name}.weight": (out_channels, channels, kernel, kernel)}
    return weight | {f"{norm}.{part}": (out_channels,) for part in parts} | {f"{norm}.num_batches_tracked": ()}


def _linear(name: str, columns: int, rows: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (rows, columns), f"{name}.bias": (rows,)}


def weights(size: Size, make: Callable[..., Tensor] = torch.empty) -> dict[str, Tensor]:
    """Return the weights of a model; `make` creates a tensor of a given shape."""
    return {
        name: torch.zeros(shape, dtype=torch.long) if name.endswith("num_batches_tracked") else make(shape)
        for name, shape in shapes(size).items()
    }


def random_weights(size: Size = TINY) -> dict[str, Tensor]:
    """Return random weights in the data types of the published files: fp16 except for counters and normalization."""
    generator = torch.Generator().manual_seed(0)

    def make(shape: tuple[int, ...]) -> Tensor:
        return 0.3 * torch.randn(shape, generator=generator)

    found = weights(size, make)
    for name, value in found.items():
        if name.endswith("running_var"):
            found[name] = value.abs() + 0.5
        elif value.ndim > 1:
            found[name] = value.half()
    return found


class _Node(nn.Module):
    def add(self, path: list[str], value: Tensor) -> None:
        name, *rest = path
        if rest:
            if name not in self._modules:
                self.add_module(name, _Node())
            self._modules[name].add(rest, value)
        elif value.is_floating_point() and not name.startswith("running_"):
            self.register_parameter(name, nn.Parameter(value, requires_grad=False))
        else:
            self.register_buffer(name, value)


class _Program(_Node):
    def forward(self, image: Tensor) -> Tensor:
        return image


def save_archive(state_dict: Mapping[str, Tensor], path: str) -> None:
    """Write weights in the format of the published files: a TorchScript archive of the model."""
    program = _Program()
    for name, value in state_dict.items():
        program.add(name.split("."), value)
    torch.jit.script(program).save(path)
