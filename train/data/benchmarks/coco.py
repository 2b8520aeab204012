"""COCO panoptic (Kirillov et al., *Panoptic Segmentation*, CVPR 2019) and COCO-Stuff (Caesar et al., CVPR 2018)."""

from collections import defaultdict
from collections.abc import Mapping
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np

from ...storage.checksums import Perhaps, read_json
from ..schema import NO_CLASS, VOID, ids_within
from ..sources import AnnotatedImage, Segmentation
from ..splits import novel_positions
from .base import (
    KEPT_WITH_ANY,
    KEPT_WITH_ONLY,
    Benchmark,
    look_up,
    raw_ids,
    read_color_ids,
    read_numbers,
    read_table,
    require,
    semantic_segments,
)
from .pairs import paired
from .protocol import GKC_R50, GKC_R50_OPENTRANS, GKC_R101, Protocol, ReportColumn

PANOPTIC, STUFF = "coco_panoptic_133", "coco_stuff_171"
IMAGES = {"train": 118_287, "val": 5_000}
_VOID_PIXEL = 255
_SEGMENT = {"id": int, "category_id": int, "iscrowd": Perhaps((int, bool))}
_PANOPTIC_JSON = {
    "images": [{"id": int, "file_name": str}],
    "annotations": [{"image_id": int, "file_name": str, "segments_info": [_SEGMENT]}],
}
_CAPTIONS_JSON = {"annotations": [{"id": int, "image_id": int, "caption": str}]}

_FOLDER = """\

    DIR/train2017/*.jpg                         DIR/val2017/*.jpg
    DIR/annotations/panoptic_train2017.json     DIR/annotations/panoptic_val2017.json
    DIR/panoptic_train2017/*.png                DIR/panoptic_val2017/*.png        (or in DIR/annotations)
    DIR/annotations/captions_train2017.json     DIR/annotations/captions_val2017.json    optional, for captions

The PNGs are zip files in the archive of the annotations. Only the splits to prepare are required."""
PANOPTIC_LAYOUT = f"COCO panoptic: 80 thing and 53 stuff classes, with captions.\n{_FOLDER}"
IGNORE_LAYOUT = f"""\
COCO panoptic with the segments of 18 novel classes as void.
{_FOLDER}

Images with at least one segment of the 115 base classes are kept. The classes are renumbered in order."""
DELETE_LAYOUT = f"""\
COCO panoptic without the images that contain any of 18 novel classes.
{_FOLDER}

In train, images without a segment of a novel class are kept. In val, images with at least one segment of a base class
are kept, as in coco_panoptic_base_ignore. The 115 base classes are renumbered in order."""
NOVEL_LAYOUT = f"""\
COCO panoptic with the 18 novel classes only, for evaluation.
{_FOLDER}

Images with at least one segment of these classes are kept. The classes are renumbered in order."""
_STUFF_FOLDER = """

    DIR/train2017/*.jpg                                  DIR/val2017/*.jpg
    DIR/stuffthingmaps_trainval2017/train2017/*.png      DIR/stuffthingmaps_trainval2017/val2017/*.png

The maps may also be in DIR/stuffthingmaps. Their pixel values start at 0, one less than in labels.txt."""
STUFF_LAYOUT = f"COCO-Stuff: semantic maps of 80 thing and 91 stuff classes.{_STUFF_FOLDER}"
STUFF_133_LAYOUT = f"""\
COCO-Stuff with the 133 classes of COCO panoptic: merged labels, 12 of them void.{_STUFF_FOLDER}"""
STUFF_COUNTS = "Images whose map is entirely void are kept; some projects omit them, which does not change scores."


def find_panoptic(source: Path, split: str) -> list[AnnotatedImage]:
    """Return the images of `panoptic_{split}2017.json`, in its order."""
    path = require(source / "annotations" / f"panoptic_{split}2017.json")
    images = require(source / f"{split}2017", "the folder of the images")
    masks = next(
        (place for place in (source, source / "annotations") if (place / f"panoptic_{split}2017").is_dir()), source
    )
    masks = require(masks / f"panoptic_{split}2017", "the folder of the segmentations: unzip it")
    content = read_json(path, shape=_PANOPTIC_JSON)
    captions = _captions(source / "annotations" / f"captions_{split}2017.json")
    annotations = {annotation["image_id"]: annotation for annotation in content["annotations"]}
    names = {image["id"]: Path(image["file_name"]).stem for image in content["images"]}
    names |= {number: Path(entry["file_name"]).stem for number, entry in annotations.items() if number not in names}
    return [
        AnnotatedImage(
            stem,
            images / f"{stem}.jpg",
            partial(_read_panoptic, path, masks, *_compact(annotations.get(number))),
            split,
            tuple(captions.get(number, ())),
        )
        for number, stem in names.items()
    ]


def _captions(path: Path) -> dict[int, list[str]]:
    """Return the captions of each image, or none if the file does not exist."""
    captions = defaultdict(list)
    if path.is_file():
        for annotation in sorted(read_json(path, shape=_CAPTIONS_JSON)["annotations"], key=lambda entry: entry["id"]):
            captions[annotation["image_id"]].append(annotation["caption"].strip())
    return captions


def _compact(annotation: dict[str, Any] | None) -> tuple[str | None, np.ndarray]:
    """Return the name of a PNG and its segments (N, 3) as id, category and crowd, a tenth of the size of JSON."""
    if annotation is None:
        return None, np.zeros((0, 3), dtype=np.int32)
    try:
        return annotation["file_name"], _packed(annotation["segments_info"])
    except OverflowError as error:
        raise ValueError(f"{annotation['file_name']}: An id of its segments_info is too large: {error}") from error


def _packed(infos: list[dict[str, Any]]) -> np.ndarray:
    segments = [(info["id"], info["category_id"], info.get("iscrowd", 0)) for info in infos]
    return np.array(segments, dtype=np.int64).reshape(-1, 3)


def _read_panoptic(path: Path, masks: Path, name: str | None, infos: np.ndarray, shape: tuple) -> Segmentation:
    if name is None:
        raise ValueError(f"{path.name} has no annotation of this image")
    ids = read_color_ids(masks / name, shape)
    listed = infos[:, 0].tolist()
    if unknown := sorted(set(ids_within(ids).tolist()) - {VOID, *listed}):
        raise ValueError(f"{masks / name}: The ids {unknown[:10]} are not in the segments_info of {path.name}")
    if len(set(listed)) < len(listed) or not all(VOID < number < 2**24 for number in listed):
        raise ValueError(f"{path}, {name}: Ids of segments repeat or are not from 1 to 2**24 - 1: {listed}")
    table = raw_ids(PANOPTIC)
    if wrong := sorted(set(infos[:, 1].tolist()) - table.keys()):
        raise ValueError(f"{path}, {name}: COCO panoptic does not contain the categories {wrong[:10]}")
    return ids, [
        {"id": number, "category_id": table[category], "iscrowd": bool(crowd)}
        for number, category, crowd in infos.tolist()
    ]


def find_stuff(vocabulary: str, source: Path, split: str) -> list[AnnotatedImage]:
    """Return the images of a COCO-Stuff split by name, with its classes or those of COCO panoptic."""
    images = require(source / f"{split}2017", "the folder of the images")
    folders = [source / "stuffthingmaps_trainval2017", source / "stuffthingmaps"]
    maps = require(next((folder for folder in folders if folder.is_dir()), folders[0]) / f"{split}2017")
    return paired(images, maps, partial(_read_stuff, vocabulary), split)


@cache
def stuff_pixels(vocabulary: str) -> Mapping[int, int]:
    """Return the train id of each COCO-Stuff pixel value in a vocabulary, -1 for labels that it lacks."""
    if vocabulary == STUFF:
        return raw_ids(STUFF)
    merged = read_table("coco_stuff_171_to_panoptic_133")
    return {pixel: merged.get(train_id, NO_CLASS) for pixel, train_id in raw_ids(STUFF).items()}


def _read_stuff(vocabulary: str, path: Path, shape: tuple[int, int]) -> Segmentation:
    return semantic_segments(look_up(read_numbers(path, shape), stuff_pixels(vocabulary), (_VOID_PIXEL,), path))


def _positions(novel: bool) -> tuple[int, ...]:
    held_out = set(novel_positions(PANOPTIC))
    return tuple(position for position in range(len(raw_ids(PANOPTIC))) if (position in held_out) == novel)


BENCHMARKS = (
    Benchmark(
        PANOPTIC,
        PANOPTIC,
        PANOPTIC_LAYOUT,
        find_panoptic,
        IMAGES,
        protocol=Protocol(tasks=("semantic", "panoptic"), note="mIoU over 133 classes, including crowds"),
        column=ReportColumn("COCO", 1, {GKC_R50: 49.8, GKC_R101: 51.2, GKC_R50_OPENTRANS: 46.0}),
    ),
    Benchmark(
        "coco_panoptic_base_ignore",
        PANOPTIC,
        IGNORE_LAYOUT,
        find_panoptic,
        IMAGES,
        subset=_positions(novel=False),
        kept_images={"train": KEPT_WITH_ANY, "val": KEPT_WITH_ANY},
    ),
    Benchmark(
        "coco_panoptic_base_delete",
        PANOPTIC,
        DELETE_LAYOUT,
        find_panoptic,
        IMAGES,
        subset=_positions(novel=False),
        kept_images={"train": KEPT_WITH_ONLY, "val": KEPT_WITH_ANY},
    ),
    Benchmark(
        "coco_panoptic_novel",
        PANOPTIC,
        NOVEL_LAYOUT,
        find_panoptic,
        {"val": IMAGES["val"]},
        subset=_positions(novel=True),
        kept_images={"val": KEPT_WITH_ANY},
    ),
    Benchmark(STUFF, STUFF, STUFF_LAYOUT, partial(find_stuff, STUFF), IMAGES, STUFF_COUNTS, protocol=Protocol()),
    Benchmark(
        "coco_stuff_133",
        PANOPTIC,
        STUFF_133_LAYOUT,
        partial(find_stuff, PANOPTIC),
        IMAGES,
        STUFF_COUNTS,
        protocol=Protocol(note="COCO-Stuff labels in the classes of COCO panoptic"),
    ),
)
