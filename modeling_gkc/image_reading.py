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
"""Conversion of image files and PIL images to upright 8-bit RGB images, with numpy and Pillow only.

`export` copies this file beside an ONNX graph, so that its run.py computes the same pixels as the library.
"""

import os
from typing import BinaryIO

import numpy as np
from PIL import ExifTags, Image, ImageOps

_ALPHA_MODES = ("LA", "La", "PA", "RGBA", "RGBa")
_SIXTEEN_BIT_MODES = ("I", "I;16", "I;16B", "I;16L", "I;16N")
_LIMITS_OF_PACKED_GRAY = {"L;2": 3, "L;4": 15}
_IMAGE_SIZE, _BITS_PER_SAMPLE, _PHOTOMETRIC_INTERPRETATION = (256, 257), 258, 262  # tags of TIFF
_VALUES_AT_ONCE = 2**20
_FLOAT_SLACK = 1e-5  # rounding errors of fp32 computations at the ends of 0..1


def open_rgb(file: str | os.PathLike | BinaryIO) -> Image.Image:
    """Read an image file as an upright 8-bit RGB image; of an animation the first frame.

    Args:
        file: Path, or a file opened for reading bytes.

    Returns:
        The image in mode "RGB".

    Raises:
        FileNotFoundError: If the path does not exist.
        ValueError: If the image is empty or has values outside of its range. Pillow's decoders raise errors of other
            types for damaged files.
    """
    if not hasattr(file, "read"):
        # Opened here, because Pillow memory-maps files opened by name, which corrupts TIFF images stored rotated.
        with open(file, "rb") as opened:
            return open_rgb(opened)
    with Image.open(file) as image:
        return to_rgb(image)


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert a PIL image to an upright 8-bit RGB image.

    The image is rotated by its EXIF orientation; transparent pixels are blended with white; 16-bit values are scaled
    to 8 bits; floats are expected in 0..1.

    Args:
        image: Image of any mode.

    Returns:
        The image in mode "RGB".

    Raises:
        ValueError: If the image is empty or has values outside of its range.
    """
    check_not_empty(image.size[::-1])
    _check_strips(image)
    limit, white_is_zero = _value_range(image)  # before the pixels are loaded, which discards how they are packed
    image = _upright(image)
    if image.mode in (*_SIXTEEN_BIT_MODES, "F"):
        values = np.asarray(image)
        gray = rescale(values, limit)
        gray = 255 - gray if white_is_zero else gray
        if "transparency" in image.info:
            gray[values == image.info["transparency"]] = 255
        image = Image.fromarray(gray)
    elif image.mode == "L" and "transparency" in image.info and limit < 255:
        gray = np.array(image)
        gray[gray == image.info["transparency"] * (255 // limit)] = 255
        image = Image.fromarray(gray)
    elif image.mode in _ALPHA_MODES or "transparency" in image.info or _has_palette_with_opacities(image):
        opaque = {"La": "LA", "RGBa": "RGBA"}.get(image.mode, image.mode)
        image = image.convert(opaque).convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def _value_range(image: Image.Image) -> tuple[int, bool]:
    """Return the largest possible value of a gray image, and whether it means black instead of white."""
    if image.mode == "L":
        tiles = getattr(image, "tile", [])
        return _LIMITS_OF_PACKED_GRAY.get(tiles[0].args if tiles else None, 255), False
    tags = getattr(image, "tag_v2", {})
    # Pillow unpacks 12 bits, but does not invert gray of more than 8 bits that is stored with white as zero.
    limit = 1 if image.mode == "F" else 4095 if tags.get(_BITS_PER_SAMPLE) == (12,) else 65535
    return limit, tags.get(_PHOTOMETRIC_INTERPRETATION) == 0


def _has_palette_with_opacities(image: Image.Image) -> bool:
    return image.mode == "P" and getattr(image.palette, "mode", "RGB") == "RGBA"


def _check_strips(image: Image.Image) -> None:
    """Check that the strips of a TIFF file cover the image, since Pillow would leave the rest black."""
    if image.format == "TIFF" and getattr(image, "tile", []):
        rows = max(bottom for _, (_, _, _, bottom), *_ in image.tile)
        columns = max(right for _, (_, _, right, _), *_ in image.tile)
        width, height = (
            image.tag_v2[tag] for tag in _IMAGE_SIZE
        )  # the stored size, whereas `size` is that of the upright image
        if rows < height or columns < width:
            raise ValueError(f"it contains only {columns} x {rows} of its {width} x {height} pixels.")


def rescale(values: np.ndarray, limit: int) -> np.ndarray:
    """Scale values in 0..limit of any numeric type to 8-bit integers with rounding.

    Args:
        values: Array of any shape.
        limit: Value that is scaled to 255.

    Returns:
        Array of the same shape in uint8.

    Raises:
        ValueError: If a value is outside of the range, with a tolerance of 1e-5 for floats.
    """
    lowest, highest = values.min(), values.max()
    slack = _FLOAT_SLACK if values.dtype.kind == "f" else 0
    if not (lowest >= -slack and highest <= limit + slack):  # the slack is rounded away below
        raise ValueError(
            f"values of type {values.dtype} must lie in 0..{limit}, got {lowest}..{highest}; use 8-bit integers "
            "0..255 or floats 0..1."
        )
    scale = np.float32(255 / limit)
    scaled = np.empty(values.shape, dtype=np.uint8)
    step = max(1, _VALUES_AT_ONCE // values[0].size)
    for start in range(0, len(values), step):  # in blocks, since a large image in fp32 takes four times its memory
        np.rint(values[start : start + step] * scale, out=scaled[start : start + step], casting="unsafe")
    return scaled


def check_not_empty(size: tuple[int, ...]) -> None:
    """Check that no side of an image is zero; raise a ValueError otherwise."""
    if 0 in size:
        raise ValueError(f"it has no pixels: its size is {tuple(size)} (height, width).")


def _upright(image: Image.Image) -> Image.Image:
    is_stored_upright = image.getexif().get(ExifTags.Base.Orientation, 1) == 1
    return image if is_stored_upright else ImageOps.exif_transpose(image)


__all__ = ["check_not_empty", "open_rgb", "rescale", "to_rgb"]
