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
"""Images of any kind to padded, normalised `pixel_values`. All sizes are (height, width)."""

import io
import math
import os
import threading
import time
from collections.abc import Sequence
from typing import Any, BinaryIO, TypedDict
from urllib.request import HTTPRedirectHandler, Request, build_opener

import numpy as np
import torch
from PIL import Image
from transformers import BatchFeature
from transformers.image_processing_backends import PilBackend
from transformers.image_transforms import get_size_with_aspect_ratio
from transformers.image_utils import (
    IMAGENET_DEFAULT_MEAN,
    IMAGENET_DEFAULT_STD,
    ChannelDimension,
    PILImageResampling,
)

# From its module: the top level of transformers 5.17 hides it where torchvision is missing.
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from .argument_checks import check_flags, check_number, check_whole_number, shown
from .configuration_gkc import GKCConfig
from .image_reading import open_rgb, refuse_empty, rescale, to_rgb
from .post_processing import PostProcessingMixin
from .remote_code import CodeSavingMixin

ImageLike = str | os.PathLike | bytes | Image.Image | np.ndarray | torch.Tensor

_URL_SCHEMES = ("http://", "https://", "data:")
URL_TIMEOUT_S = 30
MAX_URL_BYTES = 256 * 2**20
BYTES_PER_READ = 2**16
MAX_SIDE = 2**16
SMALLEST_SCALE = 1e-12  # a divisor or factor below is a slip
_SIZE_KEYS = ({"shortest_edge"}, {"shortest_edge", "longest_edge"}, {"longest_edge"}, {"height", "width"})


class GKCImagesKwargs(TypedDict, total=False):
    """Settings of `GKCImageProcessor`, each of which a call may override."""

    do_resize: bool
    size: Any
    resample: Any
    do_rescale: bool
    rescale_factor: Any
    do_normalize: bool
    image_mean: Any
    image_std: Any
    do_pad: bool
    size_divisor: Any
    input_data_format: Any
    return_tensors: Any


class GKCImageProcessor(CodeSavingMixin, PostProcessingMixin, PilBackend):
    """
    Turns images into the model's input, and the model's output into segmentations.

    An image is a path, URL (http, https or data), bytes of a file, PIL image, array or tensor; several are a list, or
    an array with a batch axis. It is shown as its EXIF orientation says; of an animation the first frame is taken;
    grey, palette, CMYK and other kinds become RGB, transparency is laid on white, 16-bit values are scaled to 8 bits,
    floats are 0..1. Arrays and tensors have 1, 3 (RGB), 4 (RGBA) channels or no channel axis; booleans, 8-bit integers
    (also wider types with values 0..255), 16-bit unsigned integers 0..65535 and floats 0..1, which may pass the ends
    by rounding errors of 1e-5. The channel axis is found by its length; where both ends fit, arrays are read channels
    last and tensors channels first, unless `input_data_format` ("channels_first" or "channels_last") says otherwise.

    Args:
        do_resize: Resize to `size`.
        size: `{"shortest_edge", "longest_edge"}` keeps the aspect, the short side reaching `shortest_edge` unless the
            long one would exceed `longest_edge` (either may stand alone); `{"height", "width"}` does not. Default 800
            and 1333, those of detectron2, at which the method's published numbers were measured.
        resample: Filter of the resizing, of `PIL.Image.Resampling`; bilinear by default.
        do_rescale: Multiply 8-bit values by `rescale_factor`. (Floats 0..1 stay in that range without it.)
        rescale_factor: 1 / 255 by default.
        do_normalize: Subtract `image_mean`, then divide by `image_std`.
        image_mean: Per channel, for values 0..1; that of ImageNet by default.
        image_std: Per channel, for values 0..1; that of ImageNet by default.
        do_pad: Pad with zeros at the right and bottom, after the normalisation.
        size_divisor: Both padded sides become multiples of it; 32 is the stride of the backbone.

    Raises:
        ValueError: an image cannot be read, is empty, or has values outside its range; the message names the file or
            the position in the batch.
        FileNotFoundError: a path does not exist.
    """

    valid_kwargs = GKCImagesKwargs
    model_input_names = ["pixel_values", "pixel_mask"]

    do_resize = True
    size = {"shortest_edge": 800, "longest_edge": 1333}
    default_to_square = False
    resample = PILImageResampling.BILINEAR
    do_rescale = True
    rescale_factor = 1 / 255
    do_normalize = True
    image_mean = IMAGENET_DEFAULT_MEAN
    image_std = IMAGENET_DEFAULT_STD
    do_pad = True
    size_divisor = 32

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        _check_settings({name: getattr(self, name, None) for name in GKCImagesKwargs.__annotations__})

    def preprocess(self, images: ImageLike | Sequence[ImageLike], *args, **kwargs) -> BatchFeature:
        """Prepare images, as a call of the processor does."""
        # Before transformers checks the types of the settings, whose error is no ValueError.
        _check_settings({name: value for name, value in kwargs.items() if name != "size"})
        return super().preprocess(images, *args, **kwargs)

    def _standardize_kwargs(self, **kwargs) -> dict[str, Any]:
        size = kwargs.get("size")
        if isinstance(size, list | tuple) and len(size) != 2:  # transformers would ignore the third
            raise ValueError(f"`size` as a list must be [height, width], got {shown(size)}.")
        try:
            return super()._standardize_kwargs(**kwargs)
        except (TypeError, ValueError) as error:  # of `size`, the only setting that is converted
            raise ValueError(f"`size` is no size of images: {error}") from error

    def _validate_preprocess_kwargs(self, **kwargs) -> None:
        _check_settings(kwargs)
        super()._validate_preprocess_kwargs(**kwargs)

    def _preprocess_image_like_inputs(self, images: ImageLike | Sequence[ImageLike], *args, **kwargs) -> BatchFeature:
        images = _as_list(images)
        if not images:
            raise ValueError("no images were given.")
        pixels = [self._pixels(image, index, **kwargs) for index, image in enumerate(images)]
        if kwargs["do_pad"]:
            divisor = max(kwargs["size_divisor"] or 1, 1)
            height, width = (-(-max(image.shape[axis] for image in pixels) // divisor) * divisor for axis in (1, 2))
        elif len({image.shape for image in pixels}) == 1:
            height, width = pixels[0].shape[1:]
        else:
            raise ValueError("images of different sizes make no batch without padding: leave `do_pad` on.")
        pixel_values = torch.zeros(len(pixels), 3, height, width)
        pixel_mask = torch.zeros(len(pixels), height, width, dtype=torch.int64)
        for index, image in enumerate(pixels):
            pixel_values[index, :, : image.shape[1], : image.shape[2]] = image
            pixel_mask[index, : image.shape[1], : image.shape[2]] = 1
        return as_batch({"pixel_values": pixel_values, "pixel_mask": pixel_mask}, kwargs["return_tensors"])

    def _pixels(self, image: ImageLike, index: int, **settings) -> torch.Tensor:
        """One image, resized and normalised, fp32 (3, H, W)."""
        holds_unit_range = isinstance(image, np.ndarray | torch.Tensor) and "float" in str(image.dtype)
        image = read_image(image, settings["input_data_format"], name=f"image {index + 1} (index {index})")
        if settings["do_resize"]:
            height, width = resized_size((image.height, image.width), dict(settings["size"]))
            if (height, width) != (image.height, image.width):
                image = image.resize((width, height), settings["resample"])
        # Bytes are reordered, not floats: that is four times less to move.
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous().float()
        if settings["do_rescale"]:
            pixels *= settings["rescale_factor"]
        elif holds_unit_range:
            pixels /= 255
        if settings["do_normalize"]:
            mean, std = (torch.tensor(settings[name]).expand(3)[:, None, None] for name in ("image_mean", "image_std"))
            pixels = pixels.sub_(mean).div_(std)
        return pixels


def read_image(
    image: ImageLike,
    input_data_format: str | ChannelDimension | None = None,
    name: str = "image",
    timeout: float = URL_TIMEOUT_S,
) -> Image.Image:
    """
    Any image as an upright 8-bit RGB picture; the kinds are those of `GKCImageProcessor`.

    Args:
        image: Path, URL, bytes of a file, PIL image, array or tensor.
        input_data_format: "channels_first" or "channels_last" of an array or tensor; None finds it out.
        name: What to call the image in errors, if it has no file name.
        timeout: Seconds that reading a URL may take in all; at most 256 MiB are read of it, and redirects lead to
            http and https only.

    Raises:
        ValueError: the image cannot be read, is empty, or has values outside its range; the file or `name` is named.
        FileNotFoundError: the path does not exist.
        TypeError: `image` is none of these, or an array of what are no numbers.
    """
    if isinstance(image, str | os.PathLike):
        name = str(image) if len(str(image)) < 500 else f"{str(image)[:60]}..."
    elif getattr(image, "filename", None):
        name = f"{image.filename}"
    try:
        return _decode(image, input_data_format, timeout)
    except FileNotFoundError:
        raise
    except TypeError as error:
        if isinstance(
            image, str | os.PathLike | bytes | Image.Image
        ):  # of a damaged file, by one of Pillow's decoders
            raise ValueError(f"{name}: cannot be read as an image: {error}") from error
        raise TypeError(f"{name}: {error}") from error
    except Exception as error:  # Pillow's decoders raise errors of many types
        raise ValueError(f"{name}: cannot be read as an image: {error}") from error


def resized_size(image_size: tuple[int, int], size: dict[str, int]) -> tuple[int, int]:
    """
    Height and width that an image of `image_size` is resized to.

    Args:
        image_size: Height and width in pixels.
        size: As in `GKCImageProcessor`.

    Returns:
        Sides of at least 1 pixel. With `shortest_edge` they are those of transformers' image processors, which may
        round down, but never above `longest_edge`.
    """
    _check_size(size)
    if "height" in size:
        return size["height"], size["width"]
    if "shortest_edge" in size:
        resized = get_size_with_aspect_ratio(image_size, size["shortest_edge"], size.get("longest_edge"))
    else:
        scale = size["longest_edge"] / max(image_size)
        resized = tuple(round(side * scale) for side in image_size)
    limit = size.get("longest_edge", max(resized))
    return min(max(resized[0], 1), limit), min(max(resized[1], 1), limit)


def _check_settings(settings: dict[str, Any]) -> None:
    """
    Refuse settings of the image processor that cannot be meant.

    Args:
        settings: By name, some of `GKCImagesKwargs`; None stands for a default.

    Raises:
        ValueError: a setting has a wrong type, is not finite or lies outside its range; the message names it.
    """
    given = {name: value for name, value in settings.items() if value is not None}
    check_flags(**{name: value for name, value in given.items() if name.startswith("do_")})
    if "size" in given:
        _check_size(dict(given["size"]))
    if "rescale_factor" in given:
        check_number("rescale_factor", given["rescale_factor"], SMALLEST_SCALE)
    for name, low in (("image_mean", -math.inf), ("image_std", SMALLEST_SCALE)):
        if name in given:
            _check_channels(name, given[name], low)
    if "size_divisor" in given:
        check_whole_number("size_divisor", given["size_divisor"], 0)
    for name, kind in (("resample", PILImageResampling), ("input_data_format", ChannelDimension)):
        if name in given:
            try:
                kind(given[name])
            except ValueError as error:
                choices = ", ".join(repr(choice.value) for choice in kind)
                raise ValueError(f"`{name}` must be one of {choices}, got {shown(given[name])}.") from error


def _check_channels(name: str, value: Any, low: float) -> None:
    values = value.tolist() if isinstance(value, np.ndarray | torch.Tensor) else value
    values = values if isinstance(values, list | tuple) else [values]
    if len(values) not in (1, 3):
        raise ValueError(f"`{name}` must be one number, or one for each of the 3 channels, got {shown(value)}.")
    for number in values:
        check_number(name, number, low)


def _check_size(size: dict[str, int]) -> None:
    if set(size) not in _SIZE_KEYS:
        raise ValueError(
            "`size` needs 'shortest_edge' and/or 'longest_edge', or 'height' and 'width'; got " + ", ".join(size) + "."
        )
    for side, pixels in size.items():
        check_whole_number(f"size['{side}']", pixels, 1, MAX_SIDE if side in ("height", "width") else 2**31 - 1)


def _as_list(images: ImageLike | Sequence[ImageLike]) -> list[ImageLike]:
    if isinstance(images, np.ndarray | torch.Tensor):
        return list(images) if images.ndim == 4 else [images]
    return list(images) if isinstance(images, list | tuple) else [images]


def check_return_tensors(return_tensors: str | None) -> None:
    """
    Refuse a form of tensors that the processors do not give.

    Raises:
        ValueError: it is neither "pt", also the default, nor "np".
    """
    if return_tensors not in (None, "pt", "np"):
        raise ValueError(f"`return_tensors` must be 'pt' (also the default) or 'np', got {return_tensors!r}.")


def as_batch(data: dict[str, torch.Tensor], return_tensors: str | None) -> BatchFeature:
    """Tensors in the form that a processor's caller asks for; errors as of `check_return_tensors`."""
    check_return_tensors(return_tensors)
    if return_tensors == "np":
        data = {key: value.numpy() for key, value in data.items()}
    return BatchFeature(data)


def _decode(image: ImageLike, input_data_format: str | ChannelDimension | None, timeout: float) -> Image.Image:
    if isinstance(image, np.ndarray | torch.Tensor):
        return to_rgb(_from_array(image, input_data_format))
    if isinstance(image, Image.Image):
        return to_rgb(image)
    if isinstance(image, str | os.PathLike | bytes):
        return open_rgb(_file_of(image, timeout))
    raise TypeError(f"an image is a path, URL, bytes, PIL image, array or tensor, not {type(image).__name__}.")


def _file_of(image: str | os.PathLike | bytes, timeout: float) -> str | os.PathLike | BinaryIO:
    if isinstance(image, bytes):
        return io.BytesIO(image)
    if isinstance(image, str) and image.startswith(_URL_SCHEMES):
        return io.BytesIO(_download_in_time(image, timeout))
    return image


class _WebRedirects(HTTPRedirectHandler):
    """Follows redirects to http and https only; urllib's own would also go to ftp."""

    def redirect_request(self, req, fp, code, msg, headers, newurl):
        """The request of the next hop."""
        if not newurl.lower().startswith(("http://", "https://")):
            raise ValueError(f"the address redirects to {newurl[:200]!r}, which is neither http nor https.")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def urlopen(request: Request, timeout: float) -> Any:
    """Open an address as urllib does, redirects to http and https only."""
    return build_opener(_WebRedirects).open(request, timeout=timeout)


def _download_in_time(url: str, timeout: float) -> bytes:
    """
    Read what an address gives, in a thread: a server may also send the head of its answer a byte a second.

    Raises:
        ValueError: as of `_download`.
    """
    check_number("timeout", timeout, 0)
    answers: list[bytes | Exception] = []

    def work() -> None:
        try:
            answers.append(_download(url, timeout))
        except Exception as error:
            answers.append(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(timeout)
    if not answers:
        raise ValueError(f"reading the address took longer than {timeout:g} s: set a longer `timeout`.")
    if isinstance(answers[0], Exception):
        raise answers[0]
    return answers[0]


def _download(url: str, timeout: float) -> bytes:
    """
    Read what an address gives.

    Raises:
        ValueError: it gives more than `MAX_URL_BYTES`, or takes longer than `timeout` seconds in all.
    """
    deadline = time.monotonic() + timeout
    parts, size = [], 0
    # Some servers refuse a client without a name.
    with urlopen(Request(url, headers={"User-Agent": "gkc"}), timeout=timeout) as response:
        # `read1` returns what has come; `read` would wait for all of it, however slowly it comes.
        read = getattr(response, "read1", None) or response.read
        while part := read(BYTES_PER_READ):
            size += len(part)
            parts.append(part)
            if size > MAX_URL_BYTES:
                raise ValueError(f"the address gives more than {MAX_URL_BYTES // 2**20} MiB: download it yourself.")
            if time.monotonic() > deadline:
                raise ValueError(f"reading the address took longer than {timeout:g} s: set a longer `timeout`.")
        if missing := getattr(response, "length", None):
            raise ValueError(f"the address broke off {missing} bytes before its end.")
    return b"".join(parts)


def _from_array(image: np.ndarray | torch.Tensor, input_data_format: str | ChannelDimension | None) -> Image.Image:
    if isinstance(image, torch.Tensor):
        image = image.detach().cpu()
        values = (image.float() if image.is_floating_point() else image).numpy()
        preferred = ChannelDimension.FIRST
    else:
        values, preferred = image, ChannelDimension.LAST
    if values.ndim not in (2, 3):
        raise ValueError(f"an array needs 2 or 3 axes, got the shape {values.shape}.")
    if values.ndim == 3:
        data_format = ChannelDimension(input_data_format or _channel_axis(values.shape, preferred))
        values = np.moveaxis(values, 0, -1) if data_format is ChannelDimension.FIRST else values
        if values.shape[-1] not in (1, 3, 4):
            raise ValueError(f"an image needs 1, 3 or 4 channels, got {values.shape[-1]} ({data_format.value}).")
    refuse_empty(values.shape[:2])
    values = np.ascontiguousarray(_to_8_bits(values))
    return Image.fromarray(values[..., 0] if values.shape[2:] == (1,) else values)


def _channel_axis(shape: tuple[int, ...], preferred: ChannelDimension) -> ChannelDimension:
    """Where the channels are: an end of length 3 or 4, else one of length 1; `preferred` if both ends qualify."""
    for lengths in ((3, 4), (1,)):
        fits_first, fits_last = shape[0] in lengths, shape[-1] in lengths
        if fits_first and fits_last:
            return preferred
        if fits_first or fits_last:
            return ChannelDimension.FIRST if fits_first else ChannelDimension.LAST
    raise ValueError(f"no axis of the shape {shape} can be the channels, of which there must be 1, 3 or 4.")


def _to_8_bits(values: np.ndarray) -> np.ndarray:
    if values.dtype == np.uint8:
        return values
    if values.dtype == bool:
        return values.astype(np.uint8) * 255
    if values.dtype.kind == "u" and values.dtype.itemsize == 2:
        return rescale(values, 65535)
    if values.dtype.kind == "f":
        return rescale(values, 1)
    if values.dtype.kind in "iu":
        return rescale(values, 255)
    raise TypeError(f"images have boolean, integer or float values, not {values.dtype}.")


AutoImageProcessor.register(
    GKCConfig, image_processor_classes={"pil": GKCImageProcessor, "torchvision": GKCImageProcessor}, exist_ok=True
)

__all__ = ["GKCImageProcessor", "ImageLike", "as_batch", "check_return_tensors", "read_image", "resized_size"]
