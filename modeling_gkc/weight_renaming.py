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
"""Rename, split, check and load weights of other projects and of earlier versions."""

import re
from collections.abc import Callable, Mapping

from torch import Tensor, nn

Renaming = tuple[str, str | Callable[[re.Match], str]]
# Names of weights before version 0.1.0, as regular expressions, and their names since.
CHECKPOINT_RENAMINGS: tuple[tuple[str, str], ...] = (
    (r"^class_embedder\.", "classifier."),
    (r"^no_object_embedding$", "classifier.no_object_embedding"),
    (r"^logit_scale$", "classifier.logit_scale"),
)


def rename_weight(name: str, renamings: tuple[Renaming, ...]) -> str | None:
    """Rename a weight by the first matching rule; return None if no rule matches.

    Args:
        name: Name of a weight.
        renamings: Pairs of a regular expression and its replacement, as for `re.sub`.
    """
    for pattern, replacement in renamings:
        renamed, count = re.subn(pattern, replacement, name)
        if count:
            return renamed
    return None


def rename_old_checkpoint(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Give the weights of a segmenter the names that they have in this version."""
    return {rename_weight(name, CHECKPOINT_RENAMINGS) or name: weight for name, weight in weights.items()}


def split_packed_projection(name: str, weight: Tensor) -> dict[str, Tensor]:
    """Split an attention's packed `in_proj_weight` or `in_proj_bias` into those of q, k and v.

    Args:
        name: Name of the weight.
        weight: (3 * C, ...) packed weight, or any other weight, which is returned unchanged.

    Returns:
        The weights by name.

    Raises:
        ValueError: If the first dimension of a packed weight is not divisible by three.
    """
    packed = re.match(r"(.*\.)in_proj_(weight|bias)$", name)
    if packed is None:
        return {name: weight}
    if not weight.ndim or not len(weight) or len(weight) % 3:
        raise ValueError(f"The weight {name!r} of shape {tuple(weight.shape)} cannot be split into three projections.")
    pieces = zip("qkv", weight.chunk(3), strict=True)
    return {f"{packed[1]}{part}_proj.{packed[2]}": piece for part, piece in pieces}


def check_weight_shapes(
    weights: Mapping[str, Tensor], num_dimensions: Mapping[str, int], refusal: str, advice: str
) -> None:
    """Check the weights from whose shapes the sizes of a model are inferred.

    Args:
        weights: Weights of a file by name.
        num_dimensions: Expected number of dimensions of each required weight.
        refusal: Start of the error message, which describes the problem.
        advice: End of the error message, which says what to do.

    Raises:
        ValueError: If a weight is missing, has another number of dimensions, or is empty; the message names it.
    """
    missing = [f"`{name}`" for name in num_dimensions if name not in weights]
    if missing:
        raise ValueError(f"{refusal}: {', '.join(missing)} {'is' if len(missing) == 1 else 'are'} missing. {advice}")
    for name, expected in num_dimensions.items():
        shape = tuple(weights[name].shape)
        if len(shape) != expected or 0 in shape:
            raise ValueError(f"{refusal}: `{name}` has shape {shape}, not {expected} dimensions. {advice}")


def load_strictly(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Load the complete weights of a model.

    Args:
        model: Model to load the weights into.
        weights: Weights by the model's names; only `num_batches_tracked` of BatchNorm may be missing.

    Raises:
        ValueError: If weights are missing, unexpected or of wrong shapes. The message names them all, and the model is
            unchanged.
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


__all__ = [
    "CHECKPOINT_RENAMINGS",
    "Renaming",
    "check_weight_shapes",
    "load_strictly",
    "rename_old_checkpoint",
    "rename_weight",
    "split_packed_projection",
]
