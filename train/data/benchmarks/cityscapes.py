"""Cityscapes (Cordts et al., CVPR 2016): street scenes, semantic and panoptic.

An `image_id` is CITY_SEQUENCE_FRAME ("frankfurt_000000_000294"), the prefix of all file names of an image. The
official scripts find predictions by this prefix, and expect label ids, the `id` of the vocabulary, not train ids.
"""

from functools import partial
from pathlib import Path

from modeling_gkc.vocabulary_files import packaged_facts

from ..schema import NO_CLASS
from ..sources import AnnotatedImage, Segmentation
from .base import Benchmark, look_up, raw_ids, read_numbers, require, semantic_segments
from .protocol import GKC_R50, GKC_R50_OPENTRANS, GKC_R101, Protocol, ReportColumn
from .raw_segments import BITS_16, segments_of_values

VOCABULARY = "cityscapes_19"
LAYOUT = """\
Cityscapes, {what}: street scenes

    leftImg8bit_trainvaltest.zip and gtFine_trainvaltest.zip (registration at cityscapes-dataset.com), in one folder
    leftImg8bit/{{train,val}}/CITY/CITY_SEQUENCE_FRAME_leftImg8bit.png
    gtFine/{{train,val}}/CITY/CITY_SEQUENCE_FRAME_gtFine_{kind}.png    {bits}"""
IMAGES, LABELS = "leftImg8bit", "gtFine"
# unlabeled, ego vehicle, rectification border, out of roi, static, dynamic, ground; parking, rail track; guard rail,
# bridge, tunnel; polegroup; caravan, trailer. The sixteenth, license plate, is -1 and occurs in no image.
VOID_IDS = (*range(7), 9, 10, 14, 15, 16, 18, 29, 30)
VOID_IDS_WITH_INSTANCES = (29, 30)
_FIRST_INSTANCE = 1000
_IMAGES = {"train": 2975, "val": 500}


def find_semantic(folder: Path, split: str) -> list[AnnotatedImage]:
    """Return the images of a split with one segment per class.

    Raises:
        ValueError: If the folder does not have the published layout.
    """
    return _find(folder, split, "labelIds", partial(_read_semantic, raw_ids(VOCABULARY)))


def find_panoptic(folder: Path, split: str) -> list[AnnotatedImage]:
    """Return the images of a split with one segment per object for classes with instances, with the published ids.

    Raises:
        ValueError: If the folder does not have the published layout.
    """
    things = {entry["id"] for entry in packaged_facts(VOCABULARY)["classes"] if entry["is_thing"]}
    return _find(folder, split, "instanceIds", partial(_read_panoptic, raw_ids(VOCABULARY), things))


def _find(folder: Path, split: str, kind: str, read: partial) -> list[AnnotatedImage]:
    image_folder = require(folder / IMAGES / split, "the images")
    label_folder = require(folder / LABELS / split, "the annotations (gtFine, not gtCoarse)")
    image_end, label_end = f"_{IMAGES}.png", f"_{LABELS}_{kind}.png"
    labels = _files(label_folder, label_end)
    if not labels:
        raise ValueError(f"{label_folder} has no file CITY/*{label_end}.")
    # Images with a missing file are included, so that the file is reported when it is read.
    return [
        AnnotatedImage(
            name, image_folder / city / (name + image_end), partial(read, label_folder / city / (name + label_end))
        )
        for city, name in sorted(_files(image_folder, image_end) | labels)
    ]


def _files(folder: Path, end: str) -> set[tuple[str, str]]:
    """Return the city and image id of the files of a split with the given ending."""
    paths = (path for path in folder.glob(f"*/*{end}") if not path.name.startswith("."))
    return {(path.parent.name, path.name.removesuffix(end)) for path in paths}


def _read_semantic(table: dict[int, int], path: Path, shape: tuple[int, int]) -> Segmentation:
    return semantic_segments(look_up(read_numbers(path, shape), table, VOID_IDS, path))


def _read_panoptic(table: dict[int, int], things: set[int], path: Path, shape: tuple[int, int]) -> Segmentation:
    return segments_of_values(read_numbers(path, shape, BITS_16), partial(_meaning, table, things), path)


def _meaning(table: dict[int, int], things: set[int], value: int) -> tuple[int, bool] | None:
    """Return the train id of an instance id, and whether it is a crowd of inseparable objects of one class."""
    is_object = value >= _FIRST_INSTANCE
    label = value // _FIRST_INSTANCE if is_object else value
    if is_object and label not in things and label not in VOID_IDS_WITH_INSTANCES:
        return None
    if label in VOID_IDS:
        return NO_CLASS, False
    return (table[label], label in things and not is_object) if label in table else None


BENCHMARKS = (
    Benchmark(
        name="cityscapes_19",
        vocabulary=VOCABULARY,
        layout=LAYOUT.format(what="semantic", kind="labelIds", bits="8 bits: label ids 0..33"),
        find=find_semantic,
        splits=_IMAGES,
        protocol=Protocol(),
        column=ReportColumn("Cityscapes", 3, {GKC_R50: 34.3, GKC_R101: 34.8, GKC_R50_OPENTRANS: 33.9}),
    ),
    Benchmark(
        name="cityscapes_panoptic_19",
        vocabulary=VOCABULARY,
        layout=LAYOUT.format(
            what="panoptic, from the instance ids",
            kind="instanceIds",
            bits="16 bits: label id, or label id * 1000 + instance",
        ),
        find=find_panoptic,
        splits=_IMAGES,
        protocol=Protocol(tasks=("semantic", "panoptic")),
    ),
)
