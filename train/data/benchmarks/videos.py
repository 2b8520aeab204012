"""VSPW (Miao et al., CVPR 2021) and VIPSeg (Miao et al., CVPR 2022): videos, semantic and panoptic.

An `image_id` is VIDEO/FRAME, as in the file names. `frame` numbers the frames of a video from 0, including unreadable
ones. Segments of VIPSeg have the same id in all frames of a video.
"""

import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image

from modeling_gkc.vocabulary_files import packaged_facts

from ...storage.checksums import read_json
from ..schema import VOID, ids_within
from ..sources import IMAGE_SUFFIXES, AnnotatedImage, Segmentation
from ..splits import novel_positions
from .base import Benchmark, look_up, raw_ids, read_color_ids, read_numbers, require, semantic_segments
from .protocol import Protocol, ReportColumn
from .raw_segments import BITS_16, segments_of_values

VSPW, VIPSEG = "vspw_124", "vipseg_124"
VSPW_LAYOUT = """\
VSPW: semantic segmentation of videos

    use the archive VSPW_480p, not the full-size release
    train.txt, val.txt               names of 2,806 and 343 videos
    data/VIDEO/origin/FRAME.jpg      data/VIDEO/mask/FRAME.png    0 and 255 void, else 1..124"""
VIPSEG_LAYOUT = """\
VIPSeg: panoptic segmentation of videos

    use the archive, or the 720p version that the authors' scripts create, which is preferred if it exists
    train.txt, val.txt               names of 2,806 and 343 videos
    imgs/VIDEO/FRAME.jpg             panomasks/VIDEO/FRAME.png    16 bits: 0 void, 1..124, 100 * class + instance
    VIPSeg_720P/images/VIDEO/FRAME.jpg    VIPSeg_720P/panomasksRGB/VIDEO/FRAME.png
    VIPSeg_720P/panoptic_gt_VIPSeg.json, or ..._train.json and ..._val.json"""
DAMAGED_VIDEO = "988_f_Xvy_DCPt8"
_VSPW_DISCREPANCY = (
    f"Frames of the video {DAMAGED_VIDEO} are empty files (0 bytes) in the first release: download a later one, or "
    "skip them. The number of val frames, 24502, is from the literature, not from the release."
)
VSPW_VOID = (0, 255)
_VIDEOS = {"train": 2806, "val": 343}
_VSPW_HEIGHT, _VIPSEG_HEIGHT = 480, 720
_SMALL = "VIPSeg_720P"
_LAST_STUFF, _INSTANCES_OF_A_CLASS = 124, 100


def find_vspw(folder: Path, split: str) -> list[AnnotatedImage]:
    """Return the frames of a VSPW split with one segment per class.

    Raises:
        ValueError: If the folder does not have the published layout.

    Warns:
        UserWarning: If the number of videos differs from the published number, or frames are not 480 pixels high.
    """
    root = folder / "VSPW_480p" if (folder / "VSPW_480p").is_dir() else folder
    data, read = require(root / "data", "the videos"), partial(_read_vspw, raw_ids(VSPW))
    frames = []
    for video in _video_names(root / f"{split}.txt", split):
        frames += _frames(video, data / video / "origin", data / video / "mask", lambda _, mask: partial(read, mask))
    advice = "this seems to be the full-size release, on which no numbers are published: use VSPW_480p"
    _warn_of_heights(frames, _VSPW_HEIGHT, advice)
    return frames


def _read_vspw(table: Mapping[int, int], mask: Path, shape: tuple[int, int]) -> Segmentation:
    return semantic_segments(look_up(read_numbers(mask, shape), table, VSPW_VOID, mask))


def find_vipseg(folder: Path, split: str) -> list[AnnotatedImage]:
    """Return the frames of a VIPSeg split with one segment per object or stuff class.

    Raises:
        ValueError: If the folder does not have the published layout, or the JSON has other categories.

    Warns:
        UserWarning: If the number of videos differs from the published number, or frames are not 720 pixels high.
    """
    small = folder / _SMALL if (folder / _SMALL).is_dir() else folder
    has_own_list = folder.name != _SMALL or (folder / f"{split}.txt").is_file()
    names = folder if has_own_list else folder.parent
    found = [small / f"panoptic_gt_VIPSeg{end}.json" for end in (f"_{split}", "")]
    annotations = next((path for path in found if path.is_file()), None)
    if annotations is not None and (small / "panomasksRGB").is_dir():
        frames = _find_vipseg_json(small, annotations, names / f"{split}.txt", split)
    else:
        root = small if (small / "panomasks").is_dir() else folder
        frames = _find_vipseg_raw(root, names / f"{split}.txt", split)
    advice = "published results are at that height, which the authors' scripts resize to; see --help"
    _warn_of_heights(frames, _VIPSEG_HEIGHT, advice)
    return frames


def _find_vipseg_raw(folder: Path, names: Path, split: str) -> list[AnnotatedImage]:
    images = next((folder / name for name in ("imgs", "images") if (folder / name).is_dir()), folder / "imgs")
    require(images, "the images")
    masks = require(folder / "panomasks", "the masks")
    things = [bool(entry["is_thing"]) for entry in packaged_facts(VIPSEG)["classes"]]
    read = partial(_read_vipseg_raw, things)
    frames = []
    for video in _video_names(names, split):
        frames += _frames(video, images / video, masks / video, lambda _, mask: partial(read, mask))
    return frames


def _read_vipseg_raw(things: Sequence[bool], mask: Path, shape: tuple[int, int]) -> Segmentation:
    def meaning(value: int) -> tuple[int, bool] | None:
        """Return the class of a raw value; raw values number classes from 1, and objects without a number are one."""
        if value <= _LAST_STUFF:
            return value - 1, False  # 0 becomes -1, void
        category = value // _INSTANCES_OF_A_CLASS - 1
        return (category, False) if category < len(things) and things[category] else None

    return segments_of_values(read_numbers(mask, shape, BITS_16), meaning, mask)


def _find_vipseg_json(root: Path, path: Path, names: Path, split: str) -> list[AnnotatedImage]:
    content = read_json(path, "create it again with the authors' script.", _VIPSEG_JSON)
    _check_categories(content["categories"], path)
    annotated = {  # category of each segment id, by video and frame
        video["video_id"]: {
            Path(frame["file_name"]).stem: {info["id"]: info["category_id"] for info in frame["segments_info"]}
            for frame in video["annotations"]
        }
        for video in content["annotations"]
    }
    # The JSON of all splits requires the list; that of one split is checked against the list, if it exists.
    needs_list = names.is_file() or not path.stem.endswith(f"_{split}")
    videos = _video_names(names, split) if needs_list else sorted(annotated)
    if not needs_list:
        _warn_of_number(videos, split, path)
    frames = []
    for video in videos:
        of_video = annotated.get(video, {})
        read = partial(partial, _read_vipseg_json, path, of_video)
        frames += _frames(video, root / "images" / video, root / "panomasksRGB" / video, read, of_video)
    return frames


_VIPSEG_JSON = {
    "categories": [{"id": int, "name": str}],
    "annotations": [
        {
            "video_id": str,
            "annotations": [{"file_name": str, "segments_info": [{"id": int, "category_id": int}]}],
        }
    ],
}


def _check_categories(categories: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Check that the category ids of a JSON file are those of VIPSeg, not numbered from 1 or of a subset."""
    entries = packaged_facts(VIPSEG)["classes"]
    expected = {entry["id"]: entry.get("official_name", entry["name"]) for entry in entries}
    found = {category["id"]: category["name"] for category in categories}
    if found != expected:
        number = min(key for key in found.keys() | expected.keys() if found.get(key) != expected.get(key))
        raise ValueError(
            f"{path}: Category {number} is {found.get(number)!r}, but in VIPSeg {expected.get(number)!r}; use the "
            "authors' panoVIPSeg_categories.json, which numbers 124 classes from 0."
        )


def _read_vipseg_json(
    path: Path, frames: Mapping[str, Mapping[int, int]], frame: str, mask: Path, shape: tuple[int, int]
) -> Segmentation:
    if frame not in frames:
        raise ValueError(f"{mask}: {path} does not describe this frame")
    listed, ids = frames[frame], read_color_ids(mask, shape)
    present = set(ids_within(ids).tolist()) - {VOID}
    if present != listed.keys():
        raise ValueError(
            f"{mask}: Ids only in the image {sorted(present - listed.keys())}, only in {path} "
            f"{sorted(listed.keys() - present)}"
        )
    num_classes = len(raw_ids(VIPSEG))
    unknown = sorted(set(listed.values()) - set(range(num_classes)))
    if unknown:
        raise ValueError(f"{mask}: {path} gives it the categories {unknown}, expected 0 to {num_classes - 1}")
    changed = sorted(
        key for key in listed if any(other.get(key, listed[key]) != listed[key] for other in frames.values())
    )
    if changed:
        raise ValueError(f"{mask}: The segments {changed} have another category in other frames of the video")
    return ids, [{"id": key, "category_id": listed[key], "iscrowd": False} for key in sorted(listed)]


def _video_names(path: Path, split: str) -> list[str]:
    """Return the videos of a split in the order of its list.

    Raises:
        ValueError: If the list is missing or empty, or names a video twice.
    """
    require(path, "the list of videos")
    names = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    repeated = sorted({name for name in names if names.count(name) > 1}) if len(set(names)) < len(names) else []
    if repeated or not names:
        raise ValueError(f"{path} names {f'{repeated[:5]} more than once' if repeated else 'no video'}.")
    _warn_of_number(names, split, path)
    return names


def _warn_of_number(videos: Sequence[str], split: str, path: Path) -> None:
    if len(videos) != _VIDEOS[split]:
        warnings.warn(f"{path} names {len(videos)} videos; {_VIDEOS[split]} are published.", UserWarning, stacklevel=2)


def _frames(
    video: str, images: Path, masks: Path, reader: Callable[[str, Path], partial], listed: Collection[str] = ()
) -> list[AnnotatedImage]:
    """Return the frames of a video in order: those with an image, with a mask or listed, to report missing files.

    Args:
        video: Name of the video.
        images: Folder of its images.
        masks: Folder of its masks.
        reader: Function that maps the name and mask file of a frame to its `AnnotatedImage.read`.
        listed: Names of further required frames.
    """
    image_files, mask_files = _files(images), _files(masks)
    names = sorted({*image_files, *mask_files, *listed}, key=lambda name: (int(name) if name.isdecimal() else 0, name))
    if not names:  # reports a missing video, which would be skipped otherwise
        return [AnnotatedImage(video, images / "(no frames)", reader("", masks), video_id=video)]
    return [
        AnnotatedImage(
            f"{video}/{name}",
            image_files.get(name, images / f"{name}.jpg"),
            reader(name, mask_files.get(name, masks / f"{name}.png")),
            video_id=video,
            frame=number,
        )
        for number, name in enumerate(names)
    ]


def _files(folder: Path) -> dict[str, Path]:
    """Return the image files in a folder by name without suffix."""
    found = folder.iterdir() if folder.is_dir() else ()
    return {p.stem: p for p in found if p.suffix.casefold() in IMAGE_SUFFIXES and not p.name.startswith(".")}


def _warn_of_heights(frames: Sequence[AnnotatedImage], expected: int, advice: str) -> None:
    """Warn about videos of another height, by reading the header of one frame of each."""
    first = {frame.video_id: frame.path for frame in reversed(frames)}
    heights = {video: _height(path) for video, path in first.items()}
    other = [video for video, height in heights.items() if height not in (expected, None)]
    if other:
        warnings.warn(
            f"Frames of {len(other)} of {len(heights)} videos are not {expected} pixels high ({other[-1]}: "
            f"{heights[other[-1]]}): {advice}.",
            UserWarning,
            stacklevel=3,
        )


def _height(path: Path) -> int | None:
    try:
        with Image.open(path) as image:
            return image.height
    except Exception:  # Pillow raises errors of many types; the file is reported when it is read
        return None


def _subset(name: str, novel: bool) -> Benchmark:
    positions = novel_positions(VIPSEG)
    kept = [index for index in range(len(raw_ids(VIPSEG))) if (index in positions) == novel]
    return Benchmark(
        name=name,
        vocabulary=VIPSEG,
        layout=VIPSEG_LAYOUT,
        find=find_vipseg,
        splits=dict.fromkeys(_VIDEOS),
        subset=kept,
    )


BENCHMARKS = (
    Benchmark(
        name="vspw_124",
        vocabulary=VSPW,
        layout=VSPW_LAYOUT,
        find=find_vspw,
        splits={"train": None, "val": 24502},
        discrepancy=_VSPW_DISCREPANCY,
        protocol=Protocol(tasks=("semantic", "video"), note="the whole validation split at 480p"),
        column=ReportColumn("VSPW", 8),
    ),
    Benchmark(
        name="vipseg_124",
        vocabulary=VIPSEG,
        layout=VIPSEG_LAYOUT,
        find=find_vipseg,
        splits=dict.fromkeys(_VIDEOS),
        protocol=Protocol(
            tasks=("semantic", "video"), short_side=360, note="scored frame by frame; the paper tests videos at 360"
        ),
        column=ReportColumn("VIPSeg", 9),
    ),
    _subset("vipseg_124_base", novel=False),
    _subset("vipseg_124_novel", novel=True),
)
