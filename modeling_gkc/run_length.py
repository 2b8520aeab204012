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
"""COCO's compressed run-length encoding (RLE) of masks in numpy, compatible with pycocotools."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor

_MAX_PIXELS = 2**31
_MAX_GROUPS = 7  # groups of 5 bits that a run of a mask of `_MAX_PIXELS`, or a difference of two runs, can have


def encode_rle(mask: "Tensor | np.ndarray") -> dict[str, Any]:
    """Encode a mask in COCO's compressed run-length encoding.

    Runs are counted in column-major order and start with zeros. From the fourth run on, the difference to the run
    before the previous one is stored. A number is a sequence of 5-bit groups, lowest first, as characters starting at
    code 48, in which bit 5 marks that another group follows.

    Args:
        mask: (H, W) mask, nonzero inside.

    Returns:
        A dict with `size` [H, W] and the string `counts`, equal to the result of `pycocotools.mask.encode`.

    Raises:
        ValueError: If the mask does not have two axes.
    """
    mask = np.asarray(mask.cpu() if hasattr(mask, "cpu") else mask).astype(bool)
    if mask.ndim != 2:
        raise ValueError(f"`mask` must be (height, width), got the shape {mask.shape}: encode masks one by one.")
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
    """Decode a run-length encoding of `encode_rle` or pycocotools, or COCO's uncompressed list of runs.

    Args:
        rle: Dict with `size` and `counts`.

    Returns:
        (H, W) bool mask.

    Raises:
        ValueError: As in `checked_runs`.
    """
    runs = checked_runs(rle)
    return np.repeat(np.arange(len(runs)) % 2 == 1, runs).reshape(tuple(map(int, rle["size"])), order="F")


def checked_runs(rle: Mapping[str, Any], shape: tuple[int, int] | None = None) -> np.ndarray:
    """Decode and validate the runs of a compressed or uncompressed encoding.

    pycocotools does not validate encodings: for invalid ones its C code accesses memory out of bounds.

    Args:
        rle: Dict with `size` [H, W] and `counts`, a string, bytes or a list of integers.
        shape: Expected (height, width) of the mask. Default: any size below 2**31 pixels.

    Returns:
        (N,) int64 lengths of alternating runs of zeros and ones, whose sum is H * W.

    Raises:
        ValueError: If a key is missing, `size` is not two integers or differs from `shape`, `counts` are malformed or
            truncated, a run is negative or not an integer, or the runs do not sum up to H * W.
    """
    if not isinstance(rle, Mapping) or not {"size", "counts"} <= rle.keys():
        raise ValueError("A run-length encoding needs the keys `size` and `counts`.")
    height, width = _checked_size(rle["size"], shape)
    counts = rle["counts"]
    runs = _compressed_runs(counts) if isinstance(counts, str | bytes | bytearray) else _listed_runs(counts)
    if runs.size and runs.min() < 0:
        raise ValueError("The `counts` of the encoding hold a negative run: every run is 0 or more pixels.")
    area = height * width
    # The sum cannot overflow once no run is larger than the mask.
    if (runs.size and runs.max() > area) or runs.sum() != area:
        covered = sum(runs.tolist())
        raise ValueError(f"The runs of the encoding cover {covered} pixels, but `size` is {height} x {width}.")
    return runs


def _checked_size(size: Any, shape: tuple[int, int] | None) -> tuple[int, int]:
    sides = size.tolist() if isinstance(size, np.ndarray) else size
    if (
        not isinstance(sides, list | tuple)
        or len(sides) != 2
        or not all(isinstance(side, int | np.integer) and not isinstance(side, bool) and side >= 0 for side in sides)
    ):
        raise ValueError(f"The `size` of an encoding is [height, width] in whole numbers, got {str(size)[:80]}.")
    height, width = map(int, sides)
    if shape is not None and (height, width) != tuple(shape):
        raise ValueError(f"The `size` of the encoding is {(height, width)} (height, width), its image {tuple(shape)}.")
    if height * width >= _MAX_PIXELS:
        raise ValueError(f"The `size` of the encoding is {height} x {width}: a mask has fewer than 2**31 pixels.")
    return height, width


def _listed_runs(counts: Any) -> np.ndarray:
    wrong = "The `counts` of the encoding must be a string, or a list of runs of 0 or more pixels in whole numbers."
    try:
        runs = np.asarray(counts)
    except (ValueError, OverflowError) as error:
        raise ValueError(wrong) from error
    if runs.ndim != 1 or (runs.size and runs.dtype.kind not in "iu"):
        raise ValueError(wrong)
    if runs.size and not isinstance(counts, np.ndarray) and any(isinstance(run, bool) for run in counts):
        raise ValueError(wrong)
    if runs.size and runs.max() >= _MAX_PIXELS:
        raise ValueError(f"The `counts` of the encoding hold a run of {runs.max()} pixels, more than a mask has.")
    return runs.astype(np.int64)


def _compressed_runs(counts: str | bytes | bytearray) -> np.ndarray:
    try:
        codes = np.frombuffer(counts.encode("ascii") if isinstance(counts, str) else counts, dtype=np.uint8)
    except UnicodeEncodeError as error:
        raise ValueError("The `counts` of the encoding hold characters that compressed runs never have.") from error
    if codes.size and (codes.min() < 48 or codes.max() > 111):
        raise ValueError("The `counts` of the encoding hold characters that compressed runs never have.")
    codes = codes - 48
    ends = np.flatnonzero((codes & 32) == 0) + 1
    if len(codes) == 0 or codes[-1] & 32:
        raise ValueError("The `counts` of the encoding break off.")
    starts = np.concatenate([[0], ends[:-1]])
    lengths = ends - starts
    if lengths.max() > _MAX_GROUPS:
        raise ValueError("The `counts` of the encoding hold a run of more pixels than a mask has.")
    shifts = 5 * (np.arange(len(codes)) - np.repeat(starts, lengths))
    runs = np.add.reduceat((codes & 31).astype(np.int64) << shifts, starts)
    runs -= np.where(codes[ends - 1] & 16, 1 << 5 * lengths, 0)
    runs[1::2] = runs[1::2].cumsum()
    runs[2::2] = runs[2::2].cumsum()
    return runs


__all__ = ["checked_runs", "decode_rle", "encode_rle"]
