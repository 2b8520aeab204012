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
"""COCO's compressed run-length encoding of masks, as pycocotools writes it, with numpy alone."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import Tensor


def encode_rle(mask: Tensor | np.ndarray) -> dict[str, Any]:
    """
    COCO's compressed run-length encoding of one mask.

    Runs go down the columns and start with zeros. From the fourth on, a run is given as its difference from the run
    two before. A number is a string of 5-bit groups, lowest first, in characters from code 48, bit 5 meaning "more".

    Args:
        mask: (H, W), true inside.

    Returns:
        `size` [H, W] and `counts`, a string, as `pycocotools.mask.encode` gives it.

    Raises:
        ValueError: the mask is not (H, W).
    """
    mask = np.asarray(mask.cpu() if isinstance(mask, Tensor) else mask).astype(bool)
    if mask.ndim != 2:
        raise ValueError(f"a mask is (height, width), got the shape {mask.shape}: encode masks one by one.")
    flat = mask.flatten(order="F")
    edges = np.flatnonzero(flat[1:] != flat[:-1]) + 1
    starts = np.concatenate([[0] if flat.size and flat[0] else [], [0], edges, [flat.size]]).astype(np.int64)
    runs = np.diff(starts)
    numbers = runs.copy()
    numbers[3:] -= runs[1:-2]

    rests = [numbers]
    while (rests[-1] >> 4 != rests[-1] >> 5).any():
        rests.append(rests[-1] >> 5)
    rest = np.stack(rests, axis=1)
    has_more = rest >> 4 != rest >> 5
    written = np.cumprod(np.pad(has_more[:, :-1], ((0, 0), (1, 0)), constant_values=True), axis=1).astype(bool)
    codes = (rest & 31) + 32 * has_more + 48
    return {"size": list(mask.shape), "counts": codes[written].astype(np.uint8).tobytes().decode("ascii")}


def decode_rle(rle: Mapping[str, Any]) -> np.ndarray:
    """
    Mask (H, W) bool of an encoding by `encode_rle` or pycocotools, or of COCO's uncompressed one, a list of runs.

    Raises:
        ValueError: `counts` break off inside a number, a run is negative or no whole number, or the runs do not cover
            the `size` [H, W].
    """
    counts = rle["counts"]
    runs = _runs(counts) if isinstance(counts, str | bytes | bytearray) else np.asarray(counts)
    if runs.ndim != 1 or (runs.size and (runs.dtype.kind not in "iu" or runs.min() < 0)):
        raise ValueError("the `counts` of the encoding must be a string, or a list of runs of 0 or more pixels.")
    height, width = rle["size"]
    if runs.sum() != height * width:
        raise ValueError(f"the runs cover {runs.sum()} pixels, but `size` is {height} x {width}.")
    return np.repeat(np.arange(len(runs)) % 2 == 1, runs.astype(np.int64)).reshape((height, width), order="F")


def _runs(counts: str | bytes | bytearray) -> np.ndarray:
    """The runs that a compressed encoding holds."""
    codes = np.frombuffer(counts.encode("ascii") if isinstance(counts, str) else counts, dtype=np.uint8) - 48
    ends = np.flatnonzero((codes & 32) == 0) + 1
    if len(codes) == 0 or codes[-1] & 32:
        raise ValueError("the `counts` of the encoding break off.")
    starts = np.concatenate([[0], ends[:-1]])
    lengths = ends - starts
    shifts = 5 * (np.arange(len(codes)) - np.repeat(starts, lengths))
    runs = np.add.reduceat((codes & 31).astype(np.int64) << shifts, starts)
    runs -= np.where(codes[ends - 1] & 16, 1 << 5 * lengths, 0)
    runs[1::2] = runs[1::2].cumsum()
    runs[2::2] = runs[2::2].cumsum()
    return runs


__all__ = ["decode_rle", "encode_rle"]
