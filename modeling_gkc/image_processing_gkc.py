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
"""`GKCImageProcessor`: decode, resize, normalize and pad images. All sizes are (height, width) in pixels."""

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
from PIL import Image, ImageOps, UnidentifiedImageError
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
from .mask_resampling import MASK_RESAMPLINGS
from .post_processing import PostProcessingMixin
from .remote_code import CodeSavingMixin
from .segmentation_maps import MapLike, mask_and_class_labels, place_segmentation_map, read_segmentation_maps

ImageLike = str | os.PathLike | bytes | Image.Image | np.ndarray | torch.Tensor

_URL_SCHEMES = ("http://", "https://", "data:")
URL_TIMEOUT_S = 30
MAX_URL_BYTES = 256 * 2**20
BYTES_PER_READ = 2**16
MAX_SIDE = 2**16
SMALLEST_SCALE = 1e-12  # a smaller divisor or factor is a mistake
_SIZE_SETTINGS = ("size", "crop_size", "pad_size")
_SIZE_KEYS = ({"shortest_edge"}, {"shortest_edge", "longest_edge"}, {"longest_edge"}, {"height", "width"})


class GKCImageProcessorKwargs(TypedDict, total=False):
    """Keyword arguments of `GKCImageProcessor`; a call may override each of them."""

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
    mask_resampling: str
    data_format: Any
    input_data_format: Any
    device: Any
    disable_grouping: Any
    return_tensors: Any


class GKCImageProcessor(CodeSavingMixin, PostProcessingMixin, PilBackend):
    """Image processor that prepares images for GKC and post-processes the model's outputs.

    An image is a path, URL (http, https or data), the bytes of a file, a PIL image, an array or a tensor; several
    images are a list, or an array with a batch axis. Images are rotated by their EXIF orientation; of an animation
    the first frame is used; gray, palette, CMYK and other modes are converted to RGB, transparent pixels are blended
    with white, and 16-bit values are scaled to 8 bits. Arrays and tensors have 1, 3 (RGB) or 4 (RGBA) channels or no
    channel axis, and hold booleans, 8-bit integers (or wider types with values in 0..255), 16-bit unsigned integers
    in 0..65535, or floats in 0..1, with a tolerance of 1e-5. The channel axis is inferred from its length; if both
    ends fit, arrays are read as channels last and tensors as channels first, unless `input_data_format`
    ("channels_first" or "channels_last") is given.

    Args:
        do_convert_rgb: Whether to convert every image to RGB, as the model needs it. If False, gray and RGBA images
            keep their 1 or 4 channels.
        do_resize: Whether to resize to `size`.
        size: `{"shortest_edge", "longest_edge"}` preserves the aspect ratio: the shorter side becomes
            `shortest_edge` pixels unless the longer side would exceed `longest_edge` (either may be given alone).
            `{"height", "width"}` does not preserve it. Default: 800 and 1333, the values of detectron2 with which the
            published numbers of GKC (Han, Liu et al., ICCV 2023) were measured. A single number is `shortest_edge`.
        max_size: Deprecated name of `size["longest_edge"]`, as in `size=42, max_size=84`.
        default_to_square: Whether a single number as `size` is both sides of a square.
        resample: Resampling filter, a `PIL.Image.Resampling`. Default: bilinear.
        do_center_crop: Whether to crop `crop_size` from the center after resizing; pixels outside of the image are
            zero.
        crop_size: `{"height", "width"}` of the center crop in pixels, or the side of a square.
        do_rescale: Whether to multiply 8-bit values by `rescale_factor`. If False, floats in 0..1 keep their range.
        rescale_factor: Factor of `do_rescale`. Default: 1 / 255.
        do_normalize: Whether to subtract `image_mean` and divide by `image_std`.
        image_mean: Mean of each channel, for values in 0..1. Default: that of ImageNet.
        image_std: Standard deviation of each channel, for values in 0..1. Default: that of ImageNet.
        do_pad: Whether to pad with zeros at the right and bottom, after normalization.
        pad_size: `{"height", "width"}` to pad to. Default: the largest sides of the batch.
        size_divisor: Number of pixels of which both padded sides are multiples. Default: 32, the backbone's stride.
        ignore_index: Value of pixels of `segmentation_maps` that belong to no class; if None, every value is a class.
        do_reduce_labels: Whether value 0 of `segmentation_maps` means "no class" and all other values are reduced by
            one, as for ADE20K; needs `ignore_index`.
        mask_resampling: How post-processing brings masks to the target size. `direct`, the default, resamples the
            model's masks once. `two_step` resamples them to the pixels of the padded input first, `two_step_scores`
            computes the scores of semantic maps at those pixels and resamples the scores. The published numbers of
            Mask2Former and FC-CLIP were measured in these two ways, the latter on semantic benchmarks; results
            differ along outlines.
        data_format: "channels_last" returns `pixel_values` as (B, H, W, 3), which the model does not accept.
        device: Device of the tensors of `return_tensors="pt"`; images are always processed on the CPU.
        disable_grouping: Accepted for compatibility with torchvision processors and ignored; images are processed
            one by one.
        return_tensors: "pt" or "np"; if None, each entry is a list with an array for each image, as in transformers.

    Raises:
        ValueError: If an image cannot be read, is empty, or has values outside of its range; the message names the
            file or the position in the batch.
        FileNotFoundError: If a path does not exist.
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
    mask_resampling = "direct"

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
        """Prepare images, and for training their segmentation maps, for the model.

        Args:
            images: One image or a batch of B images.
            segmentation_maps: For each image a map (H, W) of the size of the upright image with the class or instance
                id of every pixel: a PIL image, array, tensor, path, or the bytes of a file.
            instance_id_to_semantic_id: Class of each value of the maps, one dict for all images or one for each.
                Default: the values are class ids.
            kwargs: Arguments of the class for this call.

        Returns:
            `pixel_values` (B, 3, H, W), `pixel_mask` (B, H, W), 1 inside the image and 0 in the padding, and
            `original_sizes` (B, 2), (height, width) in pixels of the upright images (with `do_center_crop`: of the
            crops), for the `target_sizes` of post-processing. With maps also two lists of length B: `mask_labels`,
            (N, H, W) masks of 0 and 1, and `class_labels`, (N,) class ids. They equal those of transformers'
            Mask2Former except that masks are 0 in the padding.

        Raises:
            ValueError: If an argument or image is invalid (see the class), or if a map differs in size from its
                image, holds values that are not integers, or holds a value without an entry in
                `instance_id_to_semantic_id`. The message names the position in the batch.
        """
        # Checked before transformers checks the types, because its error is not a ValueError.
        _check_settings({name: value for name, value in kwargs.items() if name not in _SIZE_SETTINGS})
        for name, value in kwargs.items():
            if value is None and name.startswith("do_"):
                raise ValueError(f"`{name}` must be True or False, got None: leave it out for the processor's own.")
        kwargs = _with_longest_edge(kwargs, self.size)
        # Positional, because transformers 5.17 has no `image_like_kwargs`.
        return super().preprocess(images, segmentation_maps, instance_id_to_semantic_id, **kwargs)

    def _standardize_kwargs(self, **kwargs) -> dict[str, Any]:
        for name in _SIZE_SETTINGS:
            size = kwargs.get(name)
            if isinstance(size, list | tuple) and len(size) != 2:  # transformers would ignore the third
                raise ValueError(f"`{name}` as a list must be [height, width], got {shown(size)}.")
        try:
            return super()._standardize_kwargs(**kwargs)
        except (TypeError, ValueError) as error:  # from the sizes, the only arguments that are converted
            names = " or ".join(f"`{name}`" for name in _SIZE_SETTINGS if kwargs.get(name) is not None)
            raise ValueError(f"{names} is not a valid image size: {error}") from error

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
            raise ValueError("`images` is empty: give at least one image.")
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
    # Band by band, because Pillow would weight the colors by the alpha channel.
    return Image.merge("RGBA", [band.resize((width, height), settings["resample"]) for band in image.split()])


def _crop_size(settings: dict[str, Any]) -> tuple[int, int] | None:
    """Return (height, width) of the center crop, or None if images are not cropped."""
    if not settings["do_center_crop"]:
        return None
    size = dict(settings["crop_size"])
    if set(size) != {"height", "width"}:
        raise ValueError(f"`crop_size` needs 'height' and 'width', got {', '.join(size)}.")
    return _sides("crop_size", size)


def _sides(name: str, size: dict[str, Any]) -> tuple[int, int]:
    """Check a size with the keys "height" and "width", and return (height, width)."""
    return tuple(check_whole_number(f"{name}['{side}']", size[side], 1, MAX_SIDE) for side in ("height", "width"))


def _center_crop(image: Image.Image, crop: tuple[int, int]) -> Image.Image:
    """Crop (height, width) pixels from the center of an image; pixels outside of it are zero."""
    top, left = ((side - cropped) // 2 for side, cropped in zip((image.height, image.width), crop, strict=True))
    return image.crop((left, top, left + crop[1], top + crop[0]))


def _to_pixels(picture: Image.Image, source: ImageLike, **settings) -> torch.Tensor:
    """Rescale and normalize an image to fp32 (C, H, W); `source` is the input that it was read from."""
    values = np.array(picture)
    # The axes are permuted before the conversion to fp32, which moves a quarter of the bytes.
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
        raise ValueError(f"`{name}` must have 1 or {num_channels} numbers, one per channel, got {len(values)}.")
    return values.expand(num_channels)[:, None, None]


def _padded_size(sizes: list[tuple[int, int]], settings: dict[str, Any]) -> tuple[int, int]:
    """Return the padded (height, width) of a batch of images with the given sizes."""
    largest = tuple(max(size[axis] for size in sizes) for axis in (0, 1))
    if not settings["do_pad"]:
        if len(set(sizes)) > 1:
            raise ValueError("Images of different sizes cannot form a batch without padding: set `do_pad=True`.")
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
    """Stack images (C, H_i, W_i) into `pixel_values` padded at the right and bottom, and compute `pixel_mask`."""
    channels = {len(image) for image in images}
    if len(channels) > 1:
        raise ValueError(f"Images with {sorted(channels)} channels cannot form a batch: set `do_convert_rgb=True`.")
    pixel_values = torch.zeros(len(images), channels.pop(), *size)
    pixel_mask = torch.zeros(len(images), *size, dtype=torch.int64)
    for index, image in enumerate(images):
        pixel_values[index, :, : image.shape[1], : image.shape[2]] = image
        pixel_mask[index, : image.shape[1], : image.shape[2]] = 1
    return {"pixel_values": pixel_values, "pixel_mask": pixel_mask}


def _with_longest_edge(settings: dict[str, Any], default: Mapping[str, int]) -> dict[str, Any]:
    """Move `max_size`, the deprecated name of the longest edge, into `size`."""
    if settings.get("max_size") is None:
        return settings
    settings = dict(settings)
    max_size, size = settings.pop("max_size"), settings.get("size")
    if size is None:
        size = {side: pixels for side, pixels in dict(default).items() if side != "longest_edge"}
    size = dict(size) if isinstance(size, Mapping) else {"shortest_edge": size}
    if set(size) != {"shortest_edge"} and size.get("longest_edge") != max_size:
        raise ValueError(
            f"`max_size` can only be combined with `shortest_edge`: remove it, or set it in `size`, which is {size}."
        )
    return settings | {"size": size | {"longest_edge": max_size}}


def read_image(
    image: ImageLike,
    input_data_format: str | ChannelDimension | None = None,
    name: str = "image",
    timeout: float = URL_TIMEOUT_S,
    keep_channels: bool = False,
) -> Image.Image:
    """Read an image of any kind that `GKCImageProcessor` accepts as an upright 8-bit RGB image.

    Args:
        image: Path, URL, bytes of a file, PIL image, array or tensor.
        input_data_format: "channels_first" or "channels_last", the layout of an array or tensor. Default: inferred.
        name: Name of the image in error messages, if it has no file name.
        timeout: Maximum time in seconds of reading a URL. At most 256 MiB are read, and only redirects to http and
            https are followed.
        keep_channels: Whether 8-bit gray and RGBA images keep their channels instead of being converted to RGB.

    Returns:
        The decoded image in mode "RGB", or with `keep_channels` in mode "L" or "RGBA".

    Raises:
        ValueError: If the image cannot be read, is empty, or has values outside of its range; the message names the
            file, or `name`.
        FileNotFoundError: If the path does not exist.
        TypeError: If `image` has another type, or is an array of a non-numeric type.
    """
    if isinstance(image, str | os.PathLike):
        name = str(image) if len(str(image)) < 500 else f"{str(image)[:60]}..."
    elif getattr(image, "filename", None):
        name = f"{image.filename}"
    try:
        return _decode(image, input_data_format, timeout, _to_channels if keep_channels else to_rgb)
    except FileNotFoundError:
        raise
    except UnidentifiedImageError as error:  # its message repeats the file, or shows the address of a buffer
        raise ValueError(f"{name}: cannot be read as an image: its format is unknown") from error
    except TypeError as error:
        # Pillow's decoders raise TypeErrors for damaged files.
        if isinstance(image, str | os.PathLike | bytes | Image.Image):
            raise ValueError(f"{name}: cannot be read as an image: {error}") from error
        raise TypeError(f"{name}: {error}") from error
    except Exception as error:  # Pillow's decoders raise errors of many types
        raise ValueError(f"{name}: cannot be read as an image: {error}") from error


def resized_size(image_size: tuple[int, int], size: dict[str, int]) -> tuple[int, int]:
    """Compute the size that an image is resized to.

    Args:
        image_size: (height, width) of the image in pixels.
        size: Target size as in `GKCImageProcessor`.

    Returns:
        (height, width) in pixels, each at least 1. With `shortest_edge` they equal those of transformers' image
        processors, which may round down, and never exceed `longest_edge`.

    Raises:
        ValueError: If `size` is invalid.
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
    """Check arguments of the image processor.

    Args:
        settings: Arguments by name, a subset of `GKCImageProcessorKwargs`; None means the default.

    Raises:
        ValueError: If an argument has a wrong type, is not finite or is outside of its range; the message names it.
    """
    given = {name: value for name, value in settings.items() if value is not None}
    check_flags(**{name: value for name, value in given.items() if name.startswith("do_")})
    if "size" in given:
        _check_size(dict(given["size"]))
    if "max_size" in given:
        check_whole_number("max_size", given["max_size"], 1)
    if "ignore_index" in given:
        check_whole_number("ignore_index", given["ignore_index"])
    if given.get("mask_resampling", "direct") not in MASK_RESAMPLINGS:
        choices = ", ".join(MASK_RESAMPLINGS)
        raise ValueError(f"`mask_resampling` must be one of {choices}, got {shown(given['mask_resampling'])}.")
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
        raise ValueError(f"`{name}` must be one number or one number per channel (3), got {shown(value)}.")
    for number in values:
        check_number(name, number, low)


def _check_size(size: dict[str, int]) -> None:
    if set(size) not in _SIZE_KEYS:
        raise ValueError(
            "`size` needs the keys 'shortest_edge' and/or 'longest_edge', or 'height' and 'width'; got "
            + ", ".join(size)
            + "."
        )
    for side, pixels in size.items():
        check_whole_number(f"size['{side}']", pixels, 1, MAX_SIDE if side in ("height", "width") else 2**31 - 1)


def _as_list(images: ImageLike | Sequence[ImageLike]) -> list[ImageLike]:
    if isinstance(images, np.ndarray | torch.Tensor):
        return list(images) if images.ndim == 4 else [images]
    if not isinstance(images, list | tuple):
        return [images]
    # Nested lists: transformers' processors of images and text take the images of each text as a list.
    return [image for entry in images for image in (entry if isinstance(entry, list | tuple) else [entry])]


def check_return_tensors(return_tensors: str | None) -> None:
    """Check that `return_tensors` is "pt", "np" or None.

    Raises:
        ValueError: If it is anything else.
    """
    if return_tensors not in (None, "pt", "np"):
        raise ValueError(f"`return_tensors` must be 'pt', 'np' or None (lists), got {return_tensors!r}.")


def as_batch(
    data: dict[str, Any], return_tensors: str | None, device: str | torch.device | None = None
) -> BatchFeature:
    """Convert tensors, and lists of tensors, to the type that `return_tensors` names.

    Args:
        data: Tensors by name; other values are kept unchanged.
        return_tensors: "pt" for tensors, "np" for arrays, None for lists as in transformers' processors: lists of
            arrays for entries with more than two axes, else of numbers.
        device: Device of the tensors; ignored for arrays and lists.

    Returns:
        The converted entries as a `BatchFeature`.

    Raises:
        ValueError: If `return_tensors` is unknown, or the device does not exist.
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
    raise TypeError(f"an image must be a path, URL, bytes, PIL image, array or tensor, got {type(image).__name__}.")


def _file_of(image: str | os.PathLike | bytes, timeout: float) -> str | os.PathLike | BinaryIO:
    if isinstance(image, bytes):
        return io.BytesIO(image)
    if isinstance(image, str) and image.startswith(_URL_SCHEMES):
        return io.BytesIO(_download_in_time(image, timeout))
    return image


class _WebRedirects(HTTPRedirectHandler):
    """Redirect handler for http and https only; urllib's default would also follow redirects to ftp."""

    def redirect_request(self, req, fp, code, msg, headers, newurl):
        """Create the request of the next redirect."""
        if not newurl.lower().startswith(("http://", "https://")):
            raise ValueError(f"the URL redirects to {newurl[:200]!r}, which is neither http nor https.")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def urlopen(request: Request, timeout: float) -> Any:
    """Open a URL with urllib, following redirects to http and https only."""
    return build_opener(_WebRedirects).open(request, timeout=timeout)


def _download_in_time(url: str, timeout: float) -> bytes:
    """Download a URL in a thread, so that a slow response header counts towards the timeout too.

    Raises:
        ValueError: As in `_download`.
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
        raise ValueError(f"the download took longer than {timeout:g} s: set a longer `timeout`.")
    if isinstance(answers[0], Exception):
        raise answers[0]
    return answers[0]


def _download(url: str, timeout: float) -> bytes:
    """Download a URL.

    Raises:
        ValueError: If the response is larger than `MAX_URL_BYTES`, incomplete, or takes longer than `timeout` seconds.
    """
    deadline = time.monotonic() + timeout
    parts, size = [], 0
    # Some servers reject clients without a user agent.
    with urlopen(Request(url, headers={"User-Agent": "gkc"}), timeout=timeout) as response:
        # `read1` returns the bytes received so far; `read` would block until all of them have arrived.
        read = getattr(response, "read1", None) or response.read
        while part := read(BYTES_PER_READ):
            size += len(part)
            parts.append(part)
            if size > MAX_URL_BYTES:
                raise ValueError(
                    f"the file at the URL is larger than {MAX_URL_BYTES // 2**20} MiB: download it and give its path."
                )
            if time.monotonic() > deadline:
                raise ValueError(f"the download took longer than {timeout:g} s: set a longer `timeout`.")
        if missing := getattr(response, "length", None):
            raise ValueError(f"the download ended {missing} bytes early: try again.")
    return b"".join(parts)


def _from_array(image: np.ndarray | torch.Tensor, input_data_format: str | ChannelDimension | None) -> Image.Image:
    if isinstance(image, torch.Tensor):
        image = image.detach().cpu()
        values = (image.float() if image.is_floating_point() else image).numpy()
        preferred = ChannelDimension.FIRST
    else:
        values, preferred = image, ChannelDimension.LAST
    if values.ndim not in (2, 3):
        raise ValueError(f"an array must have 2 or 3 axes, got the shape {values.shape}.")
    if values.ndim == 3:
        data_format = ChannelDimension(input_data_format or _channel_axis(values.shape, preferred))
        values = np.moveaxis(values, 0, -1) if data_format is ChannelDimension.FIRST else values
        if values.shape[-1] not in (1, 3, 4):
            raise ValueError(f"an image must have 1, 3 or 4 channels, got {values.shape[-1]} ({data_format.value}).")
    check_not_empty(values.shape[:2])
    values = np.ascontiguousarray(_to_8_bits(values))
    return Image.fromarray(values[..., 0] if values.shape[2:] == (1,) else values)


def _channel_axis(shape: tuple[int, ...], preferred: ChannelDimension) -> ChannelDimension:
    """Infer the channel axis: the first or last axis with length 3 or 4, else 1; `preferred` if both qualify."""
    for lengths in ((3, 4), (1,)):
        fits_first, fits_last = shape[0] in lengths, shape[-1] in lengths
        if fits_first and fits_last:
            return preferred
        if fits_first or fits_last:
            return ChannelDimension.FIRST if fits_first else ChannelDimension.LAST
    raise ValueError(f"neither the first nor the last axis of the shape {shape} has 1, 3 or 4 channels.")


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
    raise TypeError(f"an image must have boolean, integer or float values, got {values.dtype}.")


def _to_channels(image: Image.Image) -> Image.Image:
    """Rotate an 8-bit image with 1, 3 or 4 channels upright; convert other kinds to upright RGB."""
    check_not_empty(image.size[::-1])
    keeps = image.mode in ("L", "RGB", "RGBA") and "transparency" not in image.info
    return ImageOps.exif_transpose(image) if keeps else to_rgb(image)


AutoImageProcessor.register(
    GKCConfig, image_processor_classes={"pil": GKCImageProcessor, "torchvision": GKCImageProcessor}, exist_ok=True
)

__all__ = ["GKCImageProcessor", "ImageLike", "as_batch", "check_return_tensors", "read_image", "resized_size"]
