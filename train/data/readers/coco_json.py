"""COCO JSON files of instances or panoptic segmentation.

    DIR/annotations/instances_train.json    DIR/train/*.jpg, or DIR/images/..., or DIR itself
    DIR/annotations/panoptic_train.json     DIR/annotations/panoptic_train/*.png
    DIR/train/_annotations.coco.json        DIR/train/*.jpg                          (Roboflow export)
    DIR/result.json                         DIR/images/*.jpg                         (Label Studio export)

The JSON may also be in DIR itself. The split (train, val, test) is a word of its file name or its folder. Smaller
instances cover larger ones; pixels without an instance are void. Classes are sorted by id. Images must have the
`width` and `height` in the JSON.
"""

from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from PIL import Image

from modeling_gkc.label_text import shown
from modeling_gkc.vocabulary import Vocabulary

from ...storage.checksums import read_json
from ..schema import VOID, decode_ids, ids_within
from ..sources import (
    AnnotatedImage,
    Segmentation,
    Source,
    annotated_shape,
    declared_shape,
    relative_names,
    split_named,
    split_of_folders,
    upright,
)
from .coco_masks import PaintedObject, UnusableObjectError, paint_objects, segmentation_mask

_PARTS = ("images", "annotations", "categories")
_NOT_IMAGES = {"annotations", "labels", "masks"}
_SHOWN = 10


def find_coco_files(folder: Path) -> tuple[list[Path], list[str]]:
    """Find the COCO JSON files in a folder and its sub-folders.

    Returns:
        The files, only panoptic ones if there are both kinds, and a note on each ignored file.
    """
    places = (folder, *sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".")))
    kinds, notes = {}, []
    for path in (path for place in places for path in sorted(place.glob("*.json"))):
        content = read_json(path)
        lacking = [part for part in _PARTS if not isinstance(content, dict) or part not in content]
        if not lacking:
            annotations = content["annotations"] if isinstance(content["annotations"], list) else []
            is_panoptic = any(isinstance(entry, dict) and "segments_info" in entry for entry in annotations)
            kinds[path] = "panoptic" if is_panoptic else "instances"
        elif isinstance(content, dict):
            notes.append(f"{path} is not read: it lacks {', '.join(lacking)}")
        else:
            notes.append(f"{path} is not read: it must be an object of {', '.join(_PARTS)}, got {_shown(content)}")
    chosen = "panoptic" if "panoptic" in kinds.values() else "instances"
    notes += [f"{path} is not read: panoptic files exist, too" for path, kind in kinds.items() if kind != chosen]
    return [path for path, kind in kinds.items() if kind == chosen], notes


def read_coco(folder: Path, files: list[Path]) -> Source:
    """Find the images of COCO files, which must have the same categories.

    Args:
        folder: Folder of the dataset.
        files: COCO JSON files in the folder.

    Raises:
        ValueError: If the categories of two files differ, or ids or names are missing, repeated or of a wrong type.
    """
    contents = {path: _checked_content(path) for path in files}
    categories = _categories(contents)
    source = Source(_vocabulary(files[0], categories), [])
    source.layout = f"COCO JSON, {len(files)} file{'s' * (len(files) > 1)}: " + ", ".join(
        path.relative_to(folder).as_posix() for path in files[:_SHOWN]
    )
    new_ids = {category["id"]: index for index, category in enumerate(categories)}
    for path, content in contents.items():
        _add_images(source, folder, path, content, new_ids)
    # Equal image ids of different splits receive the split as a prefix, as in mask folders.
    numbers = Counter(image.image_id for image in source.images)
    for image in source.images:
        if numbers[image.image_id] > 1 and image.split:
            image.image_id = f"{image.split}/{image.image_id}"
    repeated = [name for name, number in Counter(image.image_id for image in source.images).items() if number > 1]
    if repeated:
        raise ValueError(f"Images of the same name in {[str(path) for path in files]}: {repeated[:5]}.")
    return source


def _checked_content(path: Path) -> dict[str, list[dict[str, Any]]]:
    """Return the checked lists of a COCO file, with ids converted to text."""
    content = read_json(path)
    for part in _PARTS:
        entries = content.get(part) if isinstance(content, dict) else None
        if not isinstance(entries, list):
            raise ValueError(f"{path}: `{part}` must be a list, got {_shown(entries)}.")
        for number, entry in enumerate(entries, start=1):
            if not isinstance(entry, dict):
                raise ValueError(f"{path}, {part}: Entry {number} must be an object, got {_shown(entry)}.")
    for part in ("images", "categories"):
        for number, entry in enumerate(content[part], start=1):
            entry["id"] = _identity(entry.get("id"), f"{path}, {part}: entry {number}, id")
        repeated = [key for key, count in Counter(entry["id"] for entry in content[part]).items() if count > 1]
        if repeated:
            raise ValueError(f"{path}, {part}: The ids {repeated[:_SHOWN]} are given twice.")
    return content


def _identity(value: Any, place: str) -> str:
    """Convert an id to text, so that 1 and "1" are the same id.

    Raises:
        ValueError: If the id is neither an integer nor text.
    """
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int | str) or value == "":
        raise ValueError(f"{place} must be a whole number or text, got {_shown(value)}")
    return str(value)


def _flag(value: Any, place: str) -> bool:
    """Convert a COCO flag, 0 or 1 as a number, boolean or text.

    Raises:
        ValueError: If the value is not a flag.
    """
    if isinstance(value, int | float | str) and (value in (0, 1) or value in ("0", "1")):
        return bool(int(value))
    raise ValueError(f"{place} must be 0 or 1, got {_shown(value)}")


def _shown(value: Any) -> str:
    return "nothing" if value is None else shown(value, 60)


def _categories(contents: Mapping[Path, dict]) -> list[dict[str, Any]]:
    """Return the common categories of all files, sorted by id."""
    (first, categories), *others = ((path, _categories_of(path, content)) for path, content in contents.items())
    for path, other in others:
        if other != categories:
            differing = [entry for entry in (*categories, *other) if entry not in categories or entry not in other]
            listed = ", ".join(f"{entry['id']}: {entry['names'][0]}" for entry in differing[:_SHOWN])
            raise ValueError(f"{first} and {path} have different categories ({listed}): give both the same list.")
    return categories


def _categories_of(path: Path, content: dict) -> list[dict[str, Any]]:
    used = {str(info.get("category_id")) for entry in content["annotations"] for info in _infos(entry)}
    parents = {str(entry.get("supercategory")) for entry in content["categories"]}
    found = []
    for entry in content["categories"]:
        place = f"{path}, category {entry['id']}"
        name, synonyms = entry.get("name"), entry.get("synonyms", [])
        if not isinstance(name, str):
            raise ValueError(f"{place}: The name must be text, got {_shown(name)}.")
        if not isinstance(synonyms, list) or not all(isinstance(synonym, str) for synonym in synonyms):
            raise ValueError(f"{place}: The synonyms must be a list of texts, got {_shown(synonyms)}.")
        # Roboflow lists the project itself as category 0, the parent of all others.
        if entry.get("supercategory") == "none" and name in parents and entry["id"] not in used:
            continue
        is_thing = _flag(entry.get("isthing", 1), f"{place}: isthing")
        found.append({"id": entry["id"], "names": [name, *synonyms], "isthing": is_thing})
    return sorted(found, key=lambda entry: (not entry["id"].isdecimal(), len(entry["id"]), entry["id"]))


def _infos(annotation: dict[str, Any]) -> list[dict[str, Any]]:
    infos = annotation.get("segments_info", [annotation])
    return [info for info in infos if isinstance(info, dict)] if isinstance(infos, list) else []


def _vocabulary(path: Path, categories: list[dict[str, Any]]) -> Vocabulary:
    try:
        return Vocabulary(
            [category["names"] for category in categories], is_thing=[category["isthing"] for category in categories]
        )
    except ValueError as error:
        raise ValueError(f"{path}, categories: {error}") from error


def _add_images(source: Source, folder: Path, path: Path, content: dict, new_ids: Mapping[str, int]) -> None:
    split = split_named(path.stem) or split_of_folders(path.relative_to(folder).as_posix())
    annotations = _by_image(source, path, content)
    places = _Places.from_folder(folder, path, split)
    without_size = 0
    for entry in content["images"]:
        place = f"{path}, image {entry['id']}"
        try:
            file_name = entry.get("file_name")
            if not isinstance(file_name, str) or not file_name or "\0" in file_name:
                raise ValueError(f"{place}: The file_name must be text, got {_shown(file_name)}")
            declared = declared_shape(entry.get("height"), entry.get("width"), place)
            file, relative = places.find(file_name, place)
        except (OSError, ValueError) as error:
            source.problems.append(str(error))
            continue
        without_size += declared is None
        own = split or split_of_folders(file.relative_to(folder).as_posix())
        of_image, notes = annotations.get(entry["id"], []), []
        read = partial(_read_annotations, path, of_image, new_ids, file, declared, notes)
        source.images.append(AnnotatedImage(relative.with_suffix("").as_posix(), file, read, own, notes=notes))
    if without_size:
        source.notes.append(
            f"{path}: {without_size} images have no width and height, so that the size of their files cannot be "
            "checked"
        )


def _by_image(source: Source, path: Path, content: dict) -> dict[str, list[dict[str, Any]]]:
    """Return the annotations by image id and report annotations of unlisted images."""
    annotations, lost = defaultdict(list), []
    listed = {image["id"] for image in content["images"]}
    for number, annotation in enumerate(content["annotations"], start=1):
        annotation.setdefault("id", f"number {number}")
        try:
            key = _identity(annotation.get("image_id"), f"{path}, annotation {annotation['id']}: image_id")
        except ValueError as error:
            source.problems.append(f"{error}; left out")
            continue
        (annotations[key] if key in listed else lost).append(annotation)
    if lost:
        ids = list(dict.fromkeys(str(annotation["image_id"]) for annotation in lost))
        source.problems.append(
            f"{path}: {len(lost)} annotations are of images that it does not list, left out: image_id "
            f"{', '.join(ids[:_SHOWN])}{', ...' if len(ids) > _SHOWN else ''}"
        )
    return annotations


@dataclass
class _Places:
    """Folders to search for the images of a COCO file, the most likely first.

    Attributes:
        folder: Folder of the dataset.
        tiers: Lists of folders. An image that exists in two folders of a tier is ambiguous.
    """

    folder: Path
    tiers: list[list[Path]]

    @classmethod
    def from_folder(cls, folder: Path, path: Path, split: str | None) -> "_Places":
        images = folder / "images"
        below = [
            place
            for parent in (folder, images)
            for place in sorted(parent.glob("*"))
            if place.is_dir() and place != images and place.name not in _NOT_IMAGES
        ]
        own = [place for place in below if split and split_named(place.name) == split]
        below = [place for place in below if place not in own and (not split or split_named(place.name) is None)]
        beside = [path.parent] if path.parent.name not in _NOT_IMAGES and path.parent != folder else []
        return cls(folder, [beside, own, [folder, images], below])

    def find(self, file_name: str, place: str) -> tuple[Path, PurePosixPath]:
        """File of an image, and its name within the folder that it was found in.

        Raises:
            ValueError: there is no such file, or several.
        """
        for name in relative_names(file_name):
            for tier in self.tiers:
                found = {file.resolve(): file for folder in tier if (file := folder / name).is_file()}
                if len(found) > 1:
                    listed = " and ".join(map(str, list(found.values())[:3]))
                    raise ValueError(f"{place}: The image {file_name} is ambiguous: {listed}; remove or rename one")
                if found:
                    return next(iter(found.values())), name
        raise ValueError(f"{place}: The file {file_name} does not exist in {self.folder}")


def _read_annotations(
    path: Path,
    annotations: list[dict[str, Any]],
    new_ids: Mapping[str, int],
    image: Path,
    declared: tuple[int, int] | None,
    notes: list[str],
    shape: tuple[int, int],
) -> Segmentation:
    frame = shape if declared is None else annotated_shape(declared, shape, image, f"{path}, {image.name}")
    if any("segments_info" in annotation for annotation in annotations):
        if len(annotations) > 1:
            raise ValueError(f"{path}, {image.name}: {len(annotations)} annotations are of this image, expected one")
        ids, segments = _panoptic(path, annotations[0], new_ids, frame, notes)
    else:
        ids, segments = _instances(path, annotations, new_ids, frame, notes)
    return upright(ids, shape, image), segments


def _panoptic(
    path: Path, annotation: dict[str, Any], new_ids: Mapping[str, int], shape: tuple[int, int], notes: list[str]
) -> Segmentation:
    place, name, infos = f"{path}, annotation {annotation['id']}", annotation.get("file_name"), _infos(annotation)
    if not isinstance(name, str) or not isinstance(annotation["segments_info"], list):
        raise ValueError(f"{place}: The annotation needs a file_name and a list segments_info")
    if len(infos) < len(annotation["segments_info"]):
        raise ValueError(f"{place}: Each of its segments_info must be an object")
    file = path.with_suffix("") / name
    with Image.open(file) as image:
        if image.mode not in ("RGB", "RGBA"):
            raise ValueError(f"{file}: The image has mode {image.mode}; store COCO panoptic ids as RGB colors")
        ids = decode_ids(np.asarray(image.convert("RGB")))
    if ids.shape != shape:
        raise ValueError(f"{file}: The annotation is {ids.shape} (height, width), its image {shape}")
    segments = []
    for info in infos:
        number = info.get("id")
        if isinstance(number, bool) or not isinstance(number, int) or not VOID < number < 2**24:
            raise ValueError(f"{place}: Ids of segments are whole numbers from 1 to 2**24 - 1, got {_shown(number)}")
        segments.append(_segment(place, info, number, new_ids))
    listed = [segment["id"] for segment in segments]
    if len(set(listed)) < len(listed):
        raise ValueError(f"{place}: The ids of its segments repeat: {listed[:_SHOWN]}")
    present = set(ids_within(ids).tolist())
    if unknown := sorted(present - {VOID, *listed}):
        raise ValueError(f"{file}: The ids {unknown[:_SHOWN]} are not in the segments_info of {path}")
    notes += [f"{place}: Segment {number} has no pixel, left out" for number in listed if number not in present]
    return ids, [segment for segment in segments if segment["id"] in present]


def _instances(
    path: Path, annotations: list[dict], new_ids: Mapping[str, int], shape: tuple[int, int], notes: list[str]
) -> Segmentation:
    objects = []
    for annotation in annotations:
        place, of_object = f"{path}, annotation {annotation['id']}", []
        segment = _segment(place, annotation, 1, new_ids)
        try:
            mask = segmentation_mask(annotation.get("segmentation"), shape, of_object)
        except UnusableObjectError as error:
            of_object.append(f"{error}, left out")
        except ValueError as error:
            raise ValueError(f"{place}: {error}") from error
        else:
            objects.append(PaintedObject(mask, segment["category_id"], segment["iscrowd"], place))
        notes += [f"{place}: {note}" for note in of_object]
    if annotations and not objects:
        raise ValueError(f"{path}: None of the annotations of this image can be used: {'; '.join(notes[:3])}")
    return paint_objects(objects, shape, notes)


def _segment(place: str, annotation: dict[str, Any], segment_id: int, new_ids: Mapping[str, int]) -> dict[str, Any]:
    category = _identity(annotation.get("category_id"), f"{place}: category_id")
    if category not in new_ids:
        raise ValueError(f"{place}: Unknown category {category}")
    is_crowd = _flag(annotation.get("iscrowd", 0), f"{place}: iscrowd")
    return {"id": segment_id, "category_id": new_ids[category], "iscrowd": is_crowd}
