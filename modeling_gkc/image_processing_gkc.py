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
from collections.abc import Callable, Mapping, Sequence
from typing import Any, BinaryIO, TypedDict
from urllib.request import HTTPRedirectHandler, Request, build_opener

import numpy as np
import torch
from PIL import Image, ImageOps
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

from .argument_checks import MAX_PIXELS, check_flags, check_number, check_whole_number, shown
from .configuration_gkc import GKCConfig
from .image_reading import check_not_empty, open_rgb, rescale, to_rgb
from .post_processing import PostProcessingMixin
from .remote_code import CodeSavingMixin
from .segmentation_maps import MapLike, mask_and_class_labels, place_segmentation_map, read_segmentation_maps

ImageLike = str | os.PathLike | bytes | Image.Image | np.ndarray | torch.Tensor

_URL_SCHEMES = ("http://", "https://", "data:")
URL_TIMEOUT_S = 30
MAX_URL_BYTES = 256 * 2**20
BYTES_PER_READ = 2**16
MAX_SIDE = 2**16
SMALLEST_SCALE = 1e-12  # a divisor or factor below is a slip
_SIZE_SETTINGS = ("size", "crop_size", "pad_size")
_SIZE_KEYS = ({"shortest_edge"}, {"shortest_edge", "longest_edge"}, {"longest_edge"}, {"height", "width"})


class GKCImageProcessorKwargs(TypedDict, total=False):
    """Settings of `GKCImageProcessor`, each of which a call may override."""

    do_convert_rgb: bool
    do_resize: bool
    size: Any
    max_size: Any
    default_to_square: Any
    resample: Any
    do_center_crop: bool
    crop_size: Any
    do_rescale: bool
    rescale_factor: Any
    do_normalize: bool
    image_mean: Any
    image_std: Any
    do_pad: bool
    pad_size: Any
    size_divisor: Any
    ignore_index: Any
    do_reduce_labels: bool
    data_format: Any
    input_data_format: Any
    device: Any
    disable_grouping: Any
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
        do_convert_rgb: Make every image RGB, as the model needs it. Without it grey and RGBA images keep their 1 or 4
            channels.
        do_resize: Resize to `size`.
        size: `{"shortest_edge", "longest_edge"}` keeps the aspect, the short side reaching `shortest_edge` unless the
            long one would exceed `longest_edge` (either may stand alone); `{"height", "width"}` does not. Default 800
            and 1333, those of detectron2, at which the method's published numbers were measured. A single number is
            `shortest_edge`.
        max_size: The older name of `size["longest_edge"]`: `size=42, max_size=84`.
        default_to_square: Read a single number as `size` as both sides of a square.
        resample: Filter of the resizing, of `PIL.Image.Resampling`; bilinear by default.
        do_center_crop: Cut `crop_size`, `{"height", "width"}` or the side of a square, out of the middle after the
            resizing; what the crop holds beyond the image is zero.
        crop_size: See `do_center_crop`.
        do_rescale: Multiply 8-bit values by `rescale_factor`. (Floats 0..1 stay in that range without it.)
        rescale_factor: 1 / 255 by default.
        do_normalize: Subtract `image_mean`, then divide by `image_std`.
        image_mean: Per channel, for values 0..1; that of ImageNet by default.
        image_std: Per channel, for values 0..1; that of ImageNet by default.
        do_pad: Pad with zeros at the right and bottom, after the normalisation.
        pad_size: `{"height", "width"}` to pad to, instead of the largest sides of the batch.
        size_divisor: Both padded sides become multiples of it; 32 is the stride of the backbone.
        ignore_index: Value of pixels of `segmentation_maps` that belong to no class; None counts every value.
        do_reduce_labels: Value 0 of `segmentation_maps` means no class, and all others are one less, as ADE20K needs
            it; `ignore_index` has to be given.
        data_format: "channels_last" gives `pixel_values` as (B, H, W, 3), which the model does not take.
        device: Where the tensors of `return_tensors="pt"` go; images are always prepared on the CPU.
        disable_grouping: Accepted for calls of torchvision's processors; images are prepared one by one.
        return_tensors: "pt" or "np"; without it a list per entry, with an array for each image, as in transformers.

    Raises:
        ValueError: an image cannot be read, is empty, or has values outside its range; the message names the file or
            the position in the batch.
        FileNotFoundError: a path does not exist.
    """

    valid_kwargs = GKCImageProcessorKwargs
    model_input_names = ["pixel_values", "pixel_mask", "original_sizes"]

    do_convert_rgb = True
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
    do_reduce_labels = False

    def __init__(self, **kwargs):
        super().__init__(**_with_longest_edge(kwargs, self.size))
        _check_settings({name: getattr(self, name, None) for name in GKCImageProcessorKwargs.__annotations__})

    def preprocess(
        self,
        images: ImageLike | Sequence[ImageLike],
        segmentation_maps: MapLike | Sequence[MapLike] | None = None,
        instance_id_to_semantic_id: Mapping[int, int] | Sequence[Mapping[int, int]] | None = None,
        **kwargs,
    ) -> BatchFeature:
        """
        Prepare images, and for training their annotations, as a call of the processor does.

        Args:
            images: One image or B images.
            segmentation_maps: For each image the class or instance of every pixel, (H, W) in the upright image's size:
                PIL image, array, tensor, path or bytes of a file.
            instance_id_to_semantic_id: Class of each value of the maps, for all images or for each; without it the
                values are the classes.
            kwargs: Settings for this call.

        Returns:
            `pixel_values` (B, 3, H, W), `pixel_mask` (B, H, W), 1 where the image is, and `original_sizes` (B, 2),
            height and width of the upright images (with `do_center_crop` of the crops), for the `target_sizes` of
            post-processing. With maps also lists of B entries: `mask_labels`, (N, H, W) masks of 0 and 1, and
            `class_labels`, (N,) classes. They are those of transformers' Mask2Former, whose padding alone differs:
            there masks are 0 here.

        Raises:
            ValueError: as for the class; or a map is of another size than its image, holds no whole numbers, or a
                value that `instance_id_to_semantic_id` lacks. The image's position in the batch is named.
        """
        # Before transformers checks the types of the settings, whose error is no ValueError.
        _check_settings({name: value for name, value in kwargs.items() if name not in _SIZE_SETTINGS})
        for name, value in kwargs.items():
            if value is None and name.startswith("do_"):
                raise ValueError(f"`{name}` must be True or False, got None: leave it out for the processor's own.")
        kwargs = _with_longest_edge(kwargs, self.size)
        # By position: transformers 5.17 takes no `image_like_kwargs`.
        return super().preprocess(images, segmentation_maps, instance_id_to_semantic_id, **kwargs)

    def _standardize_kwargs(self, **kwargs) -> dict[str, Any]:
        for name in _SIZE_SETTINGS:
            size = kwargs.get(name)
            if isinstance(size, list | tuple) and len(size) != 2:  # transformers would ignore the third
                raise ValueError(f"`{name}` as a list must be [height, width], got {shown(size)}.")
        try:
            return super()._standardize_kwargs(**kwargs)
        except (TypeError, ValueError) as error:  # of the sizes, the only settings that are converted
            names = " or ".join(f"`{name}`" for name in _SIZE_SETTINGS if kwargs.get(name) is not None)
            raise ValueError(f"{names} is no size of images: {error}") from error

    def _validate_preprocess_kwargs(self, **kwargs) -> None:
        _check_settings(kwargs)
        super()._validate_preprocess_kwargs(**kwargs)

    def _preprocess_image_like_inputs(
        self,
        images: ImageLike | Sequence[ImageLike],
        segmentation_maps: MapLike | Sequence[MapLike] | None = None,
        instance_id_to_semantic_id: Mapping[int, int] | Sequence[Mapping[int, int]] | None = None,
        **settings,
    ) -> BatchFeature:
        images = _as_list(images)
        if not images:
            raise ValueError("no images were given.")
        crop = _crop_size(settings)
        pixels, original_sizes, resized_sizes = [], [], []
        for index, image in enumerate(images):
            picture = self._read(image, index, **settings)
            original_sizes.append((picture.height, picture.width))
            picture = _resized(picture, settings)
            resized_sizes.append((picture.height, picture.width))
            pixels.append(_to_pixels(picture if crop is None else _center_crop(picture, crop), image, **settings))
        size = _padded_size([image.shape[-2:] for image in pixels], settings)
        data = _stack(pixels, size)
        data["original_sizes"] = torch.tensor(original_sizes if crop is None else [crop] * len(images))
        if segmentation_maps is not None:
            maps = read_segmentation_maps(segmentation_maps, original_sizes)
            maps = [place_segmentation_map(*pair, crop) for pair in zip(maps, resized_sizes, strict=True)]
            data |= mask_and_class_labels(
                maps, size, instance_id_to_semantic_id, settings["ignore_index"], settings["do_reduce_labels"]
            )
        if ChannelDimension(settings["data_format"] or "channels_first") is ChannelDimension.LAST:
            data["pixel_values"] = data["pixel_values"].movedim(1, -1)
        return as_batch(data, settings["return_tensors"], settings["device"])

    def _read(self, image: ImageLike, index: int, **settings) -> Image.Image:
        return read_image(
            image,
            settings["input_data_format"],
            name=f"image {index + 1} (index {index})",
            keep_channels=settings["do_convert_rgb"] is False,
        )


def _resized(image: Image.Image, settings: dict[str, Any]) -> Image.Image:
    if not settings["do_resize"]:
        return image
    height, width = resized_size((image.height, image.width), dict(settings["size"]))
    if (height, width) == (image.height, image.width):
        return image
    if image.mode != "RGBA":
        return image.resize((width, height), settings["resample"])
    # Band by band: Pillow would weigh the colors with the fourth channel.
    return Image.merge("RGBA", [band.resize((width, height), settings["resample"]) for band in image.split()])


def _crop_size(settings: dict[str, Any]) -> tuple[int, int] | None:
    """Height and width of the center crop; None without one."""
    if not settings["do_center_crop"]:
        return None
    size = dict(settings["crop_size"])
    if set(size) != {"height", "width"}:
        raise ValueError(f"`crop_size` needs 'height' and 'width', got {', '.join(size)}.")
    return _sides("crop_size", size)


def _sides(name: str, size: dict[str, Any]) -> tuple[int, int]:
    """Height and width of a setting that has both."""
    return tuple(check_whole_number(f"{name}['{side}']", size[side], 1, MAX_SIDE) for side in ("height", "width"))


def _center_crop(image: Image.Image, crop: tuple[int, int]) -> Image.Image:
    """The middle (height, width) of an image; zero beyond it."""
    top, left = ((side - cropped) // 2 for side, cropped in zip((image.height, image.width), crop, strict=True))
    return image.crop((left, top, left + crop[1], top + crop[0]))


def _to_pixels(picture: Image.Image, source: ImageLike, **settings) -> torch.Tensor:
    """A picture, normalised, fp32 (C, H, W); `source` is what it was read from."""
    values = np.array(picture)
    # Bytes are reordered, not floats: that is four times less to move.
    pixels = torch.from_numpy(values.reshape(*values.shape[:2], -1)).permute(2, 0, 1).contiguous().float()
    if settings["do_rescale"]:
        pixels *= settings["rescale_factor"]
    elif isinstance(source, np.ndarray | torch.Tensor) and "float" in str(source.dtype):
        pixels /= 255
    if settings["do_normalize"]:
        mean, std = (_per_channel(name, settings[name], len(pixels)) for name in ("image_mean", "image_std"))
        pixels = pixels.sub_(mean).div_(std)
    return pixels


def _per_channel(name: str, values: Any, num_channels: int) -> torch.Tensor:
    values = torch.as_tensor(values, dtype=torch.float32).reshape(-1)
    if len(values) not in (1, num_channels):
        raise ValueError(f"`{name}` gives {len(values)} numbers for images of {num_channels} channels.")
    return values.expand(num_channels)[:, None, None]


def _padded_size(sizes: list[tuple[int, int]], settings: dict[str, Any]) -> tuple[int, int]:
    """Height and width of the batch of images (height, width)."""
    largest = tuple(max(size[axis] for size in sizes) for axis in (0, 1))
    if not settings["do_pad"]:
        if len(set(sizes)) > 1:
            raise ValueError("images of different sizes make no batch without padding: leave `do_pad` on.")
        return largest
    if settings["pad_size"] is not None:
        asked = dict(settings["pad_size"])
        sides = _sides("pad_size", asked) if set(asked) == {"height", "width"} else (0, 0)
        if sides[0] < largest[0] or sides[1] < largest[1]:
            raise ValueError(f"`pad_size` must give a 'height' and 'width' of at least {largest}, got {asked}.")
        largest = sides
    divisor = max(settings["size_divisor"] or 1, 1)
    return tuple(-(-side // divisor) * divisor for side in largest)


def _stack(images: list[torch.Tensor], size: tuple[int, int]) -> dict[str, torch.Tensor]:
    """Images (C, H_i, W_i) in one batch, padded with zeros at the right and bottom, and where they are in it."""
    channels = {len(image) for image in images}
    if len(channels) > 1:
        raise ValueError(f"images of {sorted(channels)} channels make no batch: leave `do_convert_rgb` on.")
    pixel_values = torch.zeros(len(images), channels.pop(), *size)
    pixel_mask = torch.zeros(len(images), *size, dtype=torch.int64)
    for index, image in enumerate(images):
        pixel_values[index, :, : image.shape[1], : image.shape[2]] = image
        pixel_mask[index, : image.shape[1], : image.shape[2]] = 1
    return {"pixel_values": pixel_values, "pixel_mask": pixel_mask}


def _with_longest_edge(settings: dict[str, Any], default: Mapping[str, int]) -> dict[str, Any]:
    """Settings with `max_size`, the older name of the longest edge, as part of `size`."""
    if settings.get("max_size") is None:
        return settings
    settings = dict(settings)
    max_size, size = settings.pop("max_size"), settings.get("size")
    if size is None:
        size = {side: pixels for side, pixels in dict(default).items() if side != "longest_edge"}
    size = dict(size) if isinstance(size, Mapping) else {"shortest_edge": size}
    if set(size) != {"shortest_edge"} and size.get("longest_edge") != max_size:
        raise ValueError(f"`max_size` goes with `shortest_edge` alone: leave it away, or write it into `size` {size}.")
    return settings | {"size": size | {"longest_edge": max_size}}


def read_image(
    image: ImageLike,
    input_data_format: str | ChannelDimension | None = None,
    name: str = "image",
    timeout: float = URL_TIMEOUT_S,
    keep_channels: bool = False,
) -> Image.Image:
    """
    Any image as an upright 8-bit RGB picture; the kinds are those of `GKCImageProcessor`.

    Args:
        image: Path, URL, bytes of a file, PIL image, array or tensor.
        input_data_format: "channels_first" or "channels_last" of an array or tensor; None finds it out.
        name: What to call the image in errors, if it has no file name.
        timeout: Seconds that reading a URL may take in all; at most 256 MiB are read of it, and redirects lead to
            http and https only.
        keep_channels: Leave 8-bit grey and RGBA images as they are, instead of making them RGB.

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
        return _decode(image, input_data_format, timeout, _to_channels if keep_channels else to_rgb)
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
    resized = min(max(resized[0], 1), limit), min(max(resized[1], 1), limit)
    if resized[0] * resized[1] > MAX_PIXELS:
        raise ValueError(f"`size` {size} makes an image of {image_size} one of {resized}, too many pixels: lower it.")
    return resized


def _check_settings(settings: dict[str, Any]) -> None:
    """
    Refuse settings of the image processor that cannot be meant.

    Args:
        settings: By name, some of `GKCImageProcessorKwargs`; None stands for a default.

    Raises:
        ValueError: a setting has a wrong type, is not finite or lies outside its range; the message names it.
    """
    given = {name: value for name, value in settings.items() if value is not None}
    check_flags(**{name: value for name, value in given.items() if name.startswith("do_")})
    if "size" in given:
        _check_size(dict(given["size"]))
    if "max_size" in given:
        check_whole_number("max_size", given["max_size"], 1)
    if "ignore_index" in given:
        check_whole_number("ignore_index", given["ignore_index"])
    if "device" in given:
        _check_device(given["device"])
    if "rescale_factor" in given:
        check_number("rescale_factor", given["rescale_factor"], SMALLEST_SCALE)
    for name, low in (("image_mean", -math.inf), ("image_std", SMALLEST_SCALE)):
        if name in given:
            _check_channels(name, given[name], low, (1, 3) if given.get("do_convert_rgb", True) else (1, 3, 4))
    if "size_divisor" in given:
        check_whole_number("size_divisor", given["size_divisor"], 0)
    formats = {name: ChannelDimension for name in ("input_data_format", "data_format")}
    for name, kind in ({"resample": PILImageResampling} | formats).items():
        if name in given:
            try:
                kind(given[name])
            except ValueError as error:
                choices = ", ".join(repr(choice.value) for choice in kind)
                raise ValueError(f"`{name}` must be one of {choices}, got {shown(given[name])}.") from error


def _check_device(device: Any) -> None:
    try:
        torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"`device` must be a device such as 'cpu' or 'cuda', got {shown(device)}.") from error


def _check_available(device: str | torch.device | None) -> None:
    try:
        torch.empty(0, device=device)
    except (AssertionError, RuntimeError) as error:  # torch raises the former where it was built without the device
        reason = str(error).splitlines()[0].split(". ")[0].rstrip(".")
        raise ValueError(
            f"`device` {str(device)!r} is not available here ({reason}): leave it out for 'cpu'."
        ) from error


def _check_channels(name: str, value: Any, low: float, lengths: tuple[int, ...]) -> None:
    values = value.tolist() if isinstance(value, np.ndarray | torch.Tensor) else value
    values = values if isinstance(values, list | tuple) else [values]
    if len(values) not in lengths:
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
    if not isinstance(images, list | tuple):
        return [images]
    # Lists of the images of each text, as transformers' processors of images and text take them.
    return [image for entry in images for image in (entry if isinstance(entry, list | tuple) else [entry])]


def check_return_tensors(return_tensors: str | None) -> None:
    """
    Refuse a form of tensors that the processors do not give.

    Raises:
        ValueError: it is neither "pt" nor "np", nor None for lists.
    """
    if return_tensors not in (None, "pt", "np"):
        raise ValueError(f"`return_tensors` must be 'pt', 'np' or None, which gives lists; got {return_tensors!r}.")


def as_batch(
    data: dict[str, Any], return_tensors: str | None, device: str | torch.device | None = None
) -> BatchFeature:
    """
    Tensors, and lists of tensors, in the form that a processor's caller asks for.

    Args:
        data: Tensors by name. What is no tensor is left as it is.
        return_tensors: "pt" for tensors, "np" for arrays, None for lists, as transformers' processors give them: of
            arrays where an entry has more than two axes, else of numbers.
        device: Where the tensors go; of no effect on arrays and lists.

    Raises:
        ValueError: `return_tensors` is none of these, or there is no such device here.
    """
    check_return_tensors(return_tensors)
    if return_tensors == "pt":
        _check_available(device)
        return BatchFeature({name: _on_device(value, device) for name, value in data.items()})
    data = {name: _as_array(value) for name, value in data.items()}
    if return_tensors is None:
        data = {
            name: value if isinstance(value, list) else list(value) if value.ndim > 2 else value.tolist()
            for name, value in data.items()
        }
    return BatchFeature(data)


def _on_device(value: Any, device: str | torch.device | None) -> Any:
    if isinstance(value, list):
        return [_on_device(entry, device) for entry in value]
    return value.to(device) if device is not None and isinstance(value, torch.Tensor) else value


def _as_array(value: Any) -> Any:
    if isinstance(value, list):
        return [_as_array(entry) for entry in value]
    return value.cpu().numpy() if isinstance(value, torch.Tensor) else value


def _decode(
    image: ImageLike,
    input_data_format: str | ChannelDimension | None,
    timeout: float,
    convert: Callable[[Image.Image], Image.Image],
) -> Image.Image:
    if isinstance(image, np.ndarray | torch.Tensor):
        return convert(_from_array(image, input_data_format))
    if isinstance(image, Image.Image):
        return convert(image)
    if isinstance(image, str | os.PathLike | bytes):
        if convert is to_rgb:
            return open_rgb(_file_of(image, timeout))
        source = _file_of(image, timeout)
        with source if hasattr(source, "read") else open(source, "rb") as file, Image.open(file) as opened:
            return convert(opened)
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
    check_not_empty(values.shape[:2])
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


def _to_channels(image: Image.Image) -> Image.Image:
    """An upright image with its own 1, 3 or 4 channels of 8 bits; other kinds become RGB."""
    check_not_empty(image.size[::-1])
    keeps = image.mode in ("L", "RGB", "RGBA") and "transparency" not in image.info
    return ImageOps.exif_transpose(image) if keeps else to_rgb(image)


AutoImageProcessor.register(
    GKCConfig, image_processor_classes={"pil": GKCImageProcessor, "torchvision": GKCImageProcessor}, exist_ok=True
)

__all__ = ["GKCImageProcessor", "ImageLike", "as_batch", "check_return_tensors", "read_image", "resized_size"]
