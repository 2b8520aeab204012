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
"""Checks of arguments, which return the converted value or raise a ValueError that names the argument."""

import math
import numbers
import sys
from collections.abc import Collection, Sequence
from typing import Any

import numpy as np

from .label_text import shown

Size = tuple[int, int]

MAX_PIXELS = 2**31 - 1  # areas are counted in int32


def _is_tensor(value: Any) -> bool:
    """Return whether a value is a tensor, without importing torch, which is slow and not always needed."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(value, torch.Tensor)


def _is_array(value: Any) -> bool:
    return isinstance(value, np.ndarray) or _is_tensor(value)


def whole_number(value: Any) -> int | None:
    """Convert a whole number of Python, numpy or torch to int; return None for anything else, also bool and str."""
    try:
        value = value.item() if hasattr(value, "item") else value
        return int(value) if not isinstance(value, bool | str | bytes) and int(value) == value else None
    except (TypeError, ValueError, RuntimeError, OverflowError):  # NaN, a tensor of many numbers, infinity
        return None


def check_number(name: str, value: Any, low: float, high: float = math.inf, meaning: str = "") -> float:
    """Check a real number.

    Args:
        name: Name of the argument.
        value: Number of Python, numpy or torch.
        low: Smallest allowed value.
        high: Largest allowed value; infinity itself is never allowed.
        meaning: Added to the message to explain the range.

    Raises:
        ValueError: If `value` is not a number, not finite, or outside of the range.
    """
    given = value
    try:
        value = value.item() if isinstance(value, np.generic) or _is_array(value) else value
        number = float(value) if isinstance(value, numbers.Real) and not isinstance(value, bool) else math.nan
    except (ValueError, RuntimeError, OverflowError):  # a tensor of many numbers, an integer beyond fp64
        number = math.nan
    if not (math.isfinite(number) and low <= number <= high):
        extent = f"of at least {low:g}" if high == math.inf else f"between {low:g} and {high:g}"
        raise ValueError(f"`{name}` must be a number {extent}{meaning}, got {shown(given)}.")
    return number


def check_fractions(**fractions: Any) -> list[float | None]:
    """Check thresholds in 0..1; None is allowed for `void_threshold`.

    Args:
        fractions: Thresholds by the names of their arguments.

    Returns:
        The thresholds in the given order.

    Raises:
        ValueError: If one of them is not a number between 0 and 1.
    """
    return [
        None if value is None and name == "void_threshold" else check_number(name, value, 0, 1)
        for name, value in fractions.items()
    ]


def check_flags(**flags: Any) -> None:
    """Check that arguments are True or False, since text such as "no" would count as True.

    Args:
        flags: Values by the names of their arguments.

    Raises:
        ValueError: If one of them is neither True nor False.
    """
    for name, value in flags.items():
        if not isinstance(value, bool | np.bool_):
            raise ValueError(f"`{name}` must be True or False, got {shown(value)}.")


def check_tensor(name: str, value: Any, shape: str, kind: str = "floating-point numbers") -> None:
    """Check the type, layout and number of axes of a tensor without reading its values.

    Args:
        name: Name of the argument.
        value: Value to check.
        shape: Expected axes, such as "(B, 3, H, W)", of which only the number is checked.
        kind: "floating-point numbers", "integers" (without booleans), or "numbers" (with booleans).

    Raises:
        ValueError: If `value` is not a dense tensor of this kind, or has another number of axes.
    """
    is_of_kind = _is_tensor(value) and not value.is_complex() and not value.is_quantized
    if is_of_kind and kind != "numbers":
        is_integer = not value.is_floating_point() and str(value.dtype) != "torch.bool"
        is_of_kind = is_integer if kind == "integers" else value.is_floating_point()
    if not is_of_kind:
        got = f"of {value.dtype}" if _is_tensor(value) else f"a {type(value).__name__}"
        raise ValueError(f"`{name}` must be a tensor {shape} of {kind}, got {got}.")
    if value.is_nested or str(value.layout) != "torch.strided":
        got = "a nested tensor" if value.is_nested else f"the layout {value.layout}"
        raise ValueError(f"`{name}` must be a dense tensor {shape}, got {got}: convert it to a dense one first.")
    if value.ndim != shape.count(",") + 1 - shape.count(",)"):
        raise ValueError(f"`{name}` must have the shape {shape}, got {tuple(value.shape)}.")


def check_logits(
    class_logits: Any, mask_logits: Any, names: Sequence[str] = ("class_logits", "mask_logits"), batch: bool = False
) -> None:
    """Check type and shape of the class logits and mask logits of an image, or of a batch of images.

    Args:
        class_logits: (Q, K + 1) class logits, with `batch` (B, Q, K + 1).
        mask_logits: (Q, h, w) mask logits, with `batch` (B, Q, h, w).
        names: Names of the two arguments for error messages.
        batch: Whether the logits are those of a batch.

    Raises:
        ValueError: If one of them is not a dense floating-point tensor of at least 16 bits or has another shape, or if
            their numbers of images or queries differ.
    """
    axes = ("Q, K + 1", "Q, h, w")
    for name, logits, shape in zip(names, (class_logits, mask_logits), axes, strict=True):
        shape = f"(B, {shape})" if batch else f"({shape})"
        check_tensor(name, logits, shape)
        if logits.element_size() < 2:
            raise ValueError(f"`{name}` must have at least 16 bits, got {logits.dtype}: convert it with `.float()`.")
    if class_logits.shape[:-1] != mask_logits.shape[:-2]:
        raise ValueError(
            f"`{names[0]}` and `{names[1]}` must be of the same {'images and ' if batch else ''}queries, got the "
            f"shapes {tuple(class_logits.shape)} and {tuple(mask_logits.shape)}."
        )
    if class_logits.shape[-1] < 2:
        raise ValueError(
            f"`{names[0]}` must have at least two columns, one class and no-object, got the shape "
            f"{tuple(class_logits.shape)}."
        )
    if class_logits.shape[-2] < 1:
        raise ValueError(f"`{names[0]}` must have at least one query, got the shape {tuple(class_logits.shape)}.")
    if class_logits.device != mask_logits.device:
        raise ValueError(
            f"`{names[0]}` and `{names[1]}` must be on one device, got {class_logits.device} and {mask_logits.device}."
        )


def check_size(name: str, size: Any) -> Size:
    """Check a size (height, width) in pixels, and return it as a tuple of ints.

    Raises:
        ValueError: If it is not a pair of whole numbers, a side is below 1, or it has more than 2^31 - 1 pixels.
    """
    checked = pair(size)
    if checked is None:
        raise ValueError(f"`{name}` must be a pair of whole numbers (height, width), got {shown(size)}.")
    if min(checked) < 1:
        raise ValueError(f"`{name}` (height, width) must be at least 1 x 1, got {checked}.")
    if checked[0] * checked[1] > MAX_PIXELS:
        raise ValueError(f"`{name}` (height, width) must have at most {MAX_PIXELS} pixels, got {checked}.")
    return checked


def pair(value: Any) -> Size | None:
    """Convert a sequence of two whole numbers to a tuple; return None for anything else, also sets and text."""
    is_ordered = _is_array(value) or (isinstance(value, Sequence) and not isinstance(value, str | bytes))
    if not is_ordered or (_is_array(value) and value.ndim != 1) or len(value) != 2:
        return None
    sides = [whole_number(side) for side in value]
    return None if None in sides else (sides[0], sides[1])


def check_label_ids(name: str, label_ids: Collection[int], num_classes: int) -> set[int]:
    """Check a collection of class ids, and return it as a set.

    Raises:
        ValueError: If it is not a collection of whole numbers in 0..num_classes - 1.
    """
    given = label_ids.tolist() if _is_array(label_ids) else label_ids
    if not isinstance(given, Collection) or isinstance(given, str | bytes):
        raise ValueError(f"`{name}` must be a list of classes, or another collection, got {shown(label_ids)}.")
    ids = {whole_number(label) for label in given}
    if None in ids:
        raise ValueError(f"`{name}` must hold the numbers of classes, such as [0, 3], got {shown(label_ids)}.")
    if ids and not 0 <= min(ids) <= max(ids) < num_classes:
        raise ValueError(f"`{name}` must be classes in 0..{num_classes - 1}, got {shown(sorted(ids))}.")
    return ids


def check_whole_number(name: str, value: Any, low: int | None = None, high: int | None = None) -> int:
    """Check a whole number, and return it as an int.

    Args:
        name: Name of the argument.
        value: Whole number of Python, numpy or torch.
        low: Smallest allowed value. Default: no limit.
        high: Largest allowed value. Default: no limit.

    Raises:
        ValueError: If `value` is not a whole number or outside of the range.
    """
    number = whole_number(value)
    if number is None or (low is not None and number < low) or (high is not None and number > high):
        extent = "" if low is None else f" of at least {low}" if high is None else f" in {low}..{high}"
        raise ValueError(f"`{name}` must be a whole number{extent}, got {shown(value)}.")
    return number


__all__ = [
    "MAX_PIXELS",
    "Size",
    "check_flags",
    "check_fractions",
    "check_label_ids",
    "check_logits",
    "check_number",
    "check_size",
    "check_tensor",
    "check_whole_number",
    "pair",
    "shown",
    "whole_number",
]
