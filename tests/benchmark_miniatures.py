"""Miniature copies of the image benchmarks in their published layout and encoding, with ground truth made by hand.

Annotations are drawn with letters; each benchmark defines the value of a letter in its files and its train id. `-` and
`x` are void or special in most of them.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from pycocotools import mask as coder
from scipy.io import savemat

DRAWINGS = {
    "first": ["aaaabbbb", "aaaabbbb", "aacc--bb", "aacc--xx", "aacc--xx"],
    "second": ["--bb", "bbbb", "bbbb"],
    "third": ["aac", "ccc", "xxc", "x-c", "ccc", "---"],
}


def letters_of(name: str) -> np.ndarray:
    """Return the letters (H, W) of a drawing."""
    return np.array([list(row) for row in DRAWINGS[name]])


def translated(name: str, values: Mapping[str, Any]) -> np.ndarray:
    """Return a drawing (H, W) or (H, W, C) with each letter replaced by its value."""
    letters = letters_of(name)
    sample = np.asarray(next(iter(values.values())))
    result = np.zeros((*letters.shape, *sample.shape), dtype=np.int64)
    for letter, value in values.items():
        result[letters == letter] = value
    return result


@dataclass
class Miniature:
    """Miniature of a benchmark.

    Attributes:
        benchmark: Name of the benchmark.
        source: Folder of its files.
        raw: Value of each letter in an annotation.
        train_ids: Class of each letter; -1 is void.
        save: Function that writes raw values (H, W) or (H, W, C) as an annotation.
        unexpected: A raw value that is not allowed in annotations.
        names: Image ids by split and drawing.
        images: Image files by image id.
        annotations: Annotation files by image id.
    """

    benchmark: str
    source: Path
    raw: Mapping[str, Any]
    train_ids: Mapping[str, int]
    save: Callable[[np.ndarray, Path], None]
    unexpected: Any
    names: dict[str, dict[str, str]] = field(default_factory=dict)
    images: dict[str, Path] = field(default_factory=dict)
    annotations: dict[str, Path] = field(default_factory=dict)

    def add(self, split: str, drawing: str, image: Path, annotation: Path) -> None:
        """Write an image and its annotation."""
        image_id = image.stem
        self.names.setdefault(split, {})[drawing] = image_id
        self.images[image_id], self.annotations[image_id] = image, annotation
        write_photo(image, letters_of(drawing).shape)
        annotation.parent.mkdir(parents=True, exist_ok=True)
        self.save(translated(drawing, self.raw), annotation)

    def truth(self, split: str) -> dict[str, np.ndarray]:
        """Return the train ids (H, W) of a split by image id."""
        return {image_id: translated(drawing, self.train_ids) for drawing, image_id in self.names[split].items()}

    def spoil(self, image_id: str) -> None:
        """Set a pixel of an annotation to a value that is not allowed."""
        drawing = next(d for names in self.names.values() for d, name in names.items() if name == image_id)
        raw = translated(drawing, self.raw)
        raw[0, 0] = self.unexpected
        self.save(raw, self.annotations[image_id])

    def crop(self, image_id: str) -> None:
        """Remove the last row of an annotation."""
        drawing = next(d for names in self.names.values() for d, name in names.items() if name == image_id)
        self.save(translated(drawing, self.raw)[:-1], self.annotations[image_id])


def write_photo(path: Path, shape: tuple[int, int]) -> None:
    """Write a JPEG of noise that depends on its name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(sum(path.name.encode()))
    Image.fromarray(generator.integers(0, 256, (*shape, 3), dtype=np.uint8)).save(path, quality=90)


def save_gray(raw: np.ndarray, path: Path) -> None:
    """Write an 8-bit image with one channel."""
    Image.fromarray(raw.astype(np.uint8)).save(path)


def save_palette(raw: np.ndarray, path: Path) -> None:
    """Write a palette image whose colors differ from the indices."""
    image = Image.new("P", raw.shape[::-1])
    image.putpalette([(37 * value + 11 * channel) % 256 for value in range(256) for channel in range(3)])
    image.putdata(raw.ravel().tolist())
    image.save(path)


def save_colors(raw: np.ndarray, path: Path) -> None:
    """Write an RGB image."""
    Image.fromarray(raw.astype(np.uint8)).save(path)


def save_label_map(raw: np.ndarray, path: Path) -> None:
    """Write a 16-bit MATLAB file."""
    savemat(path, {"LabelMap": raw.astype(np.uint16)}, do_compression=True)


def split_colors(number: int) -> list[int]:
    """Return the color (R, G, B) that encodes an id."""
    return [number % 256, number // 256 % 256, number // 65536]


# COCO segments by letter: id, raw category, crowd. x is a bicycle, a novel class.
COCO_SEGMENTS = {"a": (2 * 65536 + 3, 1, 0), "b": (7 * 256, 200, 0), "c": (5, 1, 1), "x": (300, 2, 0)}


def coco_panoptic(folder: Path, benchmark: str = "coco_panoptic_133") -> Miniature:
    """Write two val and three train images, and captions of val that are not in the order of the images."""
    raw = {letter: split_colors(number) for letter, (number, _, _) in COCO_SEGMENTS.items()} | {"-": [0, 0, 0]}
    truth = {"a": 0, "b": 132, "c": 0, "x": 1, "-": -1}
    mini = Miniature(benchmark, folder, raw, truth, save_colors, [9, 9, 9])
    for split, drawings in {"val": ["first", "second"], "train": ["third", "second", "first"]}.items():
        images, annotations = [], []
        for number, drawing in enumerate(drawings):
            image_id = number + (100 if split == "train" else 139)
            stem = f"{image_id:012d}"
            png = folder / f"panoptic_{split}2017" / f"{stem}.png"
            mini.add(split, drawing, folder / f"{split}2017" / f"{stem}.jpg", png)
            images.append({"id": image_id, "file_name": f"{stem}.jpg"})
            present = [COCO_SEGMENTS[letter] for letter in sorted(set(letters_of(drawing).ravel())) if letter != "-"]
            infos = [{"id": n, "category_id": category, "iscrowd": crowd} for n, category, crowd in present]
            annotations.append({"image_id": image_id, "file_name": f"{stem}.png", "segments_info": infos})
        write_json(
            folder / "annotations" / f"panoptic_{split}2017.json",
            {"images": images, "annotations": annotations[::-1], "categories": []},
        )
    sentences = [(8, 139, " A second sentence.\n"), (3, 139, "A first one."), (5, 140, "Only one.")]
    captions = [{"id": number, "image_id": image, "caption": text} for number, image, text in sentences]
    write_json(folder / "annotations" / "captions_val2017.json", {"annotations": captions})
    return mini


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def coco_stuff(folder: Path) -> Miniature:
    """Write COCO-Stuff, whose pixel values start at 0 and end at 181; labels.txt, which starts at 1, ends at 182."""
    raw, truth = {"a": 0, "b": 181, "c": 12, "x": 255, "-": 255}, {"a": 0, "b": 170, "c": 11, "x": -1, "-": -1}
    mini = Miniature("coco_stuff_171", folder, raw, truth, save_gray, 182)
    for split, drawing in (("val", "first"), ("val", "second"), ("train", "third")):
        maps = folder / "stuffthingmaps_trainval2017" / f"{split}2017"
        mini.add(split, drawing, folder / f"{split}2017" / f"{drawing}.jpg", maps / f"{drawing}.png")
    return mini


def ade20k(folder: Path) -> Miniature:
    """Write ADE20K-150, where 0 is void and 1 the first class."""
    raw, truth = {"a": 1, "b": 150, "c": 8, "x": 0, "-": 0}, {"a": 0, "b": 149, "c": 7, "x": -1, "-": -1}
    mini = Miniature("ade20k_150", folder, raw, truth, save_gray, 151)
    for split, part, number, drawing in (
        ("val", "validation", 1, "first"),
        ("val", "validation", 2, "second"),
        ("train", "training", 1, "third"),
    ):
        name = f"ADE_{split}_{number:08d}"
        annotation = folder / "annotations" / part / f"{name}.png"
        mini.add(split, drawing, folder / "images" / part / f"{name}.jpg", annotation)
    (folder / "objectInfo150.txt").write_text("Idx\tRatio\n")
    return mini


def full_index(index: int, part: int = 3) -> list[int]:
    """Return the color of a class index of ADE20K-Full, with a part digit in R and an object number in B."""
    return [index // 256 * 10 + part, index % 256, 77]


def ade20k_full(folder: Path) -> Miniature:
    """Write ADE20K-Full with class indices above 255; x is an index that is not among the 847."""
    raw = {
        "a": full_index(2978),
        "b": full_index(3148, 9),
        "c": full_index(774, 0),
        "x": full_index(1),
        "-": [0, 0, 0],
    }
    truth = {"a": 0, "b": 846, "c": 20, "x": -1, "-": -1}
    mini = Miniature("ade20k_847", folder, raw, truth, save_colors, full_index(3840))
    for split, part, name, drawing in (
        ("train", "training/unknown/outlier", "ADE_frame_00000007", "third"),
        ("train", "training/urban/street", "ADE_train_00000001", "second"),
        ("val", "validation/home_or_hotel/bedroom", "ADE_val_00000001", "first"),
    ):
        place = folder / "images" / "ADE" / part
        mini.add(split, drawing, place / f"{name}.jpg", place / f"{name}_seg.png")
        Image.new("RGB", (4, 4)).save(place / f"{name}_parts_1.png")
        (place / f"{name}.json").write_text("{}")
    (folder / "index_ade20k.pkl").write_bytes(b"cos\nsystem\n(S'exit 1'\ntR.")  # runs a program if unpickled
    return mini


VOC_TRUTHS = {
    "pascal_voc_20": {"a": 0, "b": 19, "c": 14, "-": -1, "x": -1},
    "pascal_voc_21": {"a": 1, "b": 20, "c": 15, "-": 0, "x": -1},
    "pascal_voc_20b": {"a": 0, "b": 19, "c": 14, "-": 20, "x": -1},
}


def pascal_voc(folder: Path, benchmark: str) -> Miniature:
    """Write PASCAL VOC as palette images whose colors differ from the classes."""
    raw, place = {"a": 1, "b": 20, "c": 15, "-": 0, "x": 255}, folder / "VOC2012"
    mini = Miniature(benchmark, folder, raw, VOC_TRUTHS[benchmark], save_palette, 21)
    for split, names in {"val": ["second", "first"], "train": ["third"]}.items():
        for name in names:
            annotation = place / "SegmentationClass" / f"2007_{name}.png"
            mini.add(split, name, place / "JPEGImages" / f"2007_{name}.jpg", annotation)
        lists = place / "ImageSets" / "Segmentation"
        lists.mkdir(parents=True, exist_ok=True)
        (lists / f"{split}.txt").write_text("".join(f"2007_{name}\n" for name in names))
    write_photo(place / "JPEGImages" / "2007_without_annotation.jpg", (4, 4))  # like most of VOC's images
    return mini


CONTEXT_RAW = {
    "pascal_context_59": {"a": 2, "b": 458, "c": 284, "x": 431, "-": 0},
    "pascal_context_459": {"a": 1, "b": 459, "c": 255, "x": 256, "-": 0},
}
CONTEXT_TRUTHS = {
    "pascal_context_59": {"a": 0, "b": 58, "c": 36, "x": -1, "-": -1},
    "pascal_context_459": {"a": 0, "b": 458, "c": 254, "x": 255, "-": -1},
}
CONTEXT_SPLITS = {"val": ["first", "third"], "train": ["second"]}


def pascal_context(folder: Path, benchmark: str) -> Miniature:
    """Write PASCAL Context as 16-bit MATLAB label maps."""
    place = folder / "VOC2010"
    mini = Miniature(benchmark, folder, CONTEXT_RAW[benchmark], CONTEXT_TRUTHS[benchmark], save_label_map, 460)
    for split, names in CONTEXT_SPLITS.items():
        for name in names:
            mini.add(split, name, place / "JPEGImages" / f"2008_{name}.jpg", place / "trainval" / f"2008_{name}.mat")
        lists = place / "ImageSets" / "Main"
        lists.mkdir(parents=True, exist_ok=True)
        (lists / f"{split}.txt").write_text("".join(f"2008_{name}\n" for name in names))
    return mini


def pascal_context_merged(folder: Path, benchmark: str) -> Miniature:
    """Write PASCAL Context as one JSON file with run lengths, one of them uncompressed, without the .mat files."""
    mini = pascal_context(folder, benchmark)
    place, images, masks = folder / "VOC2010", [], []
    for split, names in CONTEXT_SPLITS.items():
        for name in names:
            labels = translated(name, mini.raw)
            images.append({"image_id": len(images) + 5, "file_name": f"2008_{name}.jpg", "phase": split})
            for category in sorted(set(labels.ravel().tolist()) - {0}):
                code = run_lengths(labels == category, compressed=bool(masks))
                masks.append({"image_id": images[-1]["image_id"], "category_id": category, "segmentation": code})
            (place / "trainval" / f"2008_{name}.mat").unlink()
            mini.annotations.clear()
    (place / "trainval").rmdir()
    write_json(place / "trainval_merged.json", {"images": images, "annos_segmentation": masks})
    return mini


def run_lengths(mask: np.ndarray, compressed: bool = True) -> dict[str, Any]:
    """Encode a mask (H, W) as COCO run lengths."""
    if compressed:
        code = coder.encode(np.asfortranarray(mask.astype(np.uint8)))
        return {"size": code["size"], "counts": code["counts"].decode()}
    flat = np.concatenate([[0], mask.ravel(order="F").astype(int), [2]])
    ends = np.flatnonzero(flat[1:] != flat[:-1])
    counts = np.diff(np.concatenate([[0], ends])).tolist()
    return {"size": list(mask.shape), "counts": counts}
