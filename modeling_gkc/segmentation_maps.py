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
"""Conversion of segmentation maps to `mask_labels` and `class_labels` for training. Sizes are (height, width)."""

import io
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps

from .argument_checks import check_whole_number

MapLike = Image.Image | np.ndarray | torch.Tensor | str | os.PathLike | bytes

_OUTSIDE = -(2**31)  # value of pixels outside of the image, which is not allowed in maps


def read_segmentation_maps(
    maps: MapLike | Sequence[MapLike], image_sizes: Sequence[tuple[int, int]]
) -> list[np.ndarray]:
    """Read the segmentation map of each image of a batch.

    Args:
        maps: One map or B maps: single-channel PIL images, arrays and tensors of integers, paths, or bytes of files.
        image_sizes: (height, width) of each upright image in pixels.

    Returns:
        For each image a map (H, W) int32.

    Raises:
        ValueError: If the number of maps differs from that of images, or a map cannot be read, has several channels,
            has values that are not integers, or differs in size from its image. The message names the position in the
            batch.
    """
    is_batch = isinstance(maps, np.ndarray | torch.Tensor) and maps.ndim > 2
    is_batch = is_batch and tuple(maps.shape[:2]) != tuple(image_sizes[0])  # one map of several channels
    maps = list(maps) if is_batch or isinstance(maps, list | tuple) else [maps]
    if len(maps) != len(image_sizes):
        raise ValueError(f"There must be a segmentation map for each image: got {len(maps)} for {len(image_sizes)}.")
    read = []
    for index, (segmentation_map, size) in enumerate(zip(maps, image_sizes, strict=True)):
        name = f"Segmentation map {index + 1} (index {index})"
        try:
            values = _values(segmentation_map)
        except (OSError, TypeError, ValueError) as error:
            raise ValueError(f"{name}: {error}") from error
        if values.shape != tuple(size):
            raise ValueError(
                f"{name} is {values.shape} (height, width), but its image {tuple(size)}.{_hint(values, size)}"
            )
        read.append(values)
    return read


def _hint(values: np.ndarray, size: tuple[int, int]) -> str:
    if values.shape[::-1] != tuple(size):
        return ""
    return " Images are turned upright by their EXIF orientation: turn the map likewise."


def _values(segmentation_map: MapLike) -> np.ndarray:
    if isinstance(segmentation_map, bytes):
        segmentation_map = io.BytesIO(segmentation_map)
    if isinstance(segmentation_map, str | os.PathLike | io.BytesIO):
        with Image.open(segmentation_map) as opened:
            opened.load()
            segmentation_map = opened
    if isinstance(segmentation_map, Image.Image):
        values = np.asarray(ImageOps.exif_transpose(segmentation_map))
    elif isinstance(segmentation_map, torch.Tensor):
        values = segmentation_map.detach().cpu().numpy()
    else:
        values = np.asarray(segmentation_map)
    if values.ndim == 3 and 1 in (values.shape[0], values.shape[-1]):
        values = values[0] if values.shape[0] == 1 else values[..., 0]
    if values.ndim != 2 or values.dtype.kind not in "biuf":
        raise ValueError(f"it must hold one number per pixel, got values of type {values.dtype} in {values.shape}.")
    whole = values.astype(np.int64)
    if not (whole == values).all() or (whole.size and not _OUTSIDE < whole.min() <= whole.max() < 2**31):
        raise ValueError("it must hold whole numbers of 32 bits, the classes or instances of its pixels.")
    return whole.astype(np.int32)


def place_segmentation_map(
    values: np.ndarray, resized: tuple[int, int], crop: tuple[int, int] | None = None
) -> np.ndarray:
    """Resize a map by nearest-neighbor interpolation and center-crop it, as its image.

    Args:
        values: (H, W) int32 map.
        resized: Size of the resized image.
        crop: Size of the center crop. Default: no crop.

    Returns:
        The int32 map of size `crop`, or `resized` without a crop.
    """
    if values.shape != resized:
        values = np.asarray(Image.fromarray(values).resize(resized[::-1], Image.Resampling.NEAREST))
    if crop is None:
        return values
    placed = np.full(crop, _OUTSIDE, dtype=np.int32)
    # Offsets of the crop in the map, negative if it starts outside of the map.
    offsets = [(side - cropped) // 2 for side, cropped in zip(values.shape, crop, strict=True)]
    source = values[max(offsets[0], 0) :, max(offsets[1], 0) :][: crop[0], : crop[1]]
    top, left = (max(-offset, 0) for offset in offsets)
    source = source[: crop[0] - top, : crop[1] - left]
    placed[top : top + source.shape[0], left : left + source.shape[1]] = source
    return placed


def mask_and_class_labels(
    maps: Sequence[np.ndarray],
    size: tuple[int, int],
    instance_id_to_semantic_id: Mapping[int, int] | Sequence[Mapping[int, int]] | None = None,
    ignore_index: int | None = None,
    do_reduce_labels: bool | None = False,
) -> dict[str, list[torch.Tensor]]:
    """Convert each map to one mask and class id per value, in ascending order of the values.

    Args:
        maps: B maps (H, W).
        size: Size of the padded batch; masks are 0 in the padding.
        instance_id_to_semantic_id: Class id of each value of the maps, one dict for all maps or one for each.
        ignore_index: Value without a mask. Default: every value has one.
        do_reduce_labels: Whether value 0 has no mask and all class ids are reduced by one.

    Returns:
        A dict with `mask_labels`, B tensors (N, H, W) fp32 of 0 and 1, and `class_labels`, B tensors (N,) int64.

    Raises:
        ValueError: If `do_reduce_labels` is given without `ignore_index`, the mappings are invalid or not one for each
            map, a value has no class, or a class id is negative.
    """
    if do_reduce_labels and ignore_index is None:
        raise ValueError("`do_reduce_labels` needs an `ignore_index`, such as 255, for pixels of value 0.")
    mappings = instance_id_to_semantic_id
    if mappings is None or isinstance(mappings, Mapping):
        mappings = [mappings] * len(maps)
    if not isinstance(mappings, Sequence) or len(mappings) != len(maps):
        raise ValueError(
            "`instance_id_to_semantic_id` must be a dict of class numbers, or a list of one for each of the "
            f"{len(maps)} maps."
        )
    labels: dict[str, list[torch.Tensor]] = {"mask_labels": [], "class_labels": []}
    for index, (values, mapping) in enumerate(zip(maps, mappings, strict=True)):
        ids = np.unique(values).tolist()
        classes = {value: value - 1 if do_reduce_labels else value for value in ids}
        ids = [
            value
            for value in ids
            if value != _OUTSIDE and classes[value] != ignore_index and not (do_reduce_labels and value == 0)
        ]
        name = f"map {index + 1} (index {index})"
        if mapping is not None:
            classes = _mapped(ids, mapping, bool(do_reduce_labels), name)
        if min((classes[value] for value in ids), default=0) < 0:
            raise ValueError(
                f"Segmentation {name} has negative classes; give their value as `ignore_index`. With "
                "`do_reduce_labels` classes count from 1."
            )
        masks = torch.zeros(len(ids), *size)
        for mask, value in zip(masks, ids, strict=True):
            mask[: values.shape[0], : values.shape[1]] = torch.from_numpy(values == value)
        labels["mask_labels"].append(masks)
        labels["class_labels"].append(torch.tensor([classes[value] for value in ids], dtype=torch.int64))
    return labels


def _mapped(ids: list[int], mapping: Any, do_reduce_labels: bool, name: str) -> dict[int, int]:
    """Return the class id of each value of a map."""
    missing = [value for value in ids if value not in mapping]
    if missing:
        raise ValueError(
            f"`instance_id_to_semantic_id` has no class for the values {missing[:10]} of segmentation {name}."
        )
    return {
        value: check_whole_number(f"instance_id_to_semantic_id[{value}]", mapping[value]) - do_reduce_labels
        for value in ids
    }


__all__ = ["MapLike", "mask_and_class_labels", "place_segmentation_map", "read_segmentation_maps"]
