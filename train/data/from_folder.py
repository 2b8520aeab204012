"""Turn a folder of annotated pictures into a dataset to train on.

    python -m train.data.from_folder my_pictures --out my_dataset

The folder is one of
"""

import argparse
import json
import shlex
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, DatasetDict
from datasets.arrow_writer import ArrowWriter
from PIL import Image
from tqdm.auto import tqdm

from modeling_gkc.image_processing_gkc import read_image

from . import coco_json, mask_folder
from .pictures import Picture, Source
from .prepared import VOCABULARY_NAME, vocabulary_json
from .samples import stable_number
from .schema import dataset_features, encode_ids
from .stored import seal_dataset

REPORT_NAME = "report.json"
SPLITS = ("train", "val")


def find_source(folder: Path, instances: Sequence[str] = ()) -> Source:
    """The annotated pictures of a folder.

    Raises:
        ValueError: it is laid out in no way that is known, or holds no annotated picture.
    """
    masks = mask_folder.find_mask_folder(folder)
    if masks:
        source = mask_folder.read_mask_folder(*masks, instances)
    elif files := coco_json.find_coco_files(folder):
        if instances:
            raise ValueError("COCO files know their instances: leave `--instances` out.")
        source = coco_json.read_coco(folder, files)
    else:
        raise ValueError(
            f"{folder} has neither folders images and masks with a file {mask_folder.NAMES_FILE}, nor COCO's JSON; "
            f"`python -m train.data.from_folder --help` shows both."
        )
    if not source.pictures:
        raise ValueError("\n  ".join([f"{folder} has no annotated picture.", *source.problems[:10]]))
    return source


def convert(folder: Path, out: Path, val_share: float = 0.1, instances: Sequence[str] = ()) -> dict[str, Any]:
    """Write a dataset, its vocabulary and a report into a new folder, which appears only when all is written.

    Pictures that cannot be used are left out and named in the report.

    Args:
        folder: see `--help`.
        out: where to write.
        val_share: share of the pictures that becomes the split `val`, where the folder has no splits of its own.
        instances: see `mask_folder.read_mask_folder`.

    Returns:
        The report: `images` of each split; for each class its `segments` and `images`; `problems`.

    Raises:
        ValueError: `out` is there already, or no picture can be used.
    """
    if out.exists():
        raise ValueError(f"{out} is there already: choose another folder, or remove it.")
    source = find_source(folder, instances)
    part = out.with_name(out.name + ".partial")
    shutil.rmtree(part, ignore_errors=True)  # what a killed run left behind
    part.mkdir(parents=True)
    writer = _Writer(source)
    splits = {
        split: writer.write(split, pictures, part / f"{split}.arrow") for split, pictures in shares(source, val_share)
    }
    if not any(map(len, splits.values())):
        raise ValueError("\n  ".join(["No picture can be used.", *source.problems[:10]]))
    DatasetDict({split: rows for split, rows in splits.items() if len(rows)}).save_to_disk(part)
    for split in splits:
        (part / f"{split}.arrow").unlink()
    command = shlex.join(["python", "-m", "train.data.from_folder", str(folder), "--out", str(out)])
    seal_dataset(part, f"delete {out} (`rm -r {shlex.quote(str(out))}`) and make it again with `{command}`.")
    _write_json(part / VOCABULARY_NAME, vocabulary_json(source.vocabulary))
    report = writer.report({split: len(rows) for split, rows in splits.items()})
    _write_json(part / REPORT_NAME, report)
    part.rename(out)
    return report


def shares(source: Source, val_share: float) -> Iterator[tuple[str, list[Picture]]]:
    """The pictures of each split; drawn by their names, so that a picture stays where it is when others join."""
    free = sorted((p for p in source.pictures if p.split is None), key=lambda p: stable_number(p.image_id))
    has_own = any(picture.split == "val" for picture in source.pictures)
    drawn = 0 if has_own else min(round(val_share * len(free)), len(source.pictures) - 1)
    chosen = {picture.image_id for picture in free[:drawn]}
    for split in SPLITS:
        yield split, [p for p in source.pictures if split == (p.split or ("val" if p.image_id in chosen else "train"))]


class _Writer:
    """Writes rows and counts what is in them."""

    def __init__(self, source: Source):
        self.source = source
        self.segments = np.zeros(len(source.vocabulary), dtype=int)
        self.images = np.zeros(len(source.vocabulary), dtype=int)

    def write(self, split: str, pictures: list[Picture], path: Path) -> Dataset:
        features = dataset_features()
        with ArrowWriter(features=features, path=str(path)) as writer:
            for picture in tqdm(pictures, f"Writing {split}", unit="image"):
                try:
                    writer.write(features.encode_example(self._row(picture)))
                except (OSError, ValueError, SyntaxError) as error:
                    self.source.problems.append(f"{picture.image}: {str(error).removeprefix(f'{picture.image}: ')}")
            writer.finalize()
        return Dataset.from_file(str(path))

    def _row(self, picture: Picture) -> dict[str, Any]:
        size = read_image(picture.image).size
        ids, segments = picture.read(size[::-1])
        classes = [segment["category_id"] for segment in segments]
        self.segments += np.bincount(classes, minlength=len(self.segments))
        self.images[list(set(classes))] += 1
        return {
            "image": {"bytes": picture.image.read_bytes(), "path": None},
            "segmentation": Image.fromarray(encode_ids(ids)),
            "segments": segments,
            "captions": list(picture.captions),
            "image_id": picture.image_id,
            "video_id": picture.video_id,
            "frame": picture.frame,
        }

    def report(self, images: dict[str, int]) -> dict[str, Any]:
        labels = self.source.vocabulary.labels
        counts = zip(labels, self.segments.tolist(), self.images.tolist(), strict=True)
        return {
            "images": images,
            "classes": {label: {"segments": segments, "images": number} for label, segments, number in counts},
            "problems": self.source.problems,
        }


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def describe(report: dict[str, Any], out: Path) -> str:
    """The report for people."""
    sizes = ", ".join(f"{number} {split}" for split, number in report["images"].items())
    lines = [f"{out}: {sizes}", f"{'class':<30}{'segments':>10}{'images':>10}"]
    for label, counts in report["classes"].items():
        note = "   in no picture" if counts["segments"] == 0 else ""
        lines.append(f"{label:<30}{counts['segments']:>10}{counts['images']:>10}{note}")
    if report["problems"]:
        lines.append(f"Left out, {len(report['problems'])} in all (see {out / REPORT_NAME}):")
        lines += [f"  {problem}" for problem in report["problems"][:20]]
    return "\n".join(lines)


def _help() -> str:
    return "\n".join([__doc__, "(1) " + mask_folder.__doc__, "(2) " + coco_json.__doc__])


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; the exit code is 1 if something was left out, 2 if nothing was written."""
    parser = argparse.ArgumentParser(
        prog="python -m train.data.from_folder",
        description=_help(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=f"DATASET also holds {VOCABULARY_NAME}, to which synonyms may be added by hand, and {REPORT_NAME}.",
    )
    parser.add_argument("folder", type=Path, metavar="DIR", help="the pictures")
    parser.add_argument("--out", type=Path, required=True, metavar="DATASET", help="folder to make")
    parser.add_argument(
        "--val-share",
        type=float,
        default=0.1,
        help="share of the pictures set aside as the split val, if the folder has no splits (%(default)s)",
    )
    parser.add_argument(
        "--instances",
        nargs="+",
        default=(),
        metavar="CLASS",
        help="of these classes each connected part of a mask is an object; of the others a mask is one region",
    )
    options = parser.parse_args(arguments)
    if not 0 <= options.val_share < 1:
        parser.error(f"--val-share must be at least 0 and below 1, got {options.val_share}")
    try:
        report = convert(options.folder, options.out, options.val_share, options.instances)
    except (OSError, ValueError, RuntimeError) as error:
        tqdm.write(f"{parser.prog}: {error}", file=sys.stderr)
        return 2
    tqdm.write(describe(report, options.out))
    return 1 if report["problems"] else 0


if __name__ == "__main__":
    sys.exit(main())
