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
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm.auto import tqdm

from modeling_gkc.atomic_files import atomic_folder, remove_leftovers
from modeling_gkc.cli.common import interruptible
from modeling_gkc.label_text import error_line
from modeling_gkc.vocabulary import Vocabulary

from ..storage.locks import lock_output

if TYPE_CHECKING:
    from accelerate import PartialState
    from datasets import Dataset
    from torch import nn

    from .region_rows import ImageRegions, RegionSource

CACHES = "gkc_cache"
DATA_FINGERPRINT = "data.json"
DTYPES = ("float32", "bfloat16", "float16")
_LONGEST_WAIT = timedelta(days=2)  # of a process that is done for those that are not

DESCRIPTION = "Precompute what training needs of every annotated region, and store it beside the dataset."
EXAMPLES = """\
examples:
  python -m train.cache teacher data/coco --clip clip-rn50
  accelerate launch --num_processes 8 -m train.cache teacher data/coco --clip clip-rn50 --dtype bfloat16
  python -m train.cache synonyms data/coco --clip clip-rn50 --vocabulary coco_panoptic_133
  python -m train.cache nouns data/coco
  torchrun --nproc_per_node 4 -m train.cache teacher data/coco --clip clip-rn50     several processes without a GPU

DATASET is a folder that `save_to_disk` or `python -m train.data.prepare` wrote, or a name on the Hub (then --out is
needed). CLIP is a folder that `gkc convert clip-resnet` wrote, or a CLIPModel of transformers.

A cache is written in shards, each whole or not there. The same command given again goes on where a killed one stopped,
with any number of processes. A cache of other data, another teacher or other crops is refused, here and in training,
with what differs; a half-written one is refused in training.

`python -m train.cache COMMAND --help` explains each command.
"""
TEACHER_EXAMPLES = """\
Recipes with `teacher="cached"` look up the embeddings of CLIP's image tower that this command makes: of every segment
with a pixel but crowds, grey outside its mask, cut to its box. They take 2 D bytes a region: 3.1 GB for COCO
(118,000 images, 1.5 million regions, D = 1024).

examples:
  python -m train.cache teacher data/coco --clip clip-rn50
      writes data/coco/gkc_cache/train/teacher
  accelerate launch --num_processes 8 -m train.cache teacher data/coco --clip clip-rn50 --dtype bfloat16
  python -m train.cache teacher someone/pictures --split validation --clip openai/clip-vit-base-patch32 --out cache
"""
SYNONYMS_EXAMPLES = """\
Recipes with `synonym_mode="sample"` and `synonym_probabilities="boxes"` draw the words of a region among those that
CLIP finds probable for it. As published: the box of the region with all that is in it, "a photo of" the word, a
softmax over the words of its class.

--vocabulary must be the vocabulary that is trained with: the name of a packaged one (`gkc vocab list`), or a .json,
.csv or .txt file.

examples:
  python -m train.cache synonyms data/coco --clip clip-rn50 --vocabulary coco_panoptic_133
      writes data/coco/gkc_cache/train/synonyms
  python -m train.cache synonyms data/tools --clip clip-rn50 --vocabulary tools.json
"""
NOUNS_EXAMPLES = """\
Recipes with `grounding_weight` align regions with the nouns of captions. This command writes the dataset again with a
column `nouns`; the old one stays as it is. Caches that lie beside it hold for the new one too and are linked there.

examples:
  python -m train.cache nouns data/coco
      writes data/coco-nouns; then train with dataset=data/coco-nouns
"""


def cache_folder(dataset_folder: str | Path, split: str, kind: str) -> Path:
    """Where a cache of a dataset lies unless told otherwise: `<dataset folder>/gkc_cache/<split>/<kind>`.

    Args:
        dataset_folder: that `save_to_disk` wrote.
        split: such as `train`, also where the folder holds a single split.
        kind: `teacher` or `synonyms`.
    """
    return Path(dataset_folder) / CACHES / split / kind


def fingerprint_file(dataset_folder: str | Path, split: str) -> Path | None:
    """Where the data's fingerprint is remembered, for `fingerprint(dataset, remember)`; None without a directory."""
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
    """Write a cache, or what is missing of it; called by all processes of an `accelerate launch` alike.

    Args:
        source: makes the rows.
        dataset: in the schema of `train.data`.
        folder: of the cache.
        fingerprint: what the cache is known by, from `source.fingerprint`.
        batch_size: crops per pass.
        num_workers: processes that read and crop, for each process.
        images_per_shard: a killed process loses at most so many; a cache that was begun keeps its own.
        max_broken_samples: pictures of a process that cannot be read are reported and left out; one more stops.
        writing: what else must stay the same when a killed run goes on.
        command: tells users how to complete the cache.
        progress: show a bar.

    Raises:
        ValueError: the folder holds a cache of something else; there are no regions; too many pictures are broken.
    """
    from ..storage.shards import StoreSettings, StoreWriter
    from .region_rows import embed_images, read_regions

    state = _processes()
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
    (pending,) = _from_main(state, lambda: writer.pending())
    own = pending[state.process_index :: state.num_processes]
    positions = [position for shard in own for position in writer.settings.images_of(shard)]
    listed = _listed_regions(dataset)[positions].tolist()
    with _bar(sum(listed), state, progress) as bar:
        read = read_regions(dataset, source, positions, num_workers)
        images = _watched(read, listed, bar, max_broken_samples)
        for shard in own:
            of_shard = (next(images) for _ in writer.settings.images_of(shard))
            regions = embed_images(of_shard, source, batch_size)
            writer.write(shard, regions.image_ids, regions.counts, regions.segment_ids, regions.rows)
    state.wait_for_everyone()
    if state.is_main_process:
        writer.finish()
    state.wait_for_everyone()


def _processes() -> PartialState:
    """Those of an `accelerate launch`, or this one alone."""
    from accelerate import PartialState
    from accelerate.utils import parse_flag_from_env

    return PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"), timeout=_LONGEST_WAIT)


def _from_main(state: PartialState, make: Callable[[], Any]) -> list[Any]:
    """What the main process makes, in all processes."""
    from accelerate.utils import broadcast_object_list

    return broadcast_object_list([make() if state.is_main_process else None])


def _bar(total: int, state: PartialState, progress: bool) -> tqdm:
    """A bar over the regions that the main process embeds, with their rate."""
    others = f", process 1 of {state.num_processes}" if state.num_processes > 1 else ""
    hidden = not progress or not state.is_main_process
    return tqdm(desc=f"Embedding regions{others}", total=total, unit="region", disable=hidden)


def _listed_regions(dataset: Dataset) -> np.ndarray:
    """Segments of every image, with a pixel or not."""
    import pyarrow.compute as pc

    tables = dataset.select_columns("segments").with_format("arrow").iter(10_000)
    counts = [pc.list_value_length(table.column("segments")).to_numpy() for table in tables]
    return np.concatenate([np.empty(0, dtype=np.int64), *counts]).astype(np.int64)


def _watched(
    images: Iterable[ImageRegions], listed: Iterable[int], bar: tqdm, max_broken: int
) -> Iterator[ImageRegions]:
    """The same images; the bar moves, and broken ones are reported until they are too many."""
    broken = 0
    for image, count in zip(images, listed, strict=True):
        if image.broken is not None:
            broken += 1
            tqdm.write(f"left out, cannot be read: {image.broken}", file=sys.stderr)
        if broken > max_broken:
            raise ValueError(f"More than {max_broken} pictures cannot be read, the last: {image.broken}")
        bar.update(count)
        yield image


@interruptible("train.cache", "The same command goes on from here.")
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; the exit code is 0, or 2 for an error of the user, which is one line on the error stream.

    Args:
        argv: arguments without the program's name; None takes those of the process.
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
    teacher = _add_command(commands, "teacher", "embeddings of all masked regions", TEACHER_EXAMPLES, _teacher)
    _add_cache_options(teacher)
    aspect = "keep the aspect ratio of a crop, with grey around it (default: stretched to a square, as published)"
    teacher.add_argument("--keep-aspect", action="store_true", help=aspect)
    synonyms = _add_command(
        commands, "synonyms", "how probable the words of a region are", SYNONYMS_EXAMPLES, _synonyms
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
        "--logit-scale", type=float, metavar="X", help="factor of the cosines (default: CLIP's own; OpenAI's have 100)"
    )
    nouns = _add_command(commands, "nouns", "nouns of the captions, for grounding", NOUNS_EXAMPLES, _nouns)
    add = nouns.add_argument
    add("--out", type=Path, metavar="DIR", help="new folder of the dataset (default: DATASET-nouns)")
    add(
        "--wordnet",
        type=Path,
        metavar="DIR",
        help="take nouns from this WordNet (default: nltk's tagger, else WordNet)",
    )
    add("--num-proc", type=_positive, default=1, metavar="N", help="processes (default: %(default)s)")
    return parser


def _add_command(commands: Any, name: str, summary: str, examples: str, run: Callable) -> argparse.ArgumentParser:
    parser = commands.add_parser(
        name,
        help=summary,
        description=f"{summary[0].upper()}{summary[1:]}.",
        epilog=examples,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run)
    parser.add_argument("dataset", metavar="DATASET", help="folder that `save_to_disk` wrote, or a name on the Hub")
    return parser


def _add_cache_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--clip", metavar="CLIP", required=True, help="CLIP to embed with: a folder or a name on the Hub")
    add("--split", default="train", help="dataset split to embed (default: %(default)s)")
    add("--out", type=Path, metavar="DIR", help="folder of the cache (default: DATASET/gkc_cache/SPLIT/COMMAND)")
    add(
        "--batch-size", type=_positive, default=256, metavar="N", help="crops in a forward pass (default: %(default)s)"
    )
    workers = "data loading processes of each process (default: %(default)s)"
    add("--num-workers", type=int, default=4, metavar="N", help=workers)
    add("--dtype", choices=DTYPES, default="float32", help="data type in which CLIP computes (default: %(default)s)")
    broken = "unreadable images to skip before the command stops (default: %(default)s)"
    add("--max-broken-samples", type=int, default=100, metavar="N", help=broken)
    shard = "images in a shard; a killed process repeats at most these (default: %(default)s)"
    add("--images-per-shard", type=_positive, default=500, metavar="N", help=shard)


def _positive(text: str) -> int:
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {text}")
    return number


def _teacher(options: argparse.Namespace, command: str) -> None:
    from .clip_towers import load_vision_tower
    from .region_teacher import RegionTeacher

    vision_model = load_vision_tower(options.clip)
    _write(RegionTeacher(vision_model, options.keep_aspect), [vision_model], options, command)


def _synonyms(options: argparse.Namespace, command: str) -> None:
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
    import torch

    from ..data.load import load_split

    state = _processes()
    dataset = load_split(options.dataset, options.split)
    folder = options.out
    if folder is None:
        if not Path(options.dataset).is_dir():
            raise ValueError(f"--out: {options.dataset} is not a directory; name one for the cache.")
        folder = cache_folder(options.dataset, options.split, source.kind)
    _check_distinct_ids(dataset)
    remember = fingerprint_file(options.dataset, options.split)
    # Before the models change their precision: training compares with the weights as they are loaded.
    (fingerprint,) = _from_main(state, lambda: source.fingerprint(dataset, remember))
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
    image_ids = dataset["image_id"][:]
    if len(set(image_ids)) < len(image_ids):
        repeated = next(image_id for image_id, count in Counter(image_ids).items() if count > 1)
        raise ValueError(f"Several images of the dataset have the image_id {repeated!r}; give each its own.")


def _nouns(options: argparse.Namespace, command: str) -> None:
    from datasets import DatasetDict

    from ..data.wordnet.caption_nouns import add_nouns  # needs nltk, the others do not

    source = Path(options.dataset)
    if not source.is_dir():
        raise ValueError(f"DATASET: {source} is not a directory; save the dataset first with `save_to_disk`.")
    out = options.out or source.with_name(f"{source.name}-nouns")
    if out.exists():
        raise ValueError(f"--out: {out} is there already; name a new folder.")
    if not _processes().is_main_process:
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
    """The same file under another name; a copy where the file system has no such links."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


if __name__ == "__main__":
    sys.exit(main())
