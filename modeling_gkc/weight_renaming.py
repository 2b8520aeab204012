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
    """An attention's packed `in_proj_weight` or `in_proj_bias` as those of q, k and v; every other weight as it is."""
    packed = re.match(r"(.*\.)in_proj_(weight|bias)$", name)
    if packed is None:
        return {name: weight}
    pieces = zip("qkv", weight.chunk(3), strict=True)
    return {f"{packed[1]}{part}_proj.{packed[2]}": piece for part, piece in pieces}


def load_strictly(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Loads weights that must be all of the model's.

    Args:
        model: Takes the weights.
        weights: By the model's names; counters of BatchNorm may be absent.

    Raises:
        ValueError: naming every missing and unexpected weight.
    """
    missing, unexpected = model.load_state_dict(weights, strict=False)
    missing = [name for name in missing if not name.endswith("num_batches_tracked")]
    if missing or unexpected:
        raise ValueError(f"Weights do not fit {type(model).__name__}: missing {missing}, unexpected {unexpected}.")


__all__ = ["Renaming", "load_strictly", "rename_weight", "split_packed_projection"]
