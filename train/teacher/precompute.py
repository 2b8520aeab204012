"""Precompute teacher embeddings, synonym probabilities and caption nouns of a dataset: `python -m train.cache`."""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm.auto import tqdm

from modeling_gkc.atomic_files import atomic_folder, remove_leftovers
from modeling_gkc.cli.common import add_parser, interruptible, non_negative, output_folder, positive
from modeling_gkc.label_text import error_line
from modeling_gkc.vocabulary import Vocabulary

from ..storage.locks import lock_output
from ..storage.processes import from_main, processes

if TYPE_CHECKING:
    from datasets import Dataset
    from torch import nn

    from .region_rows import ImageRegions, RegionSource

CACHES = "gkc_cache"
DATA_FINGERPRINT = "data.json"
DTYPES = ("float32", "bfloat16", "float16")

DESCRIPTION = "Precompute CLIP's outputs and caption nouns of a dataset, so that training need not compute them."
EXAMPLES = """\
examples:
  python -m train.cache teacher data/coco --clip clip-rn50
  accelerate launch --num_processes 8 -m train.cache teacher data/coco --clip clip-rn50 --dtype bfloat16
  python -m train.cache synonyms data/coco --clip clip-rn50 --vocabulary coco_panoptic_133
  python -m train.cache nouns data/coco
  torchrun --nproc_per_node 4 -m train.cache teacher data/coco --clip clip-rn50     several processes without a GPU

DATASET is a folder that `save_to_disk` or `python -m train.data.prepare` wrote, or a name on the Hub (then --out is
needed). CLIP is a folder that `gkc convert clip-resnet` wrote, or a CLIPModel of transformers.

A cache is written in shards, each of which is written atomically. If the command is interrupted, run it again to
continue, with any number of processes. A cache of other data, another teacher or other crop settings is rejected with
a message that names the difference, here and in training. Training also rejects incomplete caches.

`python -m train.cache COMMAND --help` explains each command.
"""
TEACHER_EXAMPLES = """\
Computes the embedding of every annotated region by CLIP's image encoder, for recipes with teacher.source=cached. A
region is cropped to its bounding box, gray outside its mask. Crowds and segments without a pixel have no embedding. An
embedding of D dimensions takes 2 D bytes: 3.1 GB for COCO (118,000 images, 1.5 million regions, D = 1024).

examples:
  python -m train.cache teacher data/coco --clip clip-rn50
      writes data/coco/gkc_cache/train/teacher
  accelerate launch --num_processes 8 -m train.cache teacher data/coco --clip clip-rn50 --dtype bfloat16
  python -m train.cache teacher someone/images --split validation --clip openai/clip-vit-base-patch32 --out cache
"""
SYNONYMS_EXAMPLES = """\
Computes the probability of every name of a region's class by CLIP, for recipes with synonyms.mode=sample and
synonyms.probabilities=boxes. As published, CLIP compares the region's unmasked bounding box with the texts "a photo of
NAME", and the softmax is over the names of the region's class.

--vocabulary must be the training vocabulary: the name of a packaged one (`gkc vocab list`), or a .json, .csv or .txt
file.

examples:
  python -m train.cache synonyms data/coco --clip clip-rn50 --vocabulary coco_panoptic_133
      writes data/coco/gkc_cache/train/synonyms
  python -m train.cache synonyms data/tools --clip clip-rn50 --vocabulary tools.json
"""
NOUNS_EXAMPLES = """\
Writes a copy of the dataset with a column `nouns`, the nouns of each image's captions, for recipes with a positive
grounding.weight. The dataset itself is not changed. Its caches are valid for the copy too and are linked there.

examples:
  python -m train.cache nouns data/coco
      writes data/coco-nouns; then train with dataset=data/coco-nouns
"""


def cache_folder(dataset_folder: str | Path, split: str, kind: str) -> Path:
    """Return the default folder of a cache, `<dataset folder>/gkc_cache/<split>/<kind>`.

    Args:
        dataset_folder: Folder that `save_to_disk` wrote.
        split: Name of the split, such as `train`, also if the folder contains a single split.
        kind: Kind of the cache, `teacher` or `synonyms`.
    """
    return Path(dataset_folder) / CACHES / split / kind


def fingerprint_file(dataset_folder: str | Path, split: str) -> Path | None:
    """Return the file that stores the hash of a split; None if the dataset is not a local folder.

    Args:
        dataset_folder: Folder of the dataset, or its name on the Hub.
        split: Name of the split.
    """
    return cache_folder(dataset_folder, split, DATA_FINGERPRINT) if Path(dataset_folder).is_dir() else None


def write_cache(
    source: RegionSource,
    dataset: Dataset,
    folder: str | Path,
    fingerprint: dict[str, str],
    batch_size: int = 256,
    num_workers: int = 0,
    images_per_shard: int = 500,
    max_broken_samples: int = 100,
    writing: dict[str, str] | None = None,
    command: str = "",
    progress: bool = True,
) -> None:
    """Write a cache, or its missing shards; all processes of an `accelerate launch` must call this together.

    Args:
        source: Source of the rows.
        dataset: Dataset in the schema of `train.data`.
        folder: Folder of the cache.
        fingerprint: Hashes that identify the inputs of the cache, from `source.fingerprint`.
        batch_size: Number of crops in a forward pass.
        num_workers: Number of data loading processes of each process.
        images_per_shard: Number of images in a shard, which a killed process repeats at most. An incomplete cache
            keeps its own number.
        max_broken_samples: Number of unreadable images that each process reports and skips before it stops.
        writing: Further settings that must be the same when an incomplete cache is continued.
        command: Command that completes the cache, for error messages of training.
        progress: Whether to show a progress bar.

    Raises:
        ValueError: The folder contains a cache of other inputs, there are no regions, or too many images are broken.
    """
    from ..storage.shards import StoreSettings, StoreWriter
    from .region_rows import embed_images, read_regions

    state = processes()
    settings = StoreSettings(
        kind=source.kind,
        fingerprint=fingerprint,
        columns=source.columns,
        images=len(dataset),
        images_per_shard=images_per_shard,
        writing=writing or {},
        command=command,
    )
    writer = StoreWriter(folder, settings)
    state.wait_for_everyone()
    if state.is_main_process:
        writer.begin()
    pending = from_main(state, lambda: writer.pending())
    own = pending[state.process_index :: state.num_processes]
    positions = [position for shard in own for position in writer.settings.images_of(shard)]
    listed = _count_segments(dataset)[positions].tolist()
    others = f", process 1 of {state.num_processes}" if state.num_processes > 1 else ""
    hidden = not progress or not state.is_main_process
    with tqdm(desc=f"Embedding regions{others}", total=sum(listed), unit="region", disable=hidden) as bar:
        read = read_regions(dataset, source, positions, num_workers)
        images = _track_progress(read, listed, bar, max_broken_samples)
        for shard in own:
            of_shard = (next(images) for _ in writer.settings.images_of(shard))
            regions = embed_images(of_shard, source, batch_size)
            writer.write(shard, regions.image_ids, regions.counts, regions.segment_ids, regions.rows)
    state.wait_for_everyone()
    if state.is_main_process:
        writer.finish()
    state.wait_for_everyone()


def _count_segments(dataset: Dataset) -> np.ndarray:
    """Return the number of segments of every image, empty ones included."""
    import pyarrow.compute as pc

    tables = dataset.select_columns("segments").with_format("arrow").iter(10_000)
    counts = [pc.list_value_length(table.column("segments")).to_numpy() for table in tables]
    return np.concatenate([np.empty(0, dtype=np.int64), *counts]).astype(np.int64)


def _track_progress(
    images: Iterable[ImageRegions], listed: Iterable[int], bar: tqdm, max_broken: int
) -> Iterator[ImageRegions]:
    """Yield images, advance the progress bar, report unreadable images, and raise if there are too many."""
    broken = 0
    for image, count in zip(images, listed, strict=True):
        if image.broken is not None:
            broken += 1
            tqdm.write(f"Skipped an image that cannot be read: {image.broken}", file=sys.stderr)
        if broken > max_broken:
            raise ValueError(
                f"More than {max_broken} images cannot be read; repair them or raise --max-broken-samples. The last: "
                f"{image.broken}"
            )
        bar.update(count)
        yield image


@interruptible("train.cache", "Run the same command again to continue.")
def main(argv: Sequence[str] | None = None) -> int:
    """Run `python -m train.cache`.

    Args:
        argv: Arguments without the program's name; None uses those of the process.

    Returns:
        The exit code: 0, or 2 for a usage error, which is printed as one line on the error stream.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    options = _parser().parse_args(argv)
    try:
        options.run(options, f"python -m train.cache {shlex.join(argv)}")
    except (ValueError, RuntimeError, OSError) as error:
        reason = error_line(error) if isinstance(error, OSError) else error
        sys.stderr.write(f"train.cache: error: {reason}\n")
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m train.cache",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    teacher = _add_command(
        commands, "teacher", "CLIP image embeddings of all annotated regions", TEACHER_EXAMPLES, _teacher
    )
    _add_cache_options(teacher)
    aspect = "pad crops with gray to a square (default: stretch them to a square, as published)"
    teacher.add_argument("--keep-aspect", action="store_true", help=aspect)
    synonyms = _add_command(
        commands, "synonyms", "CLIP's probabilities of the names of each region's class", SYNONYMS_EXAMPLES, _synonyms
    )
    _add_cache_options(synonyms)
    add = synonyms.add_argument
    add(
        "--vocabulary",
        metavar="NAME|FILE",
        required=True,
        help="training vocabulary: a packaged name or a vocabulary file",
    )
    add(
        "--logit-scale",
        type=float,
        metavar="X",
        help="factor of the cosine similarities (default: CLIP's own; 100 for OpenAI's)",
    )
    nouns = _add_command(commands, "nouns", "nouns of the captions, for caption grounding", NOUNS_EXAMPLES, _nouns)
    add = nouns.add_argument
    add("--out", type=output_folder, metavar="DIR", help="folder of the new dataset (default: DATASET-nouns)")
    add(
        "--wordnet",
        type=Path,
        metavar="DIR",
        help="find nouns with this WordNet (default: nltk's tagger if its data is installed, or else WordNet)",
    )
    add("--num-proc", type=positive, default=1, metavar="N", help="number of processes (default: %(default)s)")
    return parser


def _add_command(commands: Any, name: str, summary: str, examples: str, run: Callable) -> argparse.ArgumentParser:
    parser = add_parser(commands, name, summary, f"{summary[0].upper()}{summary[1:]}.", examples)
    parser.set_defaults(run=run)
    parser.add_argument("dataset", metavar="DATASET", help="folder that `save_to_disk` wrote, or a name on the Hub")
    return parser


def _add_cache_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--clip", metavar="CLIP", required=True, help="CLIP to embed with: a folder or a name on the Hub")
    add("--split", default="train", help="dataset split to embed (default: %(default)s)")
    add(
        "--out",
        type=output_folder,
        metavar="DIR",
        help="folder of the cache (default: DATASET/gkc_cache/SPLIT/COMMAND)",
    )
    add(
        "--batch-size",
        type=positive,
        default=256,
        metavar="N",
        help="number of crops in a forward pass (default: %(default)s)",
    )
    workers = "number of data loading processes of each process (default: %(default)s)"
    add("--num-workers", type=non_negative, default=4, metavar="N", help=workers)
    add("--dtype", choices=DTYPES, default="float32", help="data type in which CLIP computes (default: %(default)s)")
    broken = "number of unreadable images to skip before the command stops (default: %(default)s)"
    add("--max-broken-samples", type=non_negative, default=100, metavar="N", help=broken)
    shard = "number of images in a shard, which a killed process repeats at most (default: %(default)s)"
    add("--images-per-shard", type=positive, default=500, metavar="N", help=shard)


def _teacher(options: argparse.Namespace, command: str) -> None:
    """Run `train.cache teacher`."""
    from .clip_towers import load_vision_tower
    from .region_teacher import RegionTeacher

    vision_model = load_vision_tower(options.clip)
    _write(RegionTeacher(vision_model, options.keep_aspect), [vision_model], options, command)


def _synonyms(options: argparse.Namespace, command: str) -> None:
    """Run `train.cache synonyms`."""
    from .clip_towers import load_clip_towers
    from .synonym_probabilities import BoxSynonyms

    towers = load_clip_towers(options.clip)
    try:
        vocabulary = Vocabulary.parse(options.vocabulary)
    except ValueError as error:
        raise ValueError(f"--vocabulary: {error}") from error
    source = BoxSynonyms(towers, vocabulary, options.logit_scale)
    _write(source, [towers.vision_model, towers.text_model], options, command)


def _write(source: RegionSource, models: list[nn.Module], options: argparse.Namespace, command: str) -> None:
    """Write the cache of one source as the command line says."""
    import torch

    from ..data.load import load_split

    state = processes()
    dataset = load_split(options.dataset, options.split)
    folder = options.out
    if folder is None:
        if not Path(options.dataset).is_dir():
            raise ValueError(f"{options.dataset} is not a local folder: give the folder of the cache with --out.")
        folder = cache_folder(options.dataset, options.split, source.kind)
    _check_distinct_ids(dataset)
    remember = fingerprint_file(options.dataset, options.split)
    # Computed before the models change their precision, because training compares the weights as they are loaded.
    fingerprint = from_main(state, lambda: source.fingerprint(dataset, remember))
    for model in models:
        model.to(device=state.device, dtype=getattr(torch, options.dtype))
    with lock_output(folder) if state.is_main_process else nullcontext():
        write_cache(
            source,
            dataset,
            folder,
            fingerprint,
            batch_size=options.batch_size,
            num_workers=options.num_workers,
            images_per_shard=options.images_per_shard,
            max_broken_samples=options.max_broken_samples,
            writing={"dtype": options.dtype},
            command=command,
        )
    if state.is_main_process:
        tqdm.write(f"{folder}: {source.kind} of {len(dataset)} images, complete", file=sys.stderr)


def _check_distinct_ids(dataset: Dataset) -> None:
    """Raise a `ValueError` if two images of a dataset have the same id."""
    image_ids = dataset["image_id"][:]
    if len(set(image_ids)) < len(image_ids):
        repeated = next(image_id for image_id, count in Counter(image_ids).items() if count > 1)
        raise ValueError(f"Several images of the dataset have the image_id {repeated!r}: give each a unique one.")


def _nouns(options: argparse.Namespace, command: str) -> None:
    """Run `train.cache nouns`."""
    from datasets import DatasetDict

    from ..data.wordnet.caption_nouns import add_nouns  # needs nltk, which the other commands do not

    source = Path(options.dataset)
    if not source.is_dir():
        raise ValueError(f"DATASET: {source} is not a directory; save the dataset first with `save_to_disk`.")
    out = options.out or source.with_name(f"{source.name}-nouns")
    if out.exists():
        raise ValueError(f"--out: {out} exists already; name a new folder.")
    if not processes().is_main_process:
        return
    from ..data.load import load_splits, write_dataset_checksums
    from ..data.prepared import VOCABULARY_NAME

    with lock_output(out):
        remove_leftovers(out.parent, out.name)
        try:
            loaded = load_splits(source)
        except ValueError as error:
            raise ValueError(f"DATASET: {error}") from error
        parts = loaded if isinstance(loaded, DatasetDict) else {"": loaded}
        parts = {name: add_nouns(part, options.wordnet, options.num_proc) for name, part in parts.items()}
        with atomic_folder(out) as unfinished:
            (DatasetDict(parts) if "" not in parts else parts[""]).save_to_disk(str(unfinished))
            write_dataset_checksums(
                unfinished, f"delete {out} (`rm -r {shlex.quote(str(out))}`) and give `{command}` again."
            )
            if (source / VOCABULARY_NAME).is_file():
                shutil.copy2(source / VOCABULARY_NAME, unfinished)
            if (source / CACHES).is_dir():
                shutil.copytree(source / CACHES, unfinished / CACHES, copy_function=_link)
    tqdm.write(f"{out}: {', '.join(filter(None, parts)) or 'the dataset'} with the column `nouns`", file=sys.stderr)


def _link(source: str, target: str) -> None:
    """Hard-link a file, or copy it where the file system has no hard links."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
