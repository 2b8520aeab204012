"""Synthetic mini-world benchmark, drawn locally to try preparation, training and evaluation without a download.

    python -m train.data.benchmarks.miniworld --out worlds/mini --train-scenes 600 --val-scenes 200
    python -m train.data.prepare miniworld --source worlds/mini --out data/miniworld --split val
    python -m train.evaluate --model hub_card/gkc-mini --benchmark miniworld --data data/miniworld

`miniworld` labels every concept with its own name, for evaluation. `miniworld_train` has the training labels: some
concepts are labeled with their hypernym and others are void.
"""

import argparse
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm.auto import tqdm

from modeling_gkc.atomic_files import atomic_path, atomic_write_json
from modeling_gkc.cli.common import non_negative, output_folder, positive
from modeling_gkc.vocabulary import Vocabulary

from ...storage.checksums import Each, read_json
from ..drawn_world.dataset import test_vocabulary, training_vocabulary
from ..drawn_world.words import COARSE, CONCEPTS, KEPT, NEVER_SEEN, SUB, VOID, coarse_label
from ..drawn_world.world import TRAINING_SHAPES, TRAINING_STUFFS, draw_scene
from ..schema import NO_CLASS, encode_ids
from ..sources import AnnotatedImage, Segmentation
from .base import Benchmark, read_color_ids, require
from .protocol import Protocol

LAYOUT = """\
DIR/{train,val}/SCENE.png                       image of a scene
DIR/{train,val}/SCENE.ids.png                   segment ids, id = R + 256 G + 65536 B
DIR/{train,val}.json                            concept of each segment id of every scene
`python -m train.data.benchmarks.miniworld --out DIR` draws these files.
"""
SPLITS = ("train", "val")
_WORLDS = {"train": 0, "val": 1}  # random streams that `train.miniworld` trains and tests on


def draw_world(out: Path, split: str, scenes: int, seed: int = 0, size: int = 96, progress: bool = True) -> None:
    """Draw one split of the mini-world.

    Args:
        out: Output folder, which receives the files of `LAYOUT`. Existing scenes are overwritten.
        split: `train`, where some concepts never occur, or `val`, where all concepts occur.
        scenes: Number of scenes. Scene i does not depend on it.
        seed: Random seed. The published mini-world has seed 0 and 96 pixels.
        size: Side of the images in pixels.
        progress: Whether to show a progress bar.
    """
    chosen = (TRAINING_SHAPES, TRAINING_STUFFS) if split == "train" else ()
    folder, concepts = out / split, {}
    folder.mkdir(parents=True, exist_ok=True)
    for index in tqdm(range(scenes), f"{split} scenes", unit="scene", disable=not progress):
        name = f"{split}-{seed}-{index:06d}"
        scene = draw_scene((seed, _WORLDS[split]), index, size, *chosen)
        for ending, pixels in ((".png", scene.image), (".ids.png", encode_ids(scene.region_index + 1))):
            with atomic_path(folder / f"{name}{ending}") as temporary:
                Image.fromarray(pixels).save(temporary)
        concepts[name] = [region["concept"] for region in scene.regions]
    atomic_write_json(out / f"{split}.json", concepts, indent=0)


def find(classes: Mapping[str, int], folder: Path, split: str) -> list[AnnotatedImage]:
    """Return the images of a split with their annotations.

    Args:
        classes: Train id of every labeled concept.
        folder: Folder with the files of `LAYOUT`.
        split: `train` or `val`.

    Raises:
        ValueError: If a file of `LAYOUT` is missing or invalid.
    """
    listed = require(folder / f"{split}.json", "which `python -m train.data.benchmarks.miniworld` writes")
    concepts = read_json(listed, shape=Each([str]))
    images = require(folder / split)
    return [
        AnnotatedImage(name, images / f"{name}.png", partial(_read, images / f"{name}.ids.png", names, classes), split)
        for name, names in concepts.items()
    ]


def _read(path: Path, concepts: Sequence[str], classes: Mapping[str, int], shape: tuple[int, int]) -> Segmentation:
    ids = read_color_ids(path, shape)
    if ids.max() > len(concepts):
        raise ValueError(f"{path}: Contains segment id {ids.max()}, but the scene has {len(concepts)} segments")
    segments: list[dict[str, Any]] = [
        {"id": number, "category_id": classes.get(concept, NO_CLASS), "iscrowd": False}
        for number, concept in enumerate(concepts, start=1)
    ]
    return ids.astype(np.int32), segments


def _training_classes() -> dict[str, int]:
    labels = {concept: coarse_label(concept) for concept in CONCEPTS}
    return {concept: COARSE.index(label) for concept, label in labels.items() if label is not None}


_PROTOCOL = Protocol(
    tasks=("semantic", "panoptic"),
    short_side=96,
    long_side=192,
    groups={"base": KEPT, "novel": SUB + VOID + NEVER_SEEN, "sub": SUB, "void": VOID, "never": NEVER_SEEN},
    note="synthetic images: not comparable with other benchmarks",
)


def _benchmark(
    name: str, classes: Mapping[str, int], vocabulary: Vocabulary, protocol: Protocol | None = None
) -> Benchmark:
    return Benchmark(
        name=name,
        vocabulary="",
        layout=LAYOUT,
        find=partial(find, classes),
        splits=dict.fromkeys(SPLITS),
        make_vocabulary=lambda source: vocabulary,
        protocol=protocol,
    )


BENCHMARKS = (
    _benchmark("miniworld", {concept: index for index, concept in enumerate(CONCEPTS)}, test_vocabulary(), _PROTOCOL),
    _benchmark("miniworld_train", _training_classes(), training_vocabulary()),
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m train.data.benchmarks.miniworld",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=output_folder, required=True, metavar="DIR", help="output folder")
    parser.add_argument(
        "--train-scenes",
        type=non_negative,
        default=600,
        metavar="N",
        help="number of training scenes (default: %(default)s)",
    )
    parser.add_argument(
        "--val-scenes",
        type=non_negative,
        default=200,
        metavar="N",
        help="number of validation scenes (default: %(default)s)",
    )
    parser.add_argument("--seed", type=non_negative, default=0, help="random seed (default: %(default)s)")
    parser.add_argument(
        "--size", type=positive, default=96, metavar="PIXELS", help="image side in pixels (default: %(default)s)"
    )
    options = parser.parse_args(arguments)
    for split, scenes in (("train", options.train_scenes), ("val", options.val_scenes)):
        if scenes:
            draw_world(options.out, split, scenes, options.seed, options.size)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
