"""Fuzzer of annotation files: COCO instance and panoptic JSON, labelme JSON, YOLO text files and folders of masks.

Two small images are annotated with rectangles, one value of the annotation is replaced or removed, and the folder is
read. An independent interpreter of each format, below, returns the class of every pixel, except near slanted edges, or
that an image must be skipped. The library may reject more than the interpreter, by an error that names the folder;
what it accepts must be equal, and what it skips must be reported.
"""

import copy
import json
import math
import random
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image

from modeling_gkc.run_length import encode_rle
from train.data.from_folder import find_source
from train.data.schema import encode_ids
from train.data.sources import read_annotated

HEIGHT, WIDTH = 20, 30
SHAPE = HEIGHT, WIDTH
FILES = ("a", "b")
# Left, top, right and bottom of each image's objects, from large to small, so that the last one is on top.
BOXES = {"a": [(1, 2, 25, 18), (3, 4, 9, 12), (12, 5, 15, 8)], "b": [(0, 0, 15, 19), (16, 2, 28, 9), (17, 3, 19, 6)]}
NAMES = ["grass", "disc", "sky"]
JUNK = [None, True, False, 0, 1, -1, 2.5, 7, 1e9, -1e9, 10**400, 2**31, math.nan, math.inf, "", "0", "1", "x", [], {}]
EDGE_MARGIN = 1.1  # pixels closer to a slanted edge than this are not compared

Interpreter = Callable[[], "dict[str, Expected | None]"]


class RefusedError(Exception):
    """Error raised when the folder, or one of its images, must be rejected."""


@dataclass
class Expected:
    """Expected pixels of an image.

    Args:
        classes: Class names (H, W), with a star for crowds and "" for void.
        uncertain: Mask (H, W) of pixels that are not compared.
        is_reported: Whether a part of the annotation was skipped, which must be reported.
    """

    classes: np.ndarray
    uncertain: np.ndarray
    is_reported: bool = False


def setup(folder: Path) -> Path:
    """Return the folder that the inputs are written to."""
    return folder


def check(context: Path, rng: random.Random) -> str:
    """Change one annotated folder and read it."""
    folder = context / "case"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    changes = rng.choices((0, 1, 2), (1, 8, 1))[0]
    kind = rng.choice(list(KINDS))
    interpret = KINDS[kind](folder, partial(mutated, rng=rng, changes=changes))
    try:
        expected = interpret()
    except RefusedError:
        expected = None
    try:
        source = find_source(folder)
    except (OSError, ValueError) as error:
        assert str(folder) in str(error), f"{kind}: the error does not name the folder: {error}"
        assert changes, f"{kind}: an unchanged folder was rejected: {error}"
        return "refused"
    assert expected is not None, f"{kind}: an invalid folder was accepted"
    accepted = 0
    for picture in source.images:
        try:
            _, ids, segments = read_annotated(picture)
        except (OSError, ValueError) as error:
            assert str(folder) in str(error), f"{kind}: the error does not name the file: {error}"
            continue
        accepted += 1
        truth = expected[picture.path.stem]
        assert truth is not None, f"{kind}: {picture.image_id} must be skipped but was accepted"
        found = np.full(SHAPE, "", dtype=object)
        for segment in segments:
            label = source.vocabulary.labels[segment["category_id"]]
            found[ids == segment["id"]] = label + "*" * segment["iscrowd"]
        wrong = (found != truth.classes) & ~truth.uncertain
        assert not wrong.any(), f"{kind}: {picture.image_id}: {wrong.sum()} pixels are wrong"
        if truth.is_reported:
            assert picture.notes or source.problems or source.notes, f"{kind}: a part was skipped without a report"
    is_reported = source.problems or accepted < len(source.images)
    assert accepted == len(FILES) or is_reported, f"{kind}: an image was skipped without a report"
    assert changes or accepted == len(FILES), f"{kind}: an unchanged image was rejected"
    return "accepted" if accepted == len(FILES) else "refused"


# ---- changes


def mutated(content: Any, rng: random.Random, changes: int) -> Any:
    """Return a copy of a JSON tree with some of its values replaced, removed or repeated."""
    root = [copy.deepcopy(content)]
    for _ in range(changes):
        places = [(parent, key) for parent, key in _places(root) if parent is not root]
        if not places:
            break
        parent, key = rng.choice(places)
        value, action = parent[key], rng.randrange(6)
        if action == 0:
            del parent[key]
        elif action == 1 and isinstance(parent, list):
            parent.insert(key, copy.deepcopy(value))
        elif action == 2 and isinstance(value, int | float) and not isinstance(value, bool):
            parent[key] = rng.choice([value + 1, value - 1, value + 0.5, -value, 3 * value, float(value), str(value)])
        elif action == 3 and isinstance(value, str) and value:
            place = rng.randrange(len(value))
            parent[key] = value[:place] + rng.choice(["", "o", "é", "0", "\\", "/"]) + value[place + 1 :]
        else:
            parent[key] = copy.deepcopy(rng.choice(JUNK))
    return root[0]


def _places(tree: Any) -> list[tuple[Any, Any]]:
    keys = tree.keys() if isinstance(tree, dict) else range(len(tree)) if isinstance(tree, list) else ()
    found = [(tree, key) for key in keys]
    return found + [place for key in keys for place in _places(tree[key])]


def save_images(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for file in FILES:
        Image.new("RGB", (WIDTH, HEIGHT), "gray").save(folder / f"{file}.png")


def ring_of(box: Sequence[float]) -> list[float]:
    left, top, right, bottom = box
    return [left, top, right, top, right, bottom, left, bottom]


def mask_of(box: Sequence[int]) -> np.ndarray:
    mask = np.zeros(SHAPE, dtype=bool)
    mask[box[1] : box[3], box[0] : box[2]] = True
    return mask


# ---- interpreters


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def require(condition: bool) -> None:
    if not condition:
        raise RefusedError


def identity(value: Any) -> str:
    require(isinstance(value, int | float | str) and not isinstance(value, bool) and value != "")
    require(not isinstance(value, float) or (math.isfinite(value) and value == int(value)))
    return value if isinstance(value, str) else str(int(value))


def flag(value: Any) -> bool:
    require(
        any(value is known or (is_number(value) and value in (0, 1)) for known in (True, False, "0", "1"))
        or value in ("0", "1")
    )
    return value not in ("0", 0, False)


def polygon(ring: Any) -> tuple[np.ndarray, np.ndarray] | None:
    """Return the inside (H, W) of a ring at pixel centers and the pixels near its edges; None if it has no area."""
    require(isinstance(ring, list) and all(is_number(value) for value in ring))
    require(all(-WIDTH <= value <= 2 * WIDTH for value in ring))  # False for NaN
    if len(ring) % 2 or len(ring) < 6:
        return None
    y, x = np.mgrid[:HEIGHT, :WIDTH] + 0.5
    inside, near = np.zeros(SHAPE, dtype=bool), np.zeros(SHAPE, dtype=bool)
    points = list(zip(ring[::2], ring[1::2], strict=True))
    for (x1, y1), (x2, y2) in zip(points, points[1:] + points[:1], strict=True):
        if y1 != y2:
            crossing = x1 + (y - y1) / (y2 - y1) * (x2 - x1)
            inside ^= ((y1 > y) != (y2 > y)) & (crossing > x)
        length = (x2 - x1) ** 2 + (y2 - y1) ** 2
        share = np.clip(((x - x1) * (x2 - x1) + (y - y1) * (y2 - y1)) / length, 0, 1) if length else 0 * x
        distance = np.hypot(x1 + share * (x2 - x1) - x, y1 + share * (y2 - y1) - y)
        is_exact = (x1 == x2 or y1 == y2) and all(value == int(value) for value in (x1, y1, x2, y2))
        near |= (distance < EDGE_MARGIN) & (not is_exact)
    return inside, near


def runs_of(code: dict[str, Any]) -> list[int]:
    """Decode COCO run lengths: 5 bits per character from code 48, bit 5 continues; differences from run four on."""
    counts = code["counts"]
    if isinstance(counts, list):
        require(all(isinstance(run, int) and not isinstance(run, bool) for run in counts))
        return counts
    require(isinstance(counts, str))
    runs, value, shift = [], 0, 0
    for character in counts:
        bits = ord(character) - 48
        require(0 <= bits < 64)
        value, shift = value | (bits & 31) << shift, shift + 5
        if not bits & 32:
            value -= (bits >> 4 & 1) << shift
            runs.append(value + (runs[-2] if len(runs) > 2 else 0))
            value, shift = 0, 0
    require(shift == 0)
    return runs


def segmentation(value: Any) -> tuple[np.ndarray, np.ndarray] | None:
    if value is None or value in ([], {}):
        return None
    if isinstance(value, dict):
        require({"size", "counts"} <= value.keys() and value["size"] == list(SHAPE))
        require(all(type(side) is int for side in value["size"]))
        runs = runs_of(value)
        require(all(run >= 0 for run in runs) and sum(runs) == HEIGHT * WIDTH)
        flat = np.repeat(np.arange(len(runs)) % 2 == 1, runs)
        return flat.reshape(SHAPE, order="F"), np.zeros(SHAPE, dtype=bool)
    require(isinstance(value, list))
    rings = [polygon(ring) for ring in ([value] if all(is_number(number) for number in value) else value)]
    odd = any(len(ring) % 2 for ring in value if isinstance(ring, list))
    rings = [ring for ring in rings if ring is not None]
    if odd or not rings:
        return None
    return np.any([inside for inside, _ in rings], axis=0), np.any([near for _, near in rings], axis=0)


def painted(objects: list[tuple[str, Any]]) -> Expected:
    """Return the visible parts of named masks, smaller ones on top of larger ones; None is a skipped object."""
    expected = Expected(np.full(SHAPE, "", dtype=object), np.zeros(SHAPE, dtype=bool))
    usable = [(name, *drawn) for name, drawn in objects if drawn is not None]
    expected.is_reported = len(usable) < len(objects) or any(
        not mask.any() and not near.any() for _, mask, near in usable
    )
    require(bool(usable) or not objects)
    for name, mask, near in sorted(usable, key=lambda entry: -entry[1].sum()):
        for other, other_mask, other_near in usable:
            sizes = sorted((mask.sum() + 1, other_mask.sum() + 1))
            unsure = near.any() or other_near.any() or sizes[0] == sizes[1]
            if unsure and other is not name and sizes[1] < 2 * sizes[0] + 40:
                expected.uncertain |= (mask | near) & (other_mask | other_near)
        expected.classes[mask] = name
        expected.uncertain |= near
    return expected


def categories_of(content: dict) -> dict[str, str]:
    names = {}
    for entry in content["categories"]:
        require(isinstance(entry, dict))
        key, name = identity(entry.get("id")), entry.get("name")
        require(key not in names and isinstance(name, str) and bool(name.strip()) and name not in names.values())
        flag(entry.get("isthing", 1))
        names[key] = " ".join(name.split())
    require(bool(names))
    return names


def coco_expected(content: Any, read: Callable[[list[dict], dict[str, str]], Expected]) -> dict[str, Expected | None]:
    """Return the expected content of COCO files, with `read` for the annotations of one image."""
    for part in ("images", "annotations", "categories"):
        require(isinstance(content, dict) and isinstance(content.get(part), list))
        require(all(isinstance(entry, dict) for entry in content[part]))
    names, seen = categories_of(content), {}
    for entry in content["images"]:
        key = identity(entry.get("id"))
        require(key not in seen)
        seen[key] = entry
    by_image: dict[str, list] = {key: [] for key in seen}
    is_lost = False
    for entry in content["annotations"]:
        try:
            key = identity(entry.get("image_id"))
        except RefusedError:
            key = ""
        is_lost |= key not in by_image
        by_image.setdefault(key, []).append(entry)
    expected: dict[str, Expected | None] = {}
    for key, entry in seen.items():
        stem = str(entry.get("file_name")).replace("\\", "/").rsplit("/", 1)[-1].removesuffix(".png")
        require(stem not in expected)
        size = entry.get("height"), entry.get("width")
        try:
            require(size == (None, None) or (size == SHAPE and all(is_number(side) for side in size)))
            expected[stem] = read(by_image[key], names)
            expected[stem].is_reported |= is_lost
        except RefusedError:
            expected[stem] = None
    return expected


def coco_objects(entries: list[dict], names: dict[str, str]) -> Expected:
    objects = []
    for entry in entries:
        category = identity(entry.get("category_id"))
        require(category in names)
        label = names[category] + "*" * flag(entry.get("iscrowd", 0))
        objects.append((label, segmentation(entry.get("segmentation"))))
    return painted(objects)


# ---- kinds


def coco(folder: Path, change: Callable[[Any], Any]) -> Interpreter:
    save_images(folder / "images")
    annotations = []
    for place, file in enumerate(FILES):
        for number, box in enumerate(BOXES[file]):
            code: Any = [ring_of(box)]
            if number == 1:
                code = encode_rle(mask_of(box))
            elif file == "b" and number == 2:
                flat = mask_of(box).flatten(order="F")
                edges = np.flatnonzero(np.diff(flat)) + 1
                code = {"size": list(SHAPE), "counts": np.diff([0, *edges, flat.size]).tolist()}
            entry = {"id": 10 * place + number, "image_id": place + 1, "category_id": number + 1, "segmentation": code}
            annotations.append(entry | {"iscrowd": number // 2})
    return _write_coco(folder / "instances_train.json", annotations, change, coco_objects)


def _write_coco(path: Path, annotations: list, change: Callable[[Any], Any], read: Callable) -> Interpreter:
    images = [
        {"id": place + 1, "file_name": f"{file}.png", "height": HEIGHT, "width": WIDTH}
        for place, file in enumerate(FILES)
    ]
    categories = [{"id": number + 1, "name": name, "isthing": 1} for number, name in enumerate(NAMES)]
    text = json.dumps(change({"images": images, "annotations": annotations, "categories": categories}))
    path.write_text(text)
    return lambda: coco_expected(json.loads(text), read)


def panoptic(folder: Path, change: Callable[[Any], Any]) -> Interpreter:
    save_images(folder / "images")
    (folder / "panoptic_train").mkdir()
    annotations, pngs = [], {}
    for place, file in enumerate(FILES):
        ids = np.zeros(SHAPE, dtype=int)
        infos = []
        for number, box in enumerate(BOXES[file]):
            ids[mask_of(box)] = 300 * number + 1
            infos.append({"id": 300 * number + 1, "category_id": number + 1, "iscrowd": number // 2})
        pngs[file] = ids
        Image.fromarray(encode_ids(ids)).save(folder / "panoptic_train" / f"{file}.png")
        annotations.append({"image_id": place + 1, "file_name": f"{file}.png", "segments_info": infos})

    def read(entries: list[dict], names: dict[str, str]) -> Expected:
        expected = Expected(np.full(SHAPE, "", dtype=object), np.zeros(SHAPE, dtype=bool))
        if not any("segments_info" in entry for entry in entries):
            return painted([(names.get("1", ""), None) for _ in entries])
        require(len(entries) == 1 and isinstance(entries[0]["segments_info"], list))
        name = str(entries[0].get("file_name")).removesuffix(".png")
        require(name in pngs)
        listed = {}
        for info in entries[0]["segments_info"]:
            require(isinstance(info, dict) and type(info.get("id")) is int and 0 < info["id"] < 2**24)
            category = identity(info.get("category_id"))
            require(info["id"] not in listed and category in names)
            listed[info["id"]] = names[category] + "*" * flag(info.get("iscrowd", 0))
        present = set(np.unique(pngs[name]).tolist()) - {0}
        require(present <= listed.keys())
        expected.is_reported = present < listed.keys()
        for number in present:
            expected.classes[pngs[name] == number] = listed[number]
        return expected

    return _write_coco(folder / "panoptic_train.json", annotations, change, read)


def labelme(folder: Path, change: Callable[[Any], Any]) -> Interpreter:
    save_images(folder)
    texts = {}
    for file in FILES:
        shapes = []
        for name, (left, top, right, bottom) in zip(NAMES, BOXES[file], strict=True):
            points = [[left, top], [right, top], [right, bottom], [left, bottom]]
            is_box = name == "disc"
            kind = {"shape_type": "rectangle" if is_box else "polygon", "points": points[::2] if is_box else points}
            shapes.append({"label": name, "group_id": None} | kind)
        content = {"shapes": shapes, "imagePath": f"{file}.png", "imageHeight": HEIGHT, "imageWidth": WIDTH}
        texts[file] = json.dumps(change(content) if file == "a" else content)
        (folder / f"{file}.json").write_text(texts[file])
    return lambda: {file: labelme_expected(file, json.loads(text)) for file, text in texts.items()}


def labelme_expected(file: str, content: Any) -> Expected | None:
    try:
        require(isinstance(content, dict) and isinstance(content.get("shapes"), list))
        require(str(content.get("imagePath")).replace("\\", "/").rsplit("/", 1)[-1] == f"{file}.png")
        size = content.get("imageHeight"), content.get("imageWidth")
        require(size == (None, None) or (size == SHAPE and all(is_number(side) for side in size)))
        objects = {}
        for number, shape in enumerate(content["shapes"]):
            require(isinstance(shape, dict) and isinstance(shape.get("label"), str) and bool(shape["label"].strip()))
            points, kind = shape.get("points"), shape.get("shape_type", "polygon")
            require(isinstance(points, list) and all(isinstance(point, list) and len(point) == 2 for point in points))
            drawn = None
            if kind == "rectangle" and len(points) == 2:
                (x1, y1), (x2, y2) = points
                drawn = polygon([x1, y1, x2, y1, x2, y2, x1, y2])
            elif kind in ("polygon", "rectangle"):
                drawn = polygon([value for point in points for value in point])
            group, label = shape.get("group_id"), " ".join(shape["label"].split())
            key = number if group is None else (label, str(group))
            if key in objects and None not in (drawn, objects[key][1]):
                drawn = tuple(np.logical_or(*pair) for pair in zip(drawn, objects[key][1], strict=True))
            objects[key] = (label, drawn)
        return painted(list(objects.values()))
    except RefusedError:
        return None


def yolo(folder: Path, change: Callable[[Any], Any]) -> Interpreter:
    save_images(folder / "images")
    (folder / "labels").mkdir()
    lines = {}
    for file in FILES:
        sides = (WIDTH, HEIGHT) * 4
        lines[file] = [
            [str(number), *(str(value / side) for value, side in zip(ring_of(box), sides, strict=True))]
            for number, box in enumerate(BOXES[file])
        ]
    content = change({"names": NAMES, "lines": lines})
    names = content.get("names", {})
    names = json.loads(json.dumps(names)) if 10**400 not in (names if isinstance(names, list) else [names]) else None
    lines = content.get("lines")
    lines = lines if isinstance(lines, dict) else {}
    (folder / "data.yaml").write_text(yaml.safe_dump({"names": names}))
    texts = {}
    for file in FILES:
        rows = lines.get(file)
        rows = [row if isinstance(row, list) else [row] for row in rows] if isinstance(rows, list) else [[rows]]
        texts[file] = "\n".join(" ".join(str(token)[:500] for token in row) for row in rows)
        (folder / "labels" / f"{file}.txt").write_text(texts[file])
    return lambda: yolo_expected(names, texts)


def yolo_expected(names: Any, texts: dict[str, str]) -> dict[str, Expected | None]:
    require(isinstance(names, list) and bool(names) and all(isinstance(name, str) and name.strip() for name in names))
    require(len(set(names)) == len(names))
    expected: dict[str, Expected | None] = {}
    for file, text in texts.items():
        try:
            objects = []
            for line in filter(str.strip, text.split("\n")):
                first, *rest = line.split()
                require(first.isascii() and first.isdigit() and int(first) < len(names))
                try:
                    shares = [float(token) for token in rest]
                except ValueError:
                    raise RefusedError from None
                require(all(-0.1 <= share <= 1.1 for share in shares))
                ring = [share * (HEIGHT if place % 2 else WIDTH) for place, share in enumerate(shares)]
                # Shares of the sides are whole pixels again, up to rounding.
                ring = [float(round(value)) if abs(value - round(value)) < 1e-9 else value for value in ring]
                objects.append((" ".join(names[int(first)].split()), None if len(ring) == 4 else polygon(ring)))
            expected[file] = painted(objects)
        except RefusedError:
            expected[file] = None
    return expected


def masks(folder: Path, change: Callable[[Any], Any]) -> Interpreter:
    save_images(folder / "images")
    (folder / "masks").mkdir()
    content = change(
        {
            "names": {"0": None, "1": NAMES[0], "2": NAMES[1], "3": NAMES[2]},
            "values": [1, 2, 3],
            "size": [HEIGHT, WIDTH],
        }
    )
    values, size = content.get("values"), content.get("size")
    values = (
        [value for value in values if type(value) is int and 0 <= value < 2**16] if isinstance(values, list) else []
    )
    is_sized = isinstance(size, list) and len(size) == 2 and all(type(side) is int and 0 < side < 99 for side in size)
    shape = tuple(size) if is_sized else SHAPE
    drawn = {}
    for file in FILES:
        pixels = np.zeros((99, 99), dtype=np.uint16 if max(values, default=0) > 255 else np.uint8)
        for value, (left, top, right, bottom) in zip(values, BOXES[file], strict=False):
            pixels[top:bottom, left:right] = value
        drawn[file] = pixels[: shape[0], : shape[1]]
        Image.fromarray(drawn[file]).save(folder / "masks" / f"{file}.png")
    text = json.dumps(content.get("names"))
    (folder / "names.json").write_text(text)
    return lambda: masks_expected(json.loads(text), drawn)


def masks_expected(names: Any, drawn: dict[str, np.ndarray]) -> dict[str, Expected | None]:
    names = {str(number): name for number, name in enumerate(names)} if isinstance(names, list) else names
    require(
        isinstance(names, dict)
        and bool(names)
        and all(key.strip().isascii() and key.strip().isdigit() for key in names)
    )
    meaning = {0: "", 255: ""}
    for key, entry in names.items():
        words = entry if isinstance(entry, list) else [entry]
        require(entry is None or (bool(words) and all(isinstance(word, str) and word.strip() for word in words)))
        meaning[int(key)] = "" if entry is None else " ".join(words[0].split())
    require(any(meaning.values()) and len({int(key) for key in names}) == len(names))
    expected: dict[str, Expected | None] = {}
    for file, pixels in drawn.items():
        is_known = pixels.shape == SHAPE and set(np.unique(pixels).tolist()) <= meaning.keys()
        classes = np.vectorize(meaning.get, otypes=[object])(pixels) if is_known else None
        expected[file] = None if classes is None else Expected(classes, np.zeros(SHAPE, dtype=bool))
    return expected


KINDS = {"coco": coco, "panoptic": panoptic, "labelme": labelme, "yolo": yolo, "masks": masks}
