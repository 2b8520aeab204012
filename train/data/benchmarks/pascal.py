"""PASCAL VOC 2012 (Everingham et al., IJCV 2015) and PASCAL-Context (Mottaghi et al., CVPR 2014)."""

from collections import defaultdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ...storage.checksums import read_json
from ..readers.coco_masks import run_length_mask
from ..sources import AnnotatedImage, Segmentation
from .base import Benchmark, check_size, look_up, raw_ids, read_numbers, require, semantic_segments
from .pairs import listed, names_in
from .protocol import FC_CLIP_R50, GKC_R50, GKC_R50_OPENTRANS, GKC_R101, Protocol, ReportColumn

VOC_20, VOC_21, CONTEXT_59, CONTEXT_459 = "pascal_voc_20", "pascal_voc_21", "pascal_context_59", "pascal_context_459"
_BACKGROUND_WORDS = "pascal_voc_background_39"
_BOUNDARY = 255
_LAST_LABEL = 459
_MERGED_JSON = {
    "images": [{"image_id": (int, str), "file_name": str, "phase": str}],
    "annos_segmentation": [{"image_id": (int, str), "category_id": int, "segmentation": {}}],
}

_VOC_FOLDER = """

    DIR/VOC2012/JPEGImages/*.jpg
    DIR/VOC2012/SegmentationClass/*.png                       palette images, the index is the class
    DIR/VOC2012/ImageSets/Segmentation/train.txt, val.txt

DIR is VOCdevkit, or VOC2012 itself. """
VOC_20_LAYOUT = f"PASCAL VOC 2012: 20 object classes, the background is void.{_VOC_FOLDER}0 and 255 are void."
VOC_21_LAYOUT = f"PASCAL VOC 2012: 20 object classes and the background as class 0.{_VOC_FOLDER}255 is void."
VOC_20B_LAYOUT = (
    "PASCAL VOC 2012: 20 object classes and the background as the last class, prompted with background words."
    f"{_VOC_FOLDER}255 is void."
)
_CONTEXT_FOLDER = """

    DIR/VOC2010/JPEGImages/*.jpg
    DIR/VOC2010/trainval/*.mat                    LabelMap, 0..459; without this folder:
    DIR/VOC2010/trainval_merged.json              the same labels as run lengths (or in DIR)
    DIR/VOC2010/ImageSets/Main/train.txt, val.txt

DIR is VOCdevkit, or VOC2010 itself. The split of an image is its `phase` in trainval_merged.json. Without that file
the lists train.txt and val.txt in ImageSets/SegmentationContext, or else in ImageSets/Main, define the splits.
0 is void"""
CONTEXT_59_LAYOUT = f"PASCAL-Context: the 59 frequent classes.{_CONTEXT_FOLDER}, and so are the other 400 labels."
CONTEXT_459_LAYOUT = f"PASCAL-Context: all 459 classes.{_CONTEXT_FOLDER}."
CONTEXT_COUNTS = {"train": 4_998, "val": 5_105}
CONTEXT_NOTE = "Some projects use a list of 5,104 validation images, one fewer, for unknown reasons."


def find_voc(void: tuple[int, ...], source: Path, split: str) -> list[AnnotatedImage]:
    """Return the images of a VOC 2012 split in the order of its list."""
    folder = _year(source, "VOC2012")
    names = names_in(folder / "ImageSets" / "Segmentation" / f"{split}.txt")
    images, maps = require(folder / "JPEGImages"), require(folder / "SegmentationClass")
    return listed(names, images, maps, partial(_read_voc, void), split)


def _year(source: Path, year: str) -> Path:
    return source / year if (source / year).is_dir() else source


def _read_voc(void: tuple[int, ...], path: Path, shape: tuple[int, int]) -> Segmentation:
    table = {raw: index for raw, index in raw_ids(VOC_21).items() if raw not in void}
    if 0 in void:
        table = raw_ids(VOC_20)
    return semantic_segments(look_up(read_numbers(path, shape, ("P", "L")), table, void, path))


def find_context(vocabulary: str, source: Path, split: str) -> list[AnnotatedImage]:
    """Return the images of a PASCAL-Context split, annotated by the .mat files or the merged JSON."""
    folder = _year(source, "VOC2010")
    images = require(folder / "JPEGImages", "the images of VOC 2010")
    merged = next(
        (p / "trainval_merged.json" for p in (folder, source) if (p / "trainval_merged.json").is_file()), None
    )
    if (folder / "trainval").is_dir():
        names = _names(folder, merged, split)
        return listed(names, images, folder / "trainval", partial(_read_mat, vocabulary), split, (".jpg", ".mat"))
    if merged is None:
        raise ValueError(
            f"There is neither {folder / 'trainval'}, the folder of the .mat files, nor "
            f"{folder / 'trainval_merged.json'}: the folder is not laid out as published."
        )
    return _find_merged(vocabulary, images, merged, split)


def _names(folder: Path, merged: Path | None, split: str) -> list[str]:
    if merged is not None:
        return [
            Path(image["file_name"]).stem
            for image in read_json(merged, shape=_MERGED_JSON)["images"]
            if image["phase"] == split
        ]
    lists = [folder / "ImageSets" / place / f"{split}.txt" for place in ("SegmentationContext", "Main")]
    # The lists in Main have a second column in some releases.
    return [name.split()[0] for name in names_in(next((path for path in lists if path.is_file()), lists[-1]))]


def _find_merged(vocabulary: str, images: Path, path: Path, split: str) -> list[AnnotatedImage]:
    content = read_json(path, shape=_MERGED_JSON)
    masks = defaultdict(list)
    for annotation in content["annos_segmentation"]:
        masks[annotation["image_id"]].append((annotation["category_id"], annotation["segmentation"]))
    return [
        AnnotatedImage(
            Path(image["file_name"]).stem,
            images / image["file_name"],
            partial(_read_merged, vocabulary, path, image["file_name"], masks[image["image_id"]]),
            split,
        )
        for image in content["images"]
        if image["phase"] == split
    ]


def _segmentation(vocabulary: str, labels: np.ndarray, path: Path | str) -> Segmentation:
    table = raw_ids(vocabulary)
    void = set(range(_LAST_LABEL + 1)) - table.keys()
    return semantic_segments(look_up(labels, table, void, path))


def _read_mat(vocabulary: str, path: Path, shape: tuple[int, int]) -> Segmentation:
    try:
        from scipy.io import loadmat
    except ImportError as error:
        raise RuntimeError("The .mat files of PASCAL-Context are read by scipy: pip install scipy") from error
    if not path.is_file():
        raise FileNotFoundError(f"{path}: The file is missing")
    try:
        labels = loadmat(path)["LabelMap"]
    except Exception as error:  # scipy raises errors of many types
        raise ValueError(f"{path}: The LabelMap cannot be read: {error}") from error
    check_size(path, labels.shape, shape)
    return _segmentation(vocabulary, labels, path)


def _read_merged(
    vocabulary: str, path: Path, name: str, masks: list[tuple[int, dict[str, Any]]], shape: tuple[int, int]
) -> Segmentation:
    place = f"{path}, {name}"
    if not masks:
        raise ValueError(f"{path.name} has no annotation of this image")
    labels = np.zeros(shape, dtype=np.int32)
    for category, code in masks:
        try:
            mask = run_length_mask(code, shape)
        except ValueError as error:
            raise ValueError(f"{place}: {error}") from error
        taken = labels[mask]
        if wrong := sorted(set(taken.tolist()) - {0, category}):
            raise ValueError(f"{place}: The masks of the classes {wrong} and {category} overlap")
        labels[mask] = category
    return _segmentation(vocabulary, labels, place)


_VOC_COUNTS = {"train": 1_464, "val": 1_449}
_OTHER_COUNTS = {"val": (5_104,)}

BENCHMARKS = (
    Benchmark(
        VOC_20,
        VOC_20,
        VOC_20_LAYOUT,
        partial(find_voc, (0, _BOUNDARY)),
        _VOC_COUNTS,
        protocol=Protocol(note="the background is not scored"),
        column=ReportColumn("PAS-20", 2, {GKC_R50: 78.7, GKC_R101: 83.2, GKC_R50_OPENTRANS: 71.2, FC_CLIP_R50: 89.5}),
    ),
    Benchmark(
        VOC_21,
        VOC_21,
        VOC_21_LAYOUT,
        partial(find_voc, (_BOUNDARY,)),
        _VOC_COUNTS,
        protocol=Protocol(
            background_class=0,
            background_words=_BACKGROUND_WORDS,
            note="the background is scored; its words are names of one class",
        ),
    ),
    Benchmark(
        "pascal_voc_20b",
        VOC_21,
        VOC_20B_LAYOUT,
        partial(find_voc, (_BOUNDARY,)),
        _VOC_COUNTS,
        subset=(*range(1, 21), 0),
        protocol=Protocol(
            background_class=20,
            background_words=_BACKGROUND_WORDS,
            background_as="classes",
            note="prompted with 20 + 39 words; pixels of the 39 words become background",
        ),
    ),
    Benchmark(
        CONTEXT_59,
        CONTEXT_59,
        CONTEXT_59_LAYOUT,
        partial(find_context, CONTEXT_59),
        CONTEXT_COUNTS,
        CONTEXT_NOTE,
        _OTHER_COUNTS,
        protocol=Protocol(note="other labels and unlabeled pixels are not scored"),
        column=ReportColumn("PC-59", 6, {GKC_R50: 41.9, GKC_R101: 45.2, GKC_R50_OPENTRANS: 39.0, FC_CLIP_R50: 50.5}),
    ),
    Benchmark(
        CONTEXT_459,
        CONTEXT_459,
        CONTEXT_459_LAYOUT,
        partial(find_context, CONTEXT_459),
        CONTEXT_COUNTS,
        CONTEXT_NOTE,
        _OTHER_COUNTS,
        protocol=Protocol(),
        column=ReportColumn("PC-459", 7, {GKC_R50: 6.5, GKC_R101: 7.1, GKC_R50_OPENTRANS: 7.1, FC_CLIP_R50: 12.9}),
    ),
)
