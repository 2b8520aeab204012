"""A folder of images and masks, and a JSON of names, as training data.

    DIR/images/a.jpg    DIR/masks/a.png    DIR/names.json

Masks have the same path without suffix as their images. Folders named train and val within images and masks are the
splits. A pixel of a mask is the number of its class (grey, palette or 16-bit pictures) or its colour (RGB);
`names.json` says what these mean:

    {"1": "cat", "2": ["dog", "puppy"], "0": null}    numbers; further names are synonyms; null is void
    ["background", "cat", "dog"]                      the names of 0, 1, 2
    {"#ff0000": "cat", "0,128,0": "dog"}              colours, as #rrggbb or red,green,blue

0 and 255, or black and white, are void if they have no name. Other values without a name are refused.
"""

import json
import re
from collections.abc import Collection, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from modeling_gkc.vocabulary import Vocabulary

from .pictures import Picture, Segmentation, Source, first_folder, image_files, split_named
from .schema import VOID, decode_ids, ids_within

IMAGE_FOLDERS = ("images", "image", "imgs", "img", "JPEGImages")
MASK_FOLDERS = ("masks", "mask", "labels", "annotations", "SegmentationClass")
NAMES_FILE = "names.json"
_ALWAYS_VOID = {False: (0, 255), True: (0, 2**24 - 1)}  # of numbers, of colours


def find_mask_folder(folder: Path) -> tuple[Path, Path, Path] | None:
    """Folders of images and masks and the file of names, if the folder is laid out so."""
    images, masks, names = first_folder(folder, IMAGE_FOLDERS), first_folder(folder, MASK_FOLDERS), folder / NAMES_FILE
    return (images, masks, names) if images and masks and names.is_file() else None


def read_mask_folder(images: Path, masks: Path, names: Path, instances: Collection[str] = ()) -> Source:
    """Find the pictures of such a folder.

    Args:
        images: folder of the images.
        masks: folder of the masks.
        names: file of the names.
        instances: labels of classes whose connected components are segments of their own; of the others, all pixels of
            a class in an image are one segment.

    Raises:
        ValueError: the names cannot be read, or an instance class is not among them; the file is named.
    """
    values, vocabulary = read_names(names)
    unknown = sorted(set(instances) - set(vocabulary.labels))
    if unknown:
        raise ValueError(f"{names} has no class {unknown}; it has {vocabulary.labels}.")
    if instances:
        vocabulary = Vocabulary(vocabulary.names, is_thing=[label in instances for label in vocabulary.labels])
    things = {index for index, label in enumerate(vocabulary.labels) if label in instances}
    image_paths, mask_paths = image_files(images), image_files(masks)
    alone = sorted(image_paths.keys() - mask_paths.keys()), sorted(mask_paths.keys() - image_paths.keys())
    problems = [f"{image_paths[name]}: there is no mask of this name in {masks}" for name in alone[0]]
    problems += [f"{mask_paths[name]}: there is no image of this name in {images}" for name in alone[1]]
    pictures = [
        Picture(name, path, partial(read_mask, mask_paths[name], names.name, values, things), split_named(name))
        for name, path in image_paths.items()
        if name in mask_paths
    ]
    return Source(vocabulary, pictures, problems)


def read_names(path: Path) -> tuple[dict[int, int], Vocabulary]:
    """Positions of classes by the value of a pixel, -1 for void, and the vocabulary; a colour's value is its id.

    Raises:
        ValueError: the file is not as described at the top of this module; file and line or key are named.
    """
    entries = _entries(path)
    colours = [isinstance(key, str) and not key.strip().lstrip("-").isdigit() for key in entries]
    if len(set(colours)) > 1:
        raise ValueError(f"{path}: the keys must be all numbers or all colours, got {list(entries)[:6]}.")
    values, names = dict.fromkeys(_ALWAYS_VOID[bool(colours and colours[0])], -1), []
    for key, entry in entries.items():
        value = _value(key, path)
        if entry is None:
            values[value] = -1
            continue
        words = entry if isinstance(entry, list) else [entry]
        # Two values may stand for one class.
        values[value] = names.index(words) if words in names else len(names)
        names += [] if words in names else [words]
    try:
        return values, Vocabulary(names)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _entries(path: Path) -> dict[Any, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}, line {error.lineno}: this is no JSON: {error.msg}.") from error
    if isinstance(content, list):
        return dict(enumerate(content))
    if not isinstance(content, dict) or not content:
        raise ValueError(f'{path}: give an object such as {{"1": "cat"}}, or a list of names.')
    return content


def _value(key: int | str, path: Path) -> int:
    """The number of a key, a colour's being its id."""
    text = str(key).strip()
    if re.fullmatch(r"\d+", text) and int(text) < 2**16:
        return int(text)
    if re.fullmatch(r"#[0-9a-fA-F]{6}", text):
        return int(decode_ids(np.array(list(bytes.fromhex(text[1:])), dtype=np.uint8)))
    parts = [part.strip(" ()[]") for part in text.split(",")]
    if len(parts) == 3 and all(part.isdigit() and int(part) < 256 for part in parts):
        return int(decode_ids(np.array([int(part) for part in parts], dtype=np.uint8)))
    raise ValueError(f'{path}, key "{key}": it must be a number 0..65535, or a colour as #rrggbb or red,green,blue.')


def read_mask(
    path: Path, names: str, values: Mapping[int, int], things: Collection[int], shape: tuple[int, int]
) -> Segmentation:
    """The segments of a mask.

    Args:
        path: of the mask.
        names: name of the file of names, for errors.
        values: as `read_names` gives them.
        things: positions of the classes whose connected components are segments of their own.
        shape: height and width that it must have.

    Raises:
        ValueError, OSError: it cannot be used; the file is named.
    """
    pixels = mask_values(path)
    if pixels.shape != shape:
        raise ValueError(f"{path}: the mask is {pixels.shape} (height, width), its image {shape}")
    present = ids_within(pixels)
    unknown = [value for value in present.tolist() if value not in values]
    if unknown:
        raise ValueError(f"{path}: the values {unknown[:10]} have no name in {names} (null there makes them void)")
    classes = np.array([values[value] for value in present.tolist()])[np.searchsorted(present, pixels)]
    ids, segments = np.full(shape, VOID, dtype=np.int32), []
    for category in sorted(set(classes.ravel().tolist()) - {-1}):
        for region in _regions(classes == category, split=category in things):
            segments.append({"id": len(segments) + 1, "category_id": category, "iscrowd": False})
            ids[region] = len(segments)
    return ids, segments


def mask_values(path: Path) -> np.ndarray:
    """The numbers (H, W) int32 of a mask; a colour's is its id."""
    with Image.open(path) as picture:
        if picture.mode in ("RGB", "RGBA"):
            return decode_ids(np.asarray(picture.convert("RGB")))
        if picture.mode not in ("1", "L", "P", "I", "I;16", "I;16B"):
            raise ValueError(f"{path}: a mask is a grey, palette, 16-bit or RGB picture, not of mode {picture.mode}")
        return np.asarray(picture).astype(np.int32)


def _regions(mask: np.ndarray, split: bool) -> list[np.ndarray]:
    """The mask, or its connected components (neighbours touch at sides or corners)."""
    if not split:
        return [mask]
    from scipy import ndimage

    labels, number = ndimage.label(mask, structure=np.ones((3, 3)))
    return [labels == component for component in range(1, number + 1)]
