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
"""Checks of arguments: each returns the value in its plain form, or raises a ValueError that names the argument."""

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
    """Tell if a value is a tensor without importing torch, which takes seconds and not all callers need."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(value, torch.Tensor)


def _is_array(value: Any) -> bool:
    return isinstance(value, np.ndarray) or _is_tensor(value)


def whole_number(value: Any) -> int | None:
    """Convert a whole number of Python, numpy or torch to int; None for anything else, booleans and text too."""
    try:
        value = value.item() if hasattr(value, "item") else value
        return int(value) if not isinstance(value, bool | str | bytes) and int(value) == value else None
    except (TypeError, ValueError, RuntimeError, OverflowError):  # NaN, a tensor of many numbers, infinity
        return None


def check_number(name: str, value: Any, low: float, high: float = math.inf, meaning: str = "") -> float:
    """
    Check a real number.

    Args:
        name: Name of the argument.
        value: Number of Python, numpy or torch.
        low: Smallest allowed value.
        high: Largest allowed value; infinity itself is never allowed.
        meaning: Added to the message to explain the range.

    Raises:
        ValueError: `value` is no number, not finite, or outside of the range.
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


def check_fractions(**shares: Any) -> list[float | None]:
    """
    Check thresholds that are probabilities or shares, given by their names; None is allowed for `void_threshold`.

    Returns:
        The thresholds in the given order.

    Raises:
        ValueError: one of them is no number between 0 and 1.
    """
    return [
        None if value is None and name == "void_threshold" else check_number(name, value, 0, 1)
        for name, value in shares.items()
    ]


def check_flags(**flags: Any) -> None:
    """
    Check arguments that are True or False, given by their names.

    Raises:
        ValueError: one of them is neither; text such as "no" would count as True.
    """
    for name, value in flags.items():
        if not isinstance(value, bool | np.bool_):
            raise ValueError(f"`{name}` must be True or False, got {shown(value)}.")


def check_tensor(name: str, value: Any, shape: str, kind: str = "floating-point numbers") -> None:
    """
    Check type, layout and number of axes of a tensor; its values are not read.

    Args:
        name: Name of the argument.
        value: Value to check.
        shape: Axes for messages, such as "(B, 3, H, W)", which are counted.
        kind: "floating-point numbers", "integers" (booleans are none), or "numbers", which may also be booleans.

    Raises:
        ValueError: `value` is no dense tensor of this kind, or has another number of axes.
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
    """
    Check type and shape of the class logits (Q, K + 1) and mask logits (Q, h, w) of an image; with `batch` of images.

    Raises:
        ValueError: one of them is no dense tensor of floating-point numbers of at least 16 bits, or has another shape,
            or they do not fit each other.
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
    """
    Check a (height, width) in pixels.

    Raises:
        ValueError: it is no pair of whole numbers, a side is below 1, or it has more than 2^31 - 1 pixels.
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
    """Convert a collection of two whole numbers to a tuple; None for anything else, sets and text too."""
    is_ordered = _is_array(value) or (isinstance(value, Sequence) and not isinstance(value, str | bytes))
    if not is_ordered or (_is_array(value) and value.ndim != 1) or len(value) != 2:
        return None
    sides = [whole_number(side) for side in value]
    return None if None in sides else (sides[0], sides[1])


def check_label_ids(name: str, label_ids: Collection[int], num_classes: int) -> set[int]:
    """
    Check a collection of classes.

    Raises:
        ValueError: it is no collection, or holds what is no number of a class, 0..num_classes - 1.
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
    """
    Check a whole number.

    Raises:
        ValueError: it is none, or outside of low..high; an end that is None does not limit.
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
