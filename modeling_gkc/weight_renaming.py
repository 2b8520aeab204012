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
"""Weights under other names: what the converters share."""

import re
from collections.abc import Callable, Mapping

from torch import Tensor, nn

Renaming = tuple[str, str | Callable[[re.Match], str]]


def rename_weight(name: str, renamings: tuple[Renaming, ...]) -> str | None:
    """The new name by the first rule that applies, None if none does."""
    for pattern, replacement in renamings:
        renamed, count = re.subn(pattern, replacement, name)
        if count:
            return renamed
    return None


def split_packed_projection(name: str, weight: Tensor) -> dict[str, Tensor]:
    """An attention's packed `in_proj_weight` or `in_proj_bias` as those of q, k and v; every other weight as it is.

    Raises:
        ValueError: a packed weight does not divide into three.
    """
    packed = re.match(r"(.*\.)in_proj_(weight|bias)$", name)
    if packed is None:
        return {name: weight}
    if not weight.ndim or not len(weight) or len(weight) % 3:
        raise ValueError(f"Weight {name!r} has shape {tuple(weight.shape)}, which is not three projections in one.")
    pieces = zip("qkv", weight.chunk(3), strict=True)
    return {f"{packed[1]}{part}_proj.{packed[2]}": piece for part, piece in pieces}


def check_weight_shapes(
    weights: Mapping[str, Tensor], num_dimensions: Mapping[str, int], refusal: str, advice: str
) -> None:
    """Checks the weights off which sizes are read.

    Args:
        weights: Those of a file.
        num_dimensions: Number of dimensions of each weight that must be there.
        refusal: What the weights are not, if one is wrong; begins the message.
        advice: What to do then; ends it.

    Raises:
        ValueError: naming those that are missing, have other numbers of dimensions, or are empty.
    """
    missing = [f"`{name}`" for name in num_dimensions if name not in weights]
    if missing:
        raise ValueError(f"{refusal}: {', '.join(missing)} {'is' if len(missing) == 1 else 'are'} missing. {advice}")
    for name, expected in num_dimensions.items():
        shape = tuple(weights[name].shape)
        if len(shape) != expected or 0 in shape:
            raise ValueError(f"{refusal}: `{name}` has shape {shape}, not {expected} dimensions. {advice}")


def load_strictly(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Loads weights that must be all of the model's.

    Args:
        model: Takes the weights.
        weights: By the model's names; counters of BatchNorm may be absent.

    Raises:
        ValueError: naming every missing and unexpected weight, and those of other shapes; nothing was loaded.
    """
    shapes = {name: tuple(weight.shape) for name, weight in model.state_dict().items()}
    problems = {
        "missing": [name for name in shapes if name not in weights and not name.endswith("num_batches_tracked")],
        "unexpected": [name for name in weights if name not in shapes],
        "wrong shapes": [
            f"{name} {tuple(weight.shape)}, not {shapes[name]}"
            for name, weight in weights.items()
            if name in shapes and tuple(weight.shape) != shapes[name]
        ],
    }
    found = [f"{kind} {problem}" for kind, problem in problems.items() if problem]
    if found:
        raise ValueError(f"Weights do not fit {type(model).__name__}: {', '.join(found)}.")
    model.load_state_dict(weights, strict=False)


__all__ = ["Renaming", "check_weight_shapes", "load_strictly", "rename_weight", "split_packed_projection"]
