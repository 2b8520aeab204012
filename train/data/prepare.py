"""Convert a published benchmark to a dataset of Parquet files for training and evaluation.

    python -m train.data.prepare ade20k_150 --source ADEChallengeData2016 --out data/ade20k_150
    python -m train.data.prepare coco_panoptic_133 --source coco --out data/coco --split val --num-proc 8

Images are stored as their original file bytes and labels are stored losslessly. Every value of every annotation is
checked. Files that are missing, damaged, differ in size from their image or contain unexpected values are listed by
name, and the dataset is not finished while there is one, unless --skip-broken permits it. Repeat an interrupted
command to resume after the shards that are complete. Repeat a finished command to compare every shard with its
SHA-256 checksum; a split with a missing or damaged shard is written again.
"""

import argparse
import hashlib
import json
import shutil
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from modeling_gkc.atomic_files import atomic_write_json, remove_leftovers
from modeling_gkc.cli.common import interruptible, output_folder, warnings_as_lines
from modeling_gkc.label_text import error_line
from modeling_gkc.vocabulary import Vocabulary

from ..storage.locks import lock_output
from .benchmarks import all_benchmarks, benchmark_named
from .benchmarks.base import Benchmark
from .prepared import (
    ARROW_FOLDER,
    MANIFEST_NAME,
    VOCABULARY_NAME,
    is_damaged,
    read_manifest,
    vocabulary_json,
    write_manifest,
)
from .prepared_shards import PROGRESS_FOLDER, ShardReport, Work, plan_shards, report_path, write_shards
from .sources import AnnotatedImage

IMAGES_PER_SHARD = 500
_SHOWN_PROBLEMS = 50
_EPILOG = """\
The output folder contains vocabulary.json, prepared.json (image and segment counts of each class) and the shards
SPLIT-00000-of-00007.parquet, ... Name it as the dataset of a recipe or as --data of `python -m train.evaluate`.

`python -m train.data.prepare BENCHMARK --help` shows the expected layout of the published folder.
"""


@dataclass(frozen=True)
class Settings:
    """Options of a benchmark preparation.

    Attributes:
        num_proc: Number of worker processes. The output does not depend on it.
        skip_broken: Maximum number of unusable or missing images to tolerate. None tolerates none.
        limit: Number of leading images of each split to prepare, for a trial. None prepares all.
        any_count: Whether to accept a number of images that differs from the published number.
        images_per_shard: Number of images in each Parquet file.
        progress: Whether to show progress bars.
    """

    num_proc: int = 1
    skip_broken: int | None = None
    limit: int | None = None
    any_count: bool = False
    images_per_shard: int = IMAGES_PER_SHARD
    progress: bool = True

    def stored(self) -> dict[str, Any]:
        """Return the options that the output depends on, as stored in the manifest."""
        return {"limit": self.limit, "images_per_shard": self.images_per_shard}


def prepare(
    benchmark: Benchmark,
    source: Path,
    out: Path,
    splits: Sequence[str] | None = None,
    settings: Settings | None = None,
) -> dict[str, dict[str, Any]]:
    """Convert splits of a benchmark to Parquet files with a vocabulary and a manifest.

    Args:
        benchmark: The benchmark, one of `train.data.benchmarks`.
        source: Folder of the benchmark as published.
        out: Output folder. It is created, or resumed if it holds an unfinished preparation.
        splits: Names of the splits to prepare. None prepares all splits of the benchmark.
        settings: Options of the preparation. None takes the defaults.

    Returns:
        The entry of each split in `prepared.json`. Where `complete` is false, `problems` lists the reasons.

    Raises:
        ValueError: If `source` does not have the published layout, or `out` holds other files or was started with
            other options.
        RuntimeError: If a library is missing, or a worker process was killed.
    """
    settings, source, out = settings or Settings(), Path(source), Path(out)
    splits = _check_splits(benchmark, splits)
    with lock_output(out):
        manifest = _open_folder(benchmark, source, out, settings)
        for split in splits:
            known = manifest["splits"].get(split)
            if known is None or not known["complete"] or _damaged_files(out, known):
                _prepare_split(benchmark, source, out, split, settings, manifest)
        if not any((out / PROGRESS_FOLDER).glob("*")):
            shutil.rmtree(out / PROGRESS_FOLDER, ignore_errors=True)
        return {split: manifest["splits"][split] for split in splits}


def _check_splits(benchmark: Benchmark, splits: Sequence[str] | None) -> list[str]:
    wrong = sorted(set(splits or ()) - set(benchmark.splits))
    if wrong:
        raise ValueError(
            f"{benchmark.name} has no split {', '.join(wrong)}. Choose from: {', '.join(benchmark.splits)}."
        )
    return list(dict.fromkeys(splits or benchmark.splits))


def _damaged_files(out: Path, split: dict[str, Any]) -> list[str]:
    """Return the shards of a finished split whose checksum is wrong, by reading every file."""
    return [shard["file"] for shard in split["shards"] if is_damaged(out / shard["file"], shard["sha256"])]


def _open_folder(benchmark: Benchmark, source: Path, out: Path, settings: Settings) -> dict[str, Any]:
    """Return the manifest of an output folder, creating the folder if it does not exist."""
    if (out / MANIFEST_NAME).is_file():
        manifest = read_manifest(out)
        wanted = {"benchmark": benchmark.name} | settings.stored()
        found = {"benchmark": manifest["benchmark"]} | manifest["options"]
        differing = [
            f"{name} {found.get(name)}, now {value}" for name, value in wanted.items() if found[name] != value
        ]
        if differing:
            raise ValueError(
                f"{out} was started with {'; '.join(differing)}: repeat the original options, or name another --out."
            )
        if is_damaged(out / VOCABULARY_NAME, manifest["vocabulary_sha256"]):
            _restore_vocabulary(benchmark, source, out, manifest["vocabulary_sha256"])
        return manifest
    if not source.is_dir():
        raise ValueError(f"--source: {source} is not a directory.")
    if out.exists() and any(out.iterdir()):
        raise ValueError(f"--out: {out} contains other files. Name an empty or a new folder.")
    vocabulary = benchmark.classes(source)
    out.mkdir(parents=True, exist_ok=True)
    atomic_write_json(out / VOCABULARY_NAME, vocabulary_json(vocabulary), indent=1)
    manifest = {
        "benchmark": benchmark.name,
        "source": str(source.resolve()),
        "options": settings.stored(),
        "splits": {},
    }
    write_manifest(out, manifest)
    return read_manifest(out)


def _restore_vocabulary(benchmark: Benchmark, source: Path, out: Path, sha256: str) -> None:
    """Write the vocabulary file of an output folder again after it was lost, damaged or edited."""
    if not source.is_dir():
        raise ValueError(f"--source: {source} is not a directory.")
    atomic_write_json(out / VOCABULARY_NAME, vocabulary_json(benchmark.classes(source)), indent=1)
    if is_damaged(out / VOCABULARY_NAME, sha256):
        raise ValueError(f"{source} has other classes than those that {out} was started with: name another --out.")


def _prepare_split(
    benchmark: Benchmark, source: Path, out: Path, split: str, settings: Settings, manifest: dict[str, Any]
) -> None:
    if not source.is_dir():
        raise ValueError(f"--source: {source} is not a directory.")
    images = benchmark.find(source, split)[: settings.limit]
    repeated = [name for name, count in Counter(image.image_id for image in images).items() if count > 1]
    if repeated:
        raise ValueError(
            f"Several images have the id {repeated[0]!r} ({len(repeated)} repeated ids in total): rename their files."
        )
    digest = _digest(source, images)
    if (manifest["splits"].get(split) or {}).get("digest") != digest:
        # The source was another when a killed run began.
        for place in (out, out / PROGRESS_FOLDER):
            for path in place.glob(f"{split}-*-of-*.parquet*"):
                path.unlink()
        shutil.rmtree(out / ARROW_FOLDER, ignore_errors=True)
    manifest["splits"][split] = {"complete": False, "digest": digest, "shards": [], "problems": []}
    write_manifest(out, manifest)
    vocabulary = benchmark.classes(source)
    written = json.loads((out / VOCABULARY_NAME).read_text(encoding="utf-8"))["classes"]
    if [entry["name"] for entry in written] != vocabulary.labels:
        raise ValueError(f"{source} has other classes than {out / VOCABULARY_NAME}: name another --out.")
    plans = plan_shards(split, len(images), settings.images_per_shard)
    reports = _write(Work(benchmark, split, images, len(vocabulary), out, plans), settings)
    record = _record(benchmark, split, len(images), reports, vocabulary, settings) | {"digest": digest}
    manifest["splits"][split] = record
    for report in reports:  # a finished split needs no notes to resume from; faulty shards are written again
        if record["complete"] or report.problems:
            report_path(out, report.file).unlink(missing_ok=True)
        if not record["complete"] and report.problems:
            (out / report.file).unlink(missing_ok=True)
    write_manifest(out, manifest)


def _digest(source: Path, images: Sequence[AnnotatedImage]) -> str:
    """Return a digest of the image ids and paths in order, which detects a changed source on resume."""
    digest = hashlib.sha256(str(source.resolve()).encode())
    for image in images:
        path = image.path.relative_to(source) if image.path.is_relative_to(source) else image.path
        digest.update(json.dumps([image.image_id, path.as_posix()]).encode())
    return digest.hexdigest()


def _write(work: Work, settings: Settings) -> list[ShardReport]:
    """Write the unfinished shards of a split and return the reports of all its shards."""
    shards = work.shards
    shards.remove_leftovers()
    remove_leftovers(work.out / PROGRESS_FOLDER)
    for path in (work.out / PROGRESS_FOLDER).glob(f"{work.split}-*.parquet.*[0-9]"):
        path.unlink()  # partial shard of a killed run of version 0.1.0 or older
    found = shards.finished()
    rest = [plan for plan in work.plans if plan.number not in found]
    finished = sum(plan.stop - plan.start for plan in work.plans if plan.number in found)
    label = f"{work.benchmark.name} {work.split}"
    if found:
        tqdm.write(f"{label}: resuming with {finished} of {len(work.images)} images finished", file=sys.stderr)
    total = len(work.images)
    with tqdm(total=total, initial=finished, desc=label, unit="image", disable=not settings.progress) as bar:
        written = write_shards(work, rest, settings.num_proc, bar.update)
    found |= {plan.number: report for plan, report in zip(rest, written, strict=True)}
    return [found[plan.number] for plan in work.plans]


def _record(
    benchmark: Benchmark,
    split: str,
    found: int,
    reports: Sequence[ShardReport],
    vocabulary: Vocabulary,
    settings: Settings,
) -> dict[str, Any]:
    """Return the entry of a split in `prepared.json`."""
    problems = [problem for report in reports for problem in report.problems]
    missing, notes = _compare_counts(benchmark, split, found, settings)
    segments, images = Counter(), Counter()
    for report in reports:
        segments.update(report.segments)
        images.update(report.class_images)
    return {
        "complete": len(problems) + missing <= (settings.skip_broken or 0),
        "images": sum(report.images for report in reports),
        "found": found,
        "expected": benchmark.splits[split],
        "left_out": sum(report.left_out for report in reports),
        "notes": [*notes, *(note for report in reports for note in report.notes)],
        "problems": problems,
        "classes": {
            label: {"segments": segments[index], "images": images[index]}
            for index, label in enumerate(vocabulary.labels)
        },
        "shards": [{"file": report.file, "images": report.images, "sha256": report.sha256} for report in reports],
    }


def _compare_counts(benchmark: Benchmark, split: str, found: int, settings: Settings) -> tuple[int, list[str]]:
    """Return the deviation from the published number of images, and notes that explain it."""
    expected, others = benchmark.splits[split], benchmark.other_counts.get(split, ())
    if settings.limit is not None or expected is None or found == expected:
        return 0, []
    note = f"Found {found} images, but {expected} are published."
    note += f" {benchmark.discrepancy}" if benchmark.discrepancy else ""
    if found in others or settings.any_count:
        return 0, [note]
    return abs(expected - found), [f"{note} Add --any-count to accept a different number."]


def describe(benchmark: Benchmark, splits: dict[str, dict[str, Any]], out: Path) -> str:
    """Return a readable summary of the prepared splits."""
    lines = []
    for split, record in splits.items():
        expected = f" of {record['expected']} published" if record["expected"] is not None else ""
        left_out = f", {record['left_out']} excluded by the rules of the benchmark" if record["left_out"] else ""
        state = "finished" if record["complete"] else "NOT finished"
        lines.append(f"{benchmark.name} {split}: {state}, {record['images']} images{expected}{left_out}, in {out}")
        lines += [f"  {note}" for note in record["notes"][:_SHOWN_PROBLEMS]]
        if len(record["notes"]) > _SHOWN_PROBLEMS:
            lines.append(f"  ... and {len(record['notes']) - _SHOWN_PROBLEMS} more (see {out / MANIFEST_NAME})")
        if not record["found"]:
            continue
        absent = [label for label, counts in record["classes"].items() if counts["images"] == 0]
        if absent:
            shown = ", ".join(absent[:10]) + (", ..." if len(absent) > 10 else "")
            lines.append(f"  {len(absent)} of {len(record['classes'])} classes occur in no image: {shown}")
        problems = record["problems"]
        if problems:
            lines.append(f"  {len(problems)} images cannot be used:")
            lines += [f"    {line}" for line in problems[:_SHOWN_PROBLEMS]]
            if len(problems) > _SHOWN_PROBLEMS:
                lines.append(f"    ... and {len(problems) - _SHOWN_PROBLEMS} more (see {out / MANIFEST_NAME})")
            if not record["complete"]:
                advice = f"skip them with --skip-broken {len(problems)}"
                lines.append(f"  Repair the files and repeat the command, or {advice}")
    return "\n".join(lines)


def _parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        prog="python -m train.data.prepare", description=__doc__, epilog=_EPILOG, formatter_class=raw
    )
    commands = parser.add_subparsers(dest="benchmark", required=True, metavar="BENCHMARK", title="benchmarks")
    for name, benchmark in all_benchmarks().items():
        summary = benchmark.layout.strip().splitlines()[0]
        counts = ", ".join(
            f"{split} ({'number not published' if number is None else f'{number:,} images'})"
            for split, number in benchmark.splits.items()
        )
        notes = f"\n\n{benchmark.discrepancy}" if benchmark.discrepancy else ""
        layout = f"{benchmark.layout.strip()}\n\nsplits: {counts}{notes}"
        command = commands.add_parser(name, help=summary.replace("%", "%%"), description=layout, formatter_class=raw)
        add = command.add_argument
        add("--source", type=Path, required=True, metavar="DIR", help="folder of the benchmark as published")
        add("--out", type=output_folder, required=True, metavar="DIR", help="output folder, created or resumed")
        add("--split", nargs="+", choices=list(benchmark.splits), help="splits to prepare (default: all)")
        add(
            "--num-proc",
            type=_positive,
            default=1,
            metavar="N",
            help="number of worker processes (default: %(default)s)",
        )
        strictness = command.add_mutually_exclusive_group()
        strictness.add_argument(
            "--strict", action="store_true", help="check all images, report every problem and fail on any (default)"
        )
        strictness.add_argument(
            "--skip-broken",
            type=_positive,
            metavar="N",
            help="skip up to N unusable or missing images instead of failing",
        )
        add(
            "--any-count",
            action="store_true",
            help="accept a number of images that differs from the published number",
        )
        add("--limit", type=_positive, metavar="N", help="prepare only the first N images of each split, for a trial")
        add(
            "--images-per-shard",
            type=_positive,
            default=IMAGES_PER_SHARD,
            metavar="N",
            help="number of images in each Parquet file (default: %(default)s)",
        )
    return parser


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a positive integer, got {text!r}")
    return int(text)


@interruptible("train.data.prepare", "Repeat the command to resume.")
def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code: 1 if an image is unusable or missing, 2 if the run failed."""
    parser = _parser()
    options = parser.parse_args(arguments)
    benchmark = benchmark_named(options.benchmark)
    settings = Settings(
        options.num_proc, options.skip_broken, options.limit, options.any_count, options.images_per_shard
    )
    try:
        if _finished(benchmark, options, settings):
            return 0
        with warnings_as_lines(parser.prog):
            splits = prepare(benchmark, options.source, options.out, options.split, settings)
    except (OSError, ValueError, RuntimeError) as error:
        reason = error_line(error) if isinstance(error, OSError) else error
        tqdm.write(f"{parser.prog} {benchmark.name}: {reason}", file=sys.stderr)
        return 2
    tqdm.write(describe(benchmark, splits, options.out))
    in_order = all(record["complete"] and not record["problems"] for record in splits.values())
    return 0 if in_order else 1


def _finished(benchmark: Benchmark, options: argparse.Namespace, settings: Settings) -> bool:
    """Report and return whether all requested splits are already prepared and undamaged."""
    if not (options.out / MANIFEST_NAME).is_file():
        return False
    known = _open_folder(benchmark, options.source, options.out, settings)["splits"]
    wanted = _check_splits(benchmark, options.split)
    if not all(
        known.get(split, {}).get("complete") and not _damaged_files(options.out, known[split]) for split in wanted
    ):
        return False
    splits = ", ".join(wanted)
    tqdm.write(f"{options.out}: {benchmark.name} {splits} is already finished and every file is undamaged")
    return True


if __name__ == "__main__":
    sys.exit(main())
