"""ADE20K (Zhou et al., *Semantic Understanding of Scenes through the ADE20K Dataset*, IJCV 2019)."""

from collections.abc import Mapping
from functools import cache, partial
from pathlib import Path

import numpy as np

from modeling_gkc.vocabulary_files import packaged_facts

from ..schema import VOID, ids_within
from ..sources import AnnotatedImage, Segmentation
from .base import (
    Benchmark,
    look_up,
    raw_ids,
    read_colors,
    read_numbers,
    read_table,
    require,
    semantic_segments,
)
from .pairs import paired
from .protocol import FC_CLIP_R50, GKC_R50, GKC_R50_OPENTRANS, GKC_R101, Protocol, ReportColumn

SCENE_PARSING, FULL = "ade20k_150", "ade20k_847"
FOLDERS = {"train": "training", "val": "validation"}
FULL_FOLDERS = {"train": ("train", "frame"), "val": ("val",)}
# Highest class index of ADE20K_2021_17_01, whose files name 3,688 objects.
LAST_FULL_INDEX = 3688

LAYOUT = """\
ADE20K scene parsing: semantic maps of 150 classes.

    DIR/images/training/ADE_train_*.jpg          DIR/images/validation/ADE_val_*.jpg
    DIR/annotations/training/ADE_train_*.png     DIR/annotations/validation/ADE_val_*.png

DIR is ADEChallengeData2016. Pixel values are 1..150, and 0 for void."""
PANOPTIC_LAYOUT = """\
ADE20K scene parsing with the objects of 100 of its 150 classes, for panoptic and instance segmentation.

    DIR/images/{training,validation}/*.jpg
    DIR/annotations/{training,validation}/*.png             semantic maps, for the 50 stuff classes
    DIR/annotations_instance/{training,validation}/*.png    objects: channel R is the class 1..100, G the object

DIR is ADEChallengeData2016 with the annotations of the 2017 instance challenge. As in Mask2Former's version of this
benchmark, objects cover stuff, and pixels of thing classes without an object are void. Use ade20k_150 for semantic
scores."""
_FULL_FOLDER = """

    DIR/images/ADE/training/<group>/<scene>/ADE_train_*.jpg, ADE_train_*_seg.png, and ADE_frame_*
    DIR/images/ADE/validation/<group>/<scene>/ADE_val_*.jpg, ADE_val_*_seg.png

DIR is ADE20K_2021_17_01. The second part of a file name is the split; `frame` belongs to training. The pickle
index_ade20k.pkl is not read, since unpickling a file can execute arbitrary code. The class index in *_seg.png is
(R // 10) * 256 + G; indices of other classes are void. Images keep their sizes; the evaluation shrinks large images
as published."""
FULL_LAYOUT = (
    f"ADE20K-Full: semantic maps of 847 classes, from the 2021 release (registration required).{_FULL_FOLDER}"
)
FULL_150_LAYOUT = f"""\
ADE20K-Full with the 150 scene parsing classes, for training on more images than ade20k_150.{_FULL_FOLDER}

These maps are newer than those of ade20k_150, so that scores are not comparable with published ones."""
FULL_COUNTS = {"train": 25_574, "val": 2_000}


def find_scene_parsing(source: Path, split: str) -> list[AnnotatedImage]:
    """Return the images of an ADEChallengeData2016 split with semantic maps."""
    return _scene_parsing(source, split, _read_semantic)


def find_scene_parsing_panoptic(source: Path, split: str) -> list[AnnotatedImage]:
    """Return the images of an ADEChallengeData2016 split with stuff and objects."""
    instances = require(source / "annotations_instance" / FOLDERS[split], "the objects")
    return _scene_parsing(source, split, partial(_read_panoptic, instances))


def _scene_parsing(source: Path, split: str, read) -> list[AnnotatedImage]:
    images = require(source / "images" / FOLDERS[split], "the folder of the images")
    return paired(images, require(source / "annotations" / FOLDERS[split]), read, split)


def _semantic_map(path: Path, shape: tuple[int, int]) -> np.ndarray:
    return look_up(read_numbers(path, shape, ("L",)), raw_ids(SCENE_PARSING), (0,), path)


def _read_semantic(path: Path, shape: tuple[int, int]) -> Segmentation:
    return semantic_segments(_semantic_map(path, shape))


@cache
def instance_classes() -> Mapping[int, int]:
    """Return the train id of each class 1..100 of the instance challenge, the things of the 150 classes in order."""
    things = [index for index, entry in enumerate(packaged_facts(SCENE_PARSING)["classes"]) if entry["is_thing"]]
    return {number: index for number, index in enumerate(things, start=1)}


def _read_panoptic(instances: Path, path: Path, shape: tuple[int, int]) -> Segmentation:
    """Read the stuff of a semantic map and the objects that cover it."""
    classes = _semantic_map(path, shape)
    things = np.array([entry["is_thing"] for entry in packaged_facts(SCENE_PARSING)["classes"]])
    classes[(classes >= 0) & things[classes]] = -1
    ids, _ = semantic_segments(classes)
    file = instances / path.name
    channels = read_colors(file, shape).astype(np.int32)
    kinds = look_up(channels[..., 0], instance_classes(), (0,), file)
    objects = channels[..., 1]
    if (wrong := (objects > 0) != (kinds >= 0)).any():
        raise ValueError(f"{file}: {int(wrong.sum())} pixels have an object without a class, or a class without one")
    # One id for each pair of class and object, above all semantic ids.
    ids = np.where(objects > 0, 1000 + kinds * 256 + objects, ids)
    present = [number for number in ids_within(ids).tolist() if number != VOID]
    owners = {number: (number - 1000) // 256 if number >= 1000 else number - 1 for number in present}
    _check_objects_have_one_class(file, [number % 256 for number in (n - 1000 for n in present if n >= 1000)])
    return ids.astype(np.int32), [
        {"id": number, "category_id": owner, "iscrowd": False} for number, owner in owners.items()
    ]


def _check_objects_have_one_class(file: Path, objects: list[int]) -> None:
    mixed = sorted({number for number in objects if objects.count(number) > 1})
    if mixed:
        raise ValueError(f"{file}: The objects {mixed[:10]} have pixels of several classes")


def find_full(classes: str, source: Path, split: str) -> list[AnnotatedImage]:
    """Return the images of an ADE20K_2021_17_01 split by name, with the classes of one of the two vocabularies."""
    folder = require(source / "images" / "ADE")
    stems = {
        path.with_name(path.name.removesuffix(suffix))
        for suffix in (".jpg", "_seg.png")
        for path in folder.rglob(f"ADE_*{suffix}")
        if path.name.split("_")[1] in FULL_FOLDERS[split]
    }
    if not stems:
        raise ValueError(
            f"{folder} has no files ADE_{FULL_FOLDERS[split][0]}_*: the folder is not laid out as published."
        )
    return [
        AnnotatedImage(
            stem.name,
            stem.with_name(f"{stem.name}.jpg"),
            partial(_read_full, classes, stem.with_name(f"{stem.name}_seg.png")),
            split,
        )
        for stem in sorted(stems, key=lambda stem: (stem.name, stem))
    ]


@cache
def full_indices(classes: str) -> Mapping[int, int]:
    """Return the train id of each ADE20K-Full class index in a vocabulary."""
    if classes == FULL:
        return raw_ids(FULL)
    pixels = raw_ids(SCENE_PARSING)
    return {index: pixels[pixel] for index, pixel in read_table("ade20k_full_to_150").items()}


def _read_full(classes: str, path: Path, shape: tuple[int, int]) -> Segmentation:
    channels = read_colors(path, shape).astype(np.int32)  # the index exceeds 8 bits
    indices = channels[..., 0] // 10 * 256 + channels[..., 1]
    table = full_indices(classes)
    others = range(LAST_FULL_INDEX + 1)
    return semantic_segments(look_up(indices, table, others, path))


BENCHMARKS = (
    Benchmark(
        SCENE_PARSING,
        SCENE_PARSING,
        LAYOUT,
        find_scene_parsing,
        {"train": 20_210, "val": 2_000},
        protocol=Protocol(),
        column=ReportColumn("A-150", 4, {GKC_R50: 17.5, GKC_R101: 18.8, GKC_R50_OPENTRANS: 16.6, FC_CLIP_R50: 23.3}),
    ),
    Benchmark(
        f"{SCENE_PARSING}_panoptic",
        SCENE_PARSING,
        PANOPTIC_LAYOUT,
        find_scene_parsing_panoptic,
        {"train": 20_210, "val": 2_000},
        protocol=Protocol(tasks=("semantic", "panoptic")),
    ),
    Benchmark(
        FULL,
        FULL,
        FULL_LAYOUT,
        partial(find_full, FULL),
        FULL_COUNTS,
        protocol=Protocol(shrink_above=512, note="scored at the reduced size, like all published results"),
        column=ReportColumn("A-847", 5, {GKC_R50: 3.2, GKC_R101: 3.5, GKC_R50_OPENTRANS: 2.5, FC_CLIP_R50: 7.1}),
    ),
    Benchmark("ade20k_full_150", SCENE_PARSING, FULL_150_LAYOUT, partial(find_full, SCENE_PARSING), FULL_COUNTS),
)
