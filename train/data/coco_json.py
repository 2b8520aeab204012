"""COCO JSON, of instances or panoptic, as training data.

    DIR/annotations/instances_train.json    DIR/train/*.jpg, or DIR/images/..., or DIR itself
    DIR/annotations/panoptic_train.json     DIR/annotations/panoptic_train/*.png

The JSON may also lie in DIR itself. A file's name says its split (train, val). Where instances overlap, the smaller
lies on the larger; pixels of none are void. Classes are taken in the order of their ids.
"""

import json
from collections import Counter, defaultdict
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from modeling_gkc.vocabulary import Vocabulary

from .pictures import Picture, Segmentation, Source, split_named
from .schema import VOID, decode_ids, ids_within


def find_coco_files(folder: Path) -> list[Path]:
    """The JSON files in a folder, or its `annotations`, that are COCO's, panoptic ones alone where there are both."""
    found = {path: _kind(path) for place in (folder, folder / "annotations") for path in sorted(place.glob("*.json"))}
    kinds = set(found.values()) - {None}
    chosen = "panoptic" if "panoptic" in kinds else "instances"
    return [path for path, kind in found.items() if kind == chosen]


def _kind(path: Path) -> str | None:
    """What a JSON file holds, from its content."""
    content = _load(path)
    if not isinstance(content, dict) or not {"images", "annotations", "categories"} <= content.keys():
        return None
    first = next(iter(content["annotations"]), {})
    return "panoptic" if "segments_info" in first else "instances" if "segmentation" in first or not first else None


def _load(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}, line {error.lineno}: this is no JSON: {error.msg}.") from error


def read_coco(folder: Path, files: list[Path]) -> Source:
    """Find the pictures of COCO files, which must have the same categories.

    Raises:
        ValueError: the categories of two files differ, or those of one repeat; the file is named.
    """
    contents = {path: _load(path) for path in files}
    categories = _categories(contents)
    source = Source(_vocabulary(files[0], categories), [])
    new_ids = {category["id"]: index for index, category in enumerate(categories)}
    for path, content in contents.items():
        _add_pictures(source, folder, path, content, new_ids)
    numbers = Counter(picture.image_id for picture in source.pictures)
    repeated = [name for name, number in numbers.items() if number > 1]
    if repeated:
        raise ValueError(f"Images of the same name in {[str(path) for path in files]}: {repeated[:5]}.")
    return source


def _categories(contents: Mapping[Path, dict]) -> list[dict[str, Any]]:
    """Those of all files, by rising id."""
    (first, content), *others = contents.items()
    categories = sorted(content["categories"], key=lambda category: category["id"])
    for path, other in others:
        if sorted(other["categories"], key=lambda category: category["id"]) != categories:
            raise ValueError(f"{first} and {path} have different categories.")
    return categories


def _vocabulary(path: Path, categories: list[dict[str, Any]]) -> Vocabulary:
    names = [[category["name"], *category.get("synonyms", [])] for category in categories]
    try:
        return Vocabulary(names, is_thing=[bool(category.get("isthing", True)) for category in categories])
    except ValueError as error:
        raise ValueError(f"{path}, categories: {error}") from error


def _add_pictures(source: Source, folder: Path, path: Path, content: dict, new_ids: Mapping[int, int]) -> None:
    annotations = defaultdict(list)
    for annotation in content["annotations"]:
        annotations[annotation["image_id"]].append(annotation)
    places = [folder, folder / "images", *(p for p in folder.iterdir() if p.is_dir())]
    places += [p for p in (folder / "images").glob("*") if p.is_dir()]
    for image in content["images"]:
        file = next((place / image["file_name"] for place in places if (place / image["file_name"]).is_file()), None)
        if file is None:
            source.problems.append(f"{path}, image {image['id']}: there is no file {image['file_name']} in {folder}")
            continue
        read = partial(_read_annotations, path, annotations[image["id"]], new_ids)
        name = Path(image["file_name"]).with_suffix("").as_posix()
        source.pictures.append(Picture(name, file, read, split_named(path.name)))


def _read_annotations(
    path: Path, annotations: list[dict[str, Any]], new_ids: Mapping[int, int], shape: tuple[int, int]
) -> Segmentation:
    if annotations and "segments_info" in annotations[0]:
        return _panoptic(path, annotations[0], new_ids, shape)
    return _instances(path, annotations, new_ids, shape)


def _panoptic(path: Path, annotation: dict[str, Any], new_ids: Mapping[int, int], shape: tuple) -> Segmentation:
    file = path.with_suffix("") / annotation["file_name"]
    with Image.open(file) as picture:
        ids = decode_ids(np.asarray(picture.convert("RGB")))
    if ids.shape != shape:
        raise ValueError(f"{file}: it is {ids.shape} (height, width), its image {shape}")
    segments = [_segment(path, info, info["id"], new_ids) for info in annotation["segments_info"]]
    unknown = sorted(set(ids_within(ids).tolist()) - {VOID, *(segment["id"] for segment in segments)})
    if unknown:
        raise ValueError(f"{file}: the ids {unknown[:10]} are not in the segments_info of {path}")
    return ids, segments


def _instances(path: Path, annotations: list[dict], new_ids: Mapping[int, int], shape: tuple) -> Segmentation:
    masks = [_mask(path, annotation, shape) for annotation in annotations]
    ids, segments = np.full(shape, VOID, dtype=np.int32), []
    # From the largest to the smallest: what lies on something else is nearly always the smaller.
    for index in sorted(range(len(masks)), key=lambda index: -int(masks[index].sum())):
        segments.append(_segment(path, annotations[index], len(segments) + 1, new_ids))
        ids[masks[index]] = len(segments)
    present = set(ids_within(ids).tolist())
    return ids, [segment for segment in segments if segment["id"] in present]


def _segment(path: Path, annotation: dict[str, Any], segment_id: int, new_ids: Mapping[int, int]) -> dict[str, Any]:
    category = annotation["category_id"]
    if category not in new_ids:
        raise ValueError(f"{path}, annotation {annotation['id']}: there is no category {category}")
    return {"id": segment_id, "category_id": new_ids[category], "iscrowd": bool(annotation.get("iscrowd", 0))}


def _mask(path: Path, annotation: dict[str, Any], shape: tuple[int, int]) -> np.ndarray:
    """(H, W) bool of polygons or a run-length code."""
    try:
        from pycocotools import mask as coder
    except ImportError as error:
        raise RuntimeError("Polygons of COCO are drawn by pycocotools: pip install pycocotools") from error
    outline = annotation["segmentation"]
    try:
        if isinstance(outline, list):
            code = coder.merge(coder.frPyObjects(outline, *shape))
        else:
            code = coder.frPyObjects(outline, *outline["size"]) if isinstance(outline["counts"], list) else outline
        mask = coder.decode(code).astype(bool)
    except Exception as error:  # pycocotools raises errors of many types
        raise ValueError(f"{path}, annotation {annotation['id']}: its segmentation cannot be read: {error}") from error
    if mask.shape != shape:
        raise ValueError(f"{path}, annotation {annotation['id']}: its size is {mask.shape}, that of its image {shape}")
    return mask
