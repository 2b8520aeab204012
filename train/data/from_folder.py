"""Convert a folder of annotated images to a training dataset.

    python -m train.data.from_folder my_images --out my_dataset

The folder must have one of these layouts:
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
from .sources import SPLITS, AnnotatedImage, Source, check_classes, read_annotated

if TYPE_CHECKING:
    from datasets import Dataset

REPORT_NAME = "report.json"
_MODULES = (mask_folder, coco_json, labelme_json, yolo_text)
LAYOUTS = "\n\n".join(f"({number}) {module.__doc__.strip()}" for number, module in enumerate(_MODULES, start=1))
_SHOWN = 20


def find_source(folder: Path, instances: Sequence[str] = ()) -> Source:
    """Detect the annotation format of a folder and return its annotated images.

    Args:
        folder: Folder of images and annotations, in one of the layouts that `--help` lists.
        instances: Classes whose masks are split into connected components, one object each (mask folders only).

    Raises:
        ValueError: If the layout is unknown, or the folder has no annotated image.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a directory.")
    masks = mask_folder.find_mask_folder(folder)
    if masks:
        source = mask_folder.read_mask_folder(masks, instances)
        return _not_empty(folder, source)
    if instances:
        raise ValueError(
            f"--instances applies to folders of masks only, but {folder} has no masks. Remove the option."
        )
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
            f"{folder} contains no supported annotations: neither the folders images and masks with a file "
            f"{mask_folder.NAMES_FILE}, nor COCO or labelme JSON files, nor YOLO text files with class names. "
            "`python -m train.data.from_folder --help` shows the layouts."
            + "".join(f"\n  {note}" for note in notes[:_SHOWN])
        )
    return _not_empty(folder, source)


def _not_empty(folder: Path, source: Source) -> Source:
    if not source.images:
        raise ValueError("\n  ".join([f"{folder} has no annotated image.", *source.problems[:10]]))
    return source


def convert(
    folder: Path, out: Path, val_share: float = 0.1, instances: Sequence[str] = (), init_from: str | None = None
) -> dict[str, Any]:
    """Write the dataset, vocabulary and report of an annotated folder atomically into a new folder.

    Images that cannot be used are skipped and listed in the report.

    Args:
        folder: Folder of images and annotations, in one of the layouts that `--help` lists.
        out: Output folder, which must not exist.
        val_share: Fraction of the images for the split `val`, if the folder does not define splits.
        instances: Classes whose masks are split into connected components; see `mask_folder.read_mask_folder`.
        init_from: Checkpoint to be trained on the dataset; its text encoder must distinguish the classes.

    Returns:
        The report: `layout`, the detected annotation format; `images`, their number in each split; `classes`, the
        numbers of `segments` and `images` of each class; `void_share`, the fraction of void pixels; `problems`, the
        skipped images; `left_out`, skipped annotations of other images; and `notes`.

    Raises:
        ValueError: If `out` already exists or is being written by another process, no image can be used, or the
            checkpoint cannot distinguish classes.
    """
    with lock_output(out):
        return _convert(folder, out, val_share, instances, init_from)


def _convert(
    folder: Path, out: Path, val_share: float, instances: Sequence[str], init_from: str | None
) -> dict[str, Any]:
    from datasets import DatasetDict

    if out.exists():
        raise ValueError(f"{out} already exists: choose another folder, or remove it.")
    source = find_source(folder, instances)
    if init_from is not None and (reason := why_indistinct(source.vocabulary, init_from)):
        raise ValueError(f"--init-from: {reason}")
    remove_leftovers(out.parent, out.name)
    with atomic_folder(out) as unfinished:
        writer = _Writer(source)
        splits = {
            split: writer.write(split, images, unfinished / f"{split}.arrow")
            for split, images in shares(source, val_share)
        }
        if not any(map(len, splits.values())):
            raise ValueError("\n  ".join(["No image can be used.", *source.problems[:10]]))
        if not writer.segments.any():
            raise ValueError(
                "No image has a segment of any class: all pixels are void. For masks with the values 0 and 255, add a "
                f'name for 255 to {mask_folder.NAMES_FILE}, such as {{"255": "cat"}}.'
            )
        DatasetDict({split: rows for split, rows in splits.items() if len(rows)}).save_to_disk(unfinished)
        for split in splits:
            (unfinished / f"{split}.arrow").unlink()
        command = shlex.join(["python", "-m", "train.data.from_folder", str(folder), "--out", str(out)])
        remedy = f"delete {out} (`rm -r {shlex.quote(str(out))}`) and create it again with `{command}`."
        write_dataset_checksums(unfinished, remedy)
        atomic_write_json(unfinished / VOCABULARY_NAME, vocabulary_json(source.vocabulary))
        report = writer.report({split: len(rows) for split, rows in splits.items() if len(rows) or split != "test"})
        atomic_write_json(unfinished / REPORT_NAME, report)
    return report


def shares(source: Source, val_share: float) -> Iterator[tuple[str, list[AnnotatedImage]]]:
    """Yield the images of each split, sampled by a hash of the image id so that adding images moves few others."""
    from .samples import stable_number  # imports torch, which --help must not need

    free = sorted((p for p in source.images if p.split is None), key=lambda p: stable_number(p.image_id))
    has_own = any(image.split == "val" for image in source.images)
    drawn = 0 if has_own else min(round(val_share * len(free)), len(source.images) - 1)
    chosen = {image.image_id for image in free[:drawn]}
    for split in SPLITS:
        yield split, [p for p in source.images if split == (p.split or ("val" if p.image_id in chosen else "train"))]


class _Writer:
    """Dataset writer that counts images, segments and void pixels."""

    def __init__(self, source: Source):
        self.source = source
        self.segments = np.zeros(len(source.vocabulary), dtype=int)
        self.images = np.zeros(len(source.vocabulary), dtype=int)
        self.left_out: list[str] = []
        self.crowds = 0
        self.pixels, self.void_pixels = 0, 0

    def write(self, split: str, images: list[AnnotatedImage], path: Path) -> Dataset:
        from datasets import Dataset
        from datasets.arrow_writer import ArrowWriter

        features = dataset_features()
        with ArrowWriter(features=features, path=str(path)) as writer:
            for image in tqdm(images, f"Writing {split}", unit="image"):
                try:
                    writer.write(features.encode_example(self._row(image)))
                except (OSError, ValueError, SyntaxError) as error:
                    self.source.problems.append(f"{image.path}: {str(error).removeprefix(f'{image.path}: ')}")
            writer.finalize()
        return Dataset.from_file(str(path))

    def _row(self, image: AnnotatedImage) -> dict[str, Any]:
        content, ids, segments = read_annotated(image)
        check_classes(image, segments, len(self.source.vocabulary))
        self.left_out += image.notes
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
            "captions": list(image.captions),
            "image_id": image.image_id,
            "video_id": image.video_id,
            "frame": image.frame,
        }

    def report(self, images: dict[str, int]) -> dict[str, Any]:
        labels = self.source.vocabulary.labels
        notes = list(self.source.notes)
        if self.crowds:
            notes.append(
                f"{self.crowds} of {self.segments.sum()} segments are crowds (iscrowd 1), which training ignores; "
                "set iscrowd to 0 if they are single objects, as in masks from CVAT"
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
    """Return the report of `convert` as readable text."""
    sizes = ", ".join(f"{number} {split}" for split, number in report["images"].items())
    lines = [f"Read as {report['layout']}", f"{out}: {sizes}", f"{'class':<30}{'segments':>10}{'images':>10}"]
    for label, counts in report["classes"].items():
        note = "   in no image" if counts["segments"] == 0 else ""
        lines.append(f"{label:<30}{counts['segments']:>10}{counts['images']:>10}{note}")
    lines += [_void_line(report), *report["notes"]]
    for part, title in (
        ("problems", "Skipped images"),
        ("left_out", "Skipped annotations of images that are kept"),
    ):
        if report[part]:
            lines.append(f"{title}, {len(report[part])} in total (see {out / REPORT_NAME}):")
            lines += [f"  {line}" for line in report[part][:_SHOWN]]
    return "\n".join(lines)


def _void_line(report: dict[str, Any]) -> str:
    share = f"{100 * report['void_share']:.1f} % of the pixels are void"
    if report["void_share"] == 0 or any(label.casefold() == "background" for label in report["classes"]):
        return f"{share}."
    return (
        f"{share}: evaluation ignores them, training counts them as outside of every segment (data.ignore_void=true "
        "leaves them out), and a semantic prediction assigns them to the classes above. To predict them separately, "
        "annotate them with a class such as background, or segment with --void-labels or "
        "--void-threshold."
    )


def why_indistinct(vocabulary: Vocabulary, checkpoint: str) -> str | None:
    """Return why the text encoder of a checkpoint cannot distinguish classes, or None if it can.

    Raises:
        UserError: If `checkpoint` cannot be loaded.
    """
    from modeling_gkc.encoded_vocabulary import EncodedVocabulary

    model, processor = load_checkpoint(checkpoint)
    try:
        with warnings.catch_warnings():  # training warns about harmless unknown words
            warnings.simplefilter("ignore", UserWarning)
            EncodedVocabulary.encode(vocabulary, model, processor, distinct=True)
    except ValueError as error:
        return f"{checkpoint}: {error}"
    return None


def _note_of_default(out: Path) -> str | None:
    """Return a warning if the default checkpoint of the recipe `custom` cannot distinguish the classes."""
    checkpoint = load_recipe("custom").model.init_from
    if not (Path(checkpoint) / "config.json").is_file():
        return None
    reason = why_indistinct(Vocabulary.from_file(out / VOCABULARY_NAME), checkpoint)
    return reason and f"The recipe custom cannot start from {reason} Name it with init_from=CHECKPOINT."


@interruptible("train.data.from_folder", "Nothing was written.")
def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code: 1 if images were skipped, 2 on failure, 130 after Ctrl-C."""
    parser = argparse.ArgumentParser(
        prog="python -m train.data.from_folder",
        description=f"{__doc__}\n{LAYOUTS}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=f"DATASET also contains {VOCABULARY_NAME}, which may be edited to add synonyms, and {REPORT_NAME}.",
    )
    parser.add_argument("folder", type=Path, metavar="DIR", help="folder of images and annotations")
    parser.add_argument(
        "--out", type=Path, required=True, metavar="DATASET", help="output folder, which must not exist"
    )
    parser.add_argument(
        "--val-share",
        type=float,
        default=0.1,
        help="fraction of the images for validation if the folder does not define splits (default: %(default)s)",
    )
    parser.add_argument(
        "--instances",
        nargs="+",
        default=(),
        metavar="CLASS",
        help="classes whose masks are split into connected components, one object each (mask folders only)",
    )
    parser.add_argument(
        "--init-from", metavar="CHECKPOINT", help="fail if the text encoder of this checkpoint cannot separate classes"
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
