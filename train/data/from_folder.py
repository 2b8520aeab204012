"""Turn a folder of annotated pictures into a dataset to train on.

    python -m train.data.from_folder my_pictures --out my_dataset

The folder is one of
"""

from __future__ import annotations

import argparse
import shlex
import sys
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image
from tqdm.auto import tqdm

from configuration import load_recipe
from modeling_gkc.atomic_files import atomic_folder, atomic_write_json, remove_leftovers
from modeling_gkc.cli.common import UserError, interruptible, load_checkpoint
from modeling_gkc.label_text import error_line
from modeling_gkc.vocabulary import Vocabulary

from ..storage.locks import lock_output
from .load import write_dataset_checksums
from .prepared import VOCABULARY_NAME, vocabulary_json
from .readers import coco_json, labelme_json, mask_folder, yolo_text
from .schema import NO_CLASS, dataset_features, encode_ids
from .sources import SPLITS, Picture, Source, check_classes, read_annotated

if TYPE_CHECKING:
    from datasets import Dataset

REPORT_NAME = "report.json"
_MODULES = (mask_folder, coco_json, labelme_json, yolo_text)
LAYOUTS = "\n\n".join(f"({number}) {module.__doc__.strip()}" for number, module in enumerate(_MODULES, start=1))
_SHOWN = 20


def find_source(folder: Path, instances: Sequence[str] = ()) -> Source:
    """The annotated pictures of a folder.

    Raises:
        ValueError: it is laid out in no way that is known, or holds no annotated picture.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a directory.")
    masks = mask_folder.find_mask_folder(folder)
    if masks:
        source = mask_folder.read_mask_folder(masks, instances)
        return _not_empty(folder, source)
    if instances:
        raise ValueError("Only masks do not say where their objects end: leave `--instances` out.")
    files, notes = coco_json.find_coco_files(folder)
    if files:
        source = coco_json.read_coco(folder, files)
        source.notes += notes
    elif contents := labelme_json.find_labelme_files(folder):
        source = labelme_json.read_labelme(folder, contents)
    elif names := yolo_text.find_yolo_names(folder):
        source = yolo_text.read_yolo(folder, names)
    else:
        raise ValueError(
            f"{folder} has neither folders images and masks with a file {mask_folder.NAMES_FILE}, nor COCO's or "
            "labelme's JSON, nor YOLO's text files with their names; `python -m train.data.from_folder --help` shows "
            "the layouts." + "".join(f"\n  {note}" for note in notes[:_SHOWN])
        )
    return _not_empty(folder, source)


def _not_empty(folder: Path, source: Source) -> Source:
    if not source.pictures:
        raise ValueError("\n  ".join([f"{folder} has no annotated picture.", *source.problems[:10]]))
    return source


def convert(
    folder: Path, out: Path, val_share: float = 0.1, instances: Sequence[str] = (), init_from: str | None = None
) -> dict[str, Any]:
    """Write a dataset, its vocabulary and a report into a new folder, which appears only when all is written.

    Pictures that cannot be used are left out and named in the report.

    Args:
        folder: see `--help`.
        out: where to write.
        val_share: share of the pictures that becomes the split `val`, where the folder has no splits of its own.
        instances: see `mask_folder.read_mask_folder`.
        init_from: checkpoint that is to be trained on the dataset, and must tell its classes apart.

    Returns:
        The report: `layout`, as what the folder was read; `images` of each split; for each class its `segments` and
        `images`; `void_share` of the pixels; `problems`, pictures left out; `left_out`, what was left out of the
        annotations of others; `notes`.

    Raises:
        ValueError: `out` is there already or being written by another process, no picture can be used, or the
            checkpoint cannot tell classes apart.
    """
    with lock_output(out):
        return _convert(folder, out, val_share, instances, init_from)


def _convert(
    folder: Path, out: Path, val_share: float, instances: Sequence[str], init_from: str | None
) -> dict[str, Any]:
    from datasets import DatasetDict

    if out.exists():
        raise ValueError(f"{out} is there already: choose another folder, or remove it.")
    source = find_source(folder, instances)
    if init_from is not None and (reason := why_indistinct(source.vocabulary, init_from)):
        raise ValueError(f"--init-from: {reason}")
    remove_leftovers(out.parent, out.name)
    with atomic_folder(out) as unfinished:
        writer = _Writer(source)
        splits = {
            split: writer.write(split, pictures, unfinished / f"{split}.arrow")
            for split, pictures in shares(source, val_share)
        }
        if not any(map(len, splits.values())):
            raise ValueError("\n  ".join(["No picture can be used.", *source.problems[:10]]))
        if not writer.segments.any():
            raise ValueError(
                "No picture has a segment of any class, all pixels are void: nothing could be learned. Masks of 0 and "
                f'255 need a name for 255 in {mask_folder.NAMES_FILE}, such as {{"255": "cat"}}.'
            )
        DatasetDict({split: rows for split, rows in splits.items() if len(rows)}).save_to_disk(unfinished)
        for split in splits:
            (unfinished / f"{split}.arrow").unlink()
        command = shlex.join(["python", "-m", "train.data.from_folder", str(folder), "--out", str(out)])
        remedy = f"delete {out} (`rm -r {shlex.quote(str(out))}`) and make it again with `{command}`."
        write_dataset_checksums(unfinished, remedy)
        atomic_write_json(unfinished / VOCABULARY_NAME, vocabulary_json(source.vocabulary))
        report = writer.report({split: len(rows) for split, rows in splits.items() if len(rows) or split != "test"})
        atomic_write_json(unfinished / REPORT_NAME, report)
    return report


def shares(source: Source, val_share: float) -> Iterator[tuple[str, list[Picture]]]:
    """The pictures of each split; drawn by their names, so that a picture stays where it is when others join."""
    from .samples import stable_number  # needs torch, which the command's help does without

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
        self.left_out: list[str] = []
        self.crowds = 0
        self.pixels, self.void_pixels = 0, 0

    def write(self, split: str, pictures: list[Picture], path: Path) -> Dataset:
        from datasets import Dataset
        from datasets.arrow_writer import ArrowWriter

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
        content, ids, segments = read_annotated(picture)
        check_classes(picture, segments, len(self.source.vocabulary))
        self.left_out += picture.notes
        self.crowds += sum(segment["iscrowd"] for segment in segments)
        classes = [segment["category_id"] for segment in segments if segment["category_id"] != NO_CLASS]
        self.segments += np.bincount(classes, minlength=len(self.segments))
        self.images[list(set(classes))] += 1
        self.pixels += ids.size
        self.void_pixels += int(np.isin(ids, [segment["id"] for segment in segments], invert=True).sum())
        return {
            "image": {"bytes": content, "path": None},
            "segmentation": Image.fromarray(encode_ids(ids)),
            "segments": segments,
            "captions": list(picture.captions),
            "image_id": picture.image_id,
            "video_id": picture.video_id,
            "frame": picture.frame,
        }

    def report(self, images: dict[str, int]) -> dict[str, Any]:
        labels = self.source.vocabulary.labels
        notes = list(self.source.notes)
        if self.crowds:
            notes.append(
                f"{self.crowds} of {self.segments.sum()} segments are crowds (iscrowd 1), of which training learns "
                "nothing; where they are single objects, as in CVAT's masks, set iscrowd to 0"
            )
        counts = zip(labels, self.segments.tolist(), self.images.tolist(), strict=True)
        return {
            "layout": self.source.layout,
            "images": images,
            "classes": {label: {"segments": segments, "images": number} for label, segments, number in counts},
            "void_share": self.void_pixels / max(self.pixels, 1),
            "problems": self.source.problems,
            "left_out": self.left_out,
            "notes": notes,
        }


def describe(report: dict[str, Any], out: Path) -> str:
    """The report for people."""
    sizes = ", ".join(f"{number} {split}" for split, number in report["images"].items())
    lines = [f"Read as {report['layout']}", f"{out}: {sizes}", f"{'class':<30}{'segments':>10}{'images':>10}"]
    for label, counts in report["classes"].items():
        note = "   in no picture" if counts["segments"] == 0 else ""
        lines.append(f"{label:<30}{counts['segments']:>10}{counts['images']:>10}{note}")
    lines += [_void_line(report), *report["notes"]]
    for part, title in (
        ("problems", "Left out"),
        ("left_out", "Left out of annotations, their pictures are kept"),
    ):
        if report[part]:
            lines.append(f"{title}, {len(report[part])} in all (see {out / REPORT_NAME}):")
            lines += [f"  {line}" for line in report[part][:_SHOWN]]
    return "\n".join(lines)


def _void_line(report: dict[str, Any]) -> str:
    share = f"{100 * report['void_share']:.1f} % of the pixels are void"
    if report["void_share"] == 0 or any(label.casefold() == "background" for label in report["classes"]):
        return f"{share}."
    return (
        f"{share}, which training and scores leave out: a semantic result fills them with the classes above. To keep "
        "them apart name them in the annotations, such as background, or ask with --void-labels or --void-threshold."
    )


def why_indistinct(vocabulary: Vocabulary, checkpoint: str) -> str | None:
    """Why a checkpoint cannot be trained on classes, or None if its text encoder tells them apart.

    Raises:
        UserError: it is no checkpoint.
    """
    from modeling_gkc.encoded_vocabulary import EncodedVocabulary

    model, processor = load_checkpoint(checkpoint)
    try:
        with warnings.catch_warnings():  # words that are unknown without harm are warned of in training
            warnings.simplefilter("ignore", UserWarning)
            EncodedVocabulary.encode(vocabulary, model, processor, distinct=True)
    except ValueError as error:
        return f"{checkpoint}: {error}"
    return None


def _note_of_default(out: Path) -> str | None:
    """What the recipe `custom` will refuse, if no other checkpoint is named."""
    checkpoint = load_recipe("custom").model.init_from
    if not (Path(checkpoint) / "config.json").is_file():
        return None
    reason = why_indistinct(Vocabulary.from_file(out / VOCABULARY_NAME), checkpoint)
    return reason and f"The recipe custom cannot start from {reason} Name it with init_from=CHECKPOINT."


@interruptible("train.data.from_folder", "Nothing was written.")
def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; the exit code is 1 if pictures were left out, 2 if nothing was written, 130 after Ctrl-C."""
    parser = argparse.ArgumentParser(
        prog="python -m train.data.from_folder",
        description=f"{__doc__}\n{LAYOUTS}",
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
    parser.add_argument(
        "--init-from", metavar="CHECKPOINT", help="that is to be trained: refuse classes that it cannot tell apart"
    )
    options = parser.parse_args(arguments)
    if not 0 <= options.val_share < 1:
        parser.error(f"--val-share must be at least 0 and below 1, got {options.val_share}")
    try:
        report = convert(options.folder, options.out, options.val_share, options.instances, options.init_from)
        note = _note_of_default(options.out) if options.init_from is None else None
    except (OSError, ValueError, RuntimeError, UserError) as error:
        tqdm.write(f"{parser.prog}: {error_line(error) if isinstance(error, OSError) else error}", file=sys.stderr)
        return 2
    tqdm.write(describe(report, options.out))
    if note:
        tqdm.write(f"{parser.prog}: warning: {note}", file=sys.stderr)
    return 1 if report["problems"] or report["left_out"] else 0


if __name__ == "__main__":
    sys.exit(main())
