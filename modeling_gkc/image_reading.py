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
"""Image files and PIL images as upright 8-bit RGB pictures, with numpy and Pillow only.

`export` copies this file beside an ONNX graph, so that its run.py shows a graph the pixels that the library shows a
model.
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
_FLOAT_SLACK = 1e-5  # what computing in fp32 adds to values at the ends of 0..1


def open_rgb(file: str | os.PathLike | BinaryIO) -> Image.Image:
    """
    An image file as an upright 8-bit RGB picture; of an animation the first frame.

    Args:
        file: Path, or a file opened for reading bytes.

    Raises:
        FileNotFoundError: the path does not exist.
        ValueError: the picture is empty or has values outside its range; Pillow's decoders raise other errors, too.
    """
    if not hasattr(file, "read"):
        # Opened here: Pillow maps files it opens by name into memory, which garbles a TIFF that is stored on its side.
        with open(file, "rb") as opened:
            return open_rgb(opened)
    with Image.open(file) as image:
        return to_rgb(image)


def to_rgb(image: Image.Image) -> Image.Image:
    """
    A PIL image as an upright 8-bit RGB picture.

    It is turned as its EXIF orientation says; transparency is laid on white; 16-bit values are scaled to 8 bits, not
    clipped; floats are 0..1.

    Args:
        image: Of any mode.

    Raises:
        ValueError: it is empty or has values outside its range.
    """
    check_not_empty(image.size[::-1])
    _check_strips(image)
    limit, white_is_zero = _scale_of(image)  # asked first: once the pixels are loaded, their packing is not known
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


def _scale_of(image: Image.Image) -> tuple[int, bool]:
    """The largest value that the samples of a gray picture can have, and whether it is black instead of white."""
    if image.mode == "L":
        tiles = getattr(image, "tile", [])
        return _LIMITS_OF_PACKED_GRAY.get(tiles[0].args if tiles else None, 255), False
    tags = getattr(image, "tag_v2", {})
    # Pillow unpacks 12 bits, and leaves gray of more than 8 bits with white as zero, as they are stored.
    limit = 1 if image.mode == "F" else 4095 if tags.get(_BITS_PER_SAMPLE) == (12,) else 65535
    return limit, tags.get(_PHOTOMETRIC_INTERPRETATION) == 0


def _has_palette_with_opacities(image: Image.Image) -> bool:
    return image.mode == "P" and getattr(image.palette, "mode", "RGB") == "RGBA"


def _check_strips(image: Image.Image) -> None:
    """Raise a ValueError for a TIFF file whose strips do not fill the picture: Pillow leaves the rest black."""
    if image.format == "TIFF" and getattr(image, "tile", []):
        rows = max(bottom for _, (_, _, _, bottom), *_ in image.tile)
        columns = max(right for _, (_, _, right, _), *_ in image.tile)
        width, height = (
            image.tag_v2[tag] for tag in _IMAGE_SIZE
        )  # as stored, while `size` is that of the upright one
        if rows < height or columns < width:
            raise ValueError(f"it holds {columns} x {rows} of its {width} x {height} pixels.")


def rescale(values: np.ndarray, limit: int) -> np.ndarray:
    """
    Values 0..limit of any number type as 8-bit integers, rounded.

    Raises:
        ValueError: a value lies outside, by more than what computing in fp32 adds to floats.
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
    for start in range(0, len(values), step):  # a large image in wider numbers would be many times its own size
        np.rint(values[start : start + step] * scale, out=scaled[start : start + step], casting="unsafe")
    return scaled


def check_not_empty(size: tuple[int, ...]) -> None:
    """Raise a ValueError for a height or width of zero."""
    if 0 in size:
        raise ValueError(f"it has no pixels, its height and width are {tuple(size)}.")


def _upright(image: Image.Image) -> Image.Image:
    is_stored_upright = image.getexif().get(ExifTags.Base.Orientation, 1) == 1
    return image if is_stored_upright else ImageOps.exif_transpose(image)


__all__ = ["check_not_empty", "open_rgb", "rescale", "to_rgb"]
