"""Folder of images and masks, with a JSON file of class names.

    DIR/images/a.jpg          DIR/masks/a.png           DIR/names.json
    DIR/train/images/a.jpg    DIR/train/masks/a.png     DIR/names.json           (common on Kaggle)
    DIR/img_dir/train/a.jpg   DIR/ann_dir/train/a.png   DIR/names.json           (mmsegmentation)

Masks have the same path without suffix as their images, optionally with `_mask` appended. Folders named train, val and
test are the splits. Mask pixels are class numbers (gray, palette or 16-bit images) or, if the keys of `names.json` are
colors, class colors. `names.json` defines their classes:

    {"1": "cat", "2": ["dog", "puppy"], "0": null}    numbers; further names are synonyms; null is void
    ["background", "cat", "dog"]                      names of the numbers 0, 1, 2
    {"#ff0000": "cat", "0,128,0": "dog"}              colors, as #rrggbb or red,green,blue

0 and 255, or black and white, are void unless they have a name. Other values must have a name.
"""

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from modeling_gkc.vocabulary import Vocabulary

from ...storage.checksums import read_json
from ..schema import VOID, decode_ids, ids_within
from ..sources import (
    AnnotatedImage,
    Segmentation,
    Source,
    annotated_shape,
    files_of_splits,
    folder_pairs,
    split_of_folders,
    upright,
)

IMAGE_FOLDERS = ("images", "image", "imgs", "img", "JPEGImages", "img_dir")
MASK_FOLDERS = ("masks", "mask", "labels", "annotations", "SegmentationClass", "ann_dir")
NAMES_FILE = "names.json"
_MASK_ENDING = "_mask"
_ALWAYS_VOID = {False: (0, 255), True: (0, 2**24 - 1)}  # numbers and colors that are void by default


@dataclass(frozen=True)
class MaskNames:
    """Mapping from the pixel values of masks to classes.

    Attributes:
        file: Name of the file of names, for error messages.
        classes: Position of the class of each pixel value, -1 for void. The value of a color is its id.
        by_color: Whether the values are ids of colors.
    """

    file: str
    classes: Mapping[int, int]
    by_color: bool

    def shown(self, values: Collection[int]) -> str:
        """Format values like the keys of the file of names."""
        return ", ".join(
            f"#{value & 255:02x}{value >> 8 & 255:02x}{value >> 16:02x}" if self.by_color else str(value)
            for value in values
        )


@dataclass(frozen=True)
class MaskFolder:
    """Folders of images and masks of each split ("" for no split), and the file of names."""

    images: Mapping[str, Path]
    masks: Mapping[str, Path]
    names: Path


def find_mask_folder(folder: Path) -> MaskFolder | None:
    """Return the folders of images and masks and the file of names, or None for another layout."""
    pairs = folder_pairs(folder, IMAGE_FOLDERS, MASK_FOLDERS)
    places = [folder, *(folder / name for name in pairs)]
    names = next((place / NAMES_FILE for place in places if (place / NAMES_FILE).is_file()), None)
    if not pairs or names is None:
        return None
    images, masks = ({name: pair[side] for name, pair in pairs.items()} for side in (0, 1))
    return MaskFolder(images, masks, names)


def read_mask_folder(found: MaskFolder, instances: Collection[str] = ()) -> Source:
    """Find the images of a folder of images and masks.

    Args:
        found: Folders of images and masks, and the file of names.
        instances: Labels of classes whose connected components are separate segments. All pixels of another class in
            an image are one segment.

    Raises:
        ValueError: If the names cannot be read, or an instance class is not one of them.
    """
    names, vocabulary = read_names(found.names)
    unknown = sorted(set(instances) - set(vocabulary.labels))
    if unknown:
        raise ValueError(f"{found.names} has no class {unknown}; it has {vocabulary.labels}.")
    if instances:
        vocabulary = Vocabulary(vocabulary.names, is_thing=[label in instances for label in vocabulary.labels])
    things = {index for index, label in enumerate(vocabulary.labels) if label in instances}
    image_paths, mask_paths = files_of_splits(found.images), files_of_splits(found.masks)
    for name in [name for name in mask_paths if name not in image_paths and name.endswith(_MASK_ENDING)]:
        bare = name.removesuffix(_MASK_ENDING)
        if bare in image_paths and bare not in mask_paths:
            mask_paths[bare] = mask_paths.pop(name)
    folders = ", ".join(f"{images} and {found.masks[name]}" for name, images in found.images.items())
    alone = sorted(image_paths.keys() - mask_paths.keys()), sorted(mask_paths.keys() - image_paths.keys())
    problems = [f"{image_paths[name]}: No mask has this name" for name in alone[0]]
    problems += [f"{mask_paths[name]}: No image has this name" for name in alone[1]]
    images = [
        AnnotatedImage(name, path, partial(read_mask, mask_paths[name], names, things, path), split_of_folders(name))
        for name, path in image_paths.items()
        if name in mask_paths
    ]
    kind = "colors" if names.by_color else "numbers"
    return Source(vocabulary, images, problems, f"images and masks whose {kind} {found.names.name} names: {folders}")


def read_names(path: Path) -> tuple[MaskNames, Vocabulary]:
    """Read the mapping of pixel values and the vocabulary from a file of names.

    Raises:
        ValueError: If the file does not have the format in the description of this module.
    """
    entries = _entries(path)
    colors = [isinstance(key, str) and not key.strip().lstrip("-").isdigit() for key in entries]
    if len(set(colors)) > 1:
        raise ValueError(f"{path}: The keys must be all numbers or all colors, got {list(entries)[:6]}.")
    by_color = bool(colors and colors[0])
    named: dict[int, int] = {}
    names: list[list[str]] = []
    for key, entry in entries.items():
        value = _value(key, path)
        if value in named:
            raise ValueError(f'{path}, key "{key}": Another key names the same pixels.')
        if entry is None:
            named[value] = -1
            continue
        words = entry if isinstance(entry, list) else [entry]
        if not words or not all(isinstance(word, str) for word in words):
            raise ValueError(f'{path}, key "{key}": give a name, a list of names, or null; got {entry!r}.')
        # Two values may stand for one class.
        named[value] = names.index(words) if words in names else len(names)
        names += [] if words in names else [words]
    try:
        return MaskNames(path.name, dict.fromkeys(_ALWAYS_VOID[by_color], -1) | named, by_color), Vocabulary(names)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _entries(path: Path) -> dict[Any, Any]:
    content = read_json(path, unique_keys=True)
    if isinstance(content, list):
        return dict(enumerate(content))
    if not isinstance(content, dict) or not content:
        raise ValueError(f'{path}: give an object such as {{"1": "cat"}}, or a list of names.')
    return content


def _value(key: int | str, path: Path) -> int:
    """Return the pixel value of a key; the value of a color is its id."""
    text = str(key).strip()
    if re.fullmatch(r"\d+", text) and int(text) < 2**16:
        return int(text)
    if re.fullmatch(r"#[0-9a-fA-F]{6}", text):
        return int(decode_ids(np.array(list(bytes.fromhex(text[1:])), dtype=np.uint8)))
    parts = [part.strip(" ()[]") for part in text.split(",")]
    if len(parts) == 3 and all(part.isdigit() and int(part) < 256 for part in parts):
        return int(decode_ids(np.array([int(part) for part in parts], dtype=np.uint8)))
    raise ValueError(
        f'{path}, key "{key}": The key must be a number 0..65535, or a color as #rrggbb or red,green,blue.'
    )


def read_mask(
    path: Path, names: MaskNames, things: Collection[int], image: Path, shape: tuple[int, int]
) -> Segmentation:
    """Read the segments of a mask.

    Args:
        path: Mask file.
        names: Mapping from pixel values to classes.
        things: Positions of the classes whose connected components are separate segments.
        image: Image file, whose EXIF orientation is applied to a mask of the stored pixels.
        shape: Height and width of the upright image.

    Raises:
        ValueError: If the mask is invalid.
        OSError: If the mask cannot be read.
    """
    pixels = mask_values(path, names)
    annotated_shape(pixels.shape, shape, image, str(path))
    pixels = upright(pixels, shape, image)
    present = ids_within(pixels)
    unknown = [value for value in present.tolist() if value not in names.classes]
    if unknown:
        raise ValueError(
            f"{path}: The values [{names.shown(unknown[:10])}] have no name in {names.file} (null there makes them "
            "void)"
        )
    values = np.array([names.classes[value] for value in present.tolist()])
    classes = values[np.searchsorted(present, pixels)]
    ids, segments = np.full(shape, VOID, dtype=np.int32), []
    for category in sorted(set(classes.ravel().tolist()) - {-1}):
        for region in _regions(classes == category, split=category in things):
            segments.append({"id": len(segments) + 1, "category_id": category, "iscrowd": False})
            ids[region] = len(segments)
    return ids, segments


def mask_values(path: Path, names: MaskNames) -> np.ndarray:
    """Read the values (H, W) int32 of an upright mask, or the ids of its colors if the names have color keys.

    Raises:
        ValueError: If the image format of the mask does not fit the names.
    """
    with Image.open(path) as image:
        if image.format in ("JPEG", "MPO"):
            raise ValueError(f"{path}: A mask is stored as JPEG, which changes its values: save masks as PNG")
        mode, image = image.mode, ImageOps.exif_transpose(image)
        if names.by_color:
            if mode not in ("1", "L", "P", "RGB", "RGBA"):
                raise ValueError(f"{path}: {names.file} names colors, but the mask is an image of mode {mode}")
            return decode_ids(np.asarray(image.convert("RGB")))
        if mode in ("RGB", "RGBA"):
            raise ValueError(
                f"{path}: {names.file} names numbers, but the mask is a color image: save it in gray or with a "
                'palette, or write the keys as colors, such as "#ff0000"'
            )
        if mode not in ("1", "L", "P", "I", "I;16", "I;16B"):
            raise ValueError(f"{path}: A mask is a gray, palette, 16-bit or RGB image, not of mode {mode}")
        return np.asarray(image).astype(np.int32)


def _regions(mask: np.ndarray, split: bool) -> list[np.ndarray]:
    """Return the mask, or its 8-connected components."""
    if not split:
        return [mask]
    from scipy import ndimage

    labels, number = ndimage.label(mask, structure=np.ones((3, 3)))
    return [labels == component for component in range(1, number + 1)]
