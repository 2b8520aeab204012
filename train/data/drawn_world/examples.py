"""Draw synthetic example images for inference, or with masks for training.

    python -m train.data.drawn_world.examples --out examples --scenes 2 10 11
    python -m train.data.drawn_world.examples --out my-shapes --masks 80

The first command draws the images of the folder examples/.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from modeling_gkc.atomic_files import atomic_path, atomic_write_json
from modeling_gkc.cli.common import non_negative, output_folder, positive

from .words import WORDS
from .world import draw_scene

ANNOTATED_SPLIT = 21
# Annotated classes: three shapes that were unlabeled in the training of the shipped checkpoint, and two backgrounds.
ANNOTATED = ("heart", "arrow", "hexagon", "water", "sand")
EXAMPLES_SPLIT = 20  # seeds scenes that no training or test set contains


def draw_examples(out: Path, scenes: Sequence[int], seed: int = 0, size: int = 288) -> list[Path]:
    """Write the scenes of these numbers as `scene-1.png`, `scene-2.png`, ... and return their paths.

    Args:
        out: Output folder, created if it does not exist.
        scenes: Scene numbers.
        seed: Random seed of the scenes.
        size: Side of the images in pixels.
    """
    out.mkdir(parents=True, exist_ok=True)
    paths = [out / f"scene-{position}.png" for position in range(1, len(scenes) + 1)]
    for path, scene in zip(paths, scenes, strict=True):
        with atomic_path(path) as temporary:
            Image.fromarray(draw_scene((seed, EXAMPLES_SPLIT), scene, size).image).save(temporary)
    return paths


def draw_annotated(out: Path, count: int, seed: int = 0, size: int = 96) -> None:
    """Write images with masks of the classes in `ANNOTATED` to `images/`, `masks/` and `names.json`.

    All other regions have the mask value 0, which is void.

    Args:
        out: Output folder, created if it does not exist.
        count: Number of images, each with at least one region of `ANNOTATED`.
        seed: Random seed of the scenes.
        size: Side of the images in pixels.
    """
    for name in ("images", "masks"):
        (out / name).mkdir(parents=True, exist_ok=True)
    values, drawn, number = {concept: value for value, concept in enumerate(ANNOTATED, start=1)}, 0, 0
    while drawn < count:
        scene = draw_scene((seed, ANNOTATED_SPLIT), number, size)
        number += 1
        values_of_regions = [values.get(region["concept"], 0) for region in scene.regions]
        if not any(values_of_regions):
            continue
        mask = np.array([*values_of_regions, 0], dtype=np.uint8)[scene.region_index]
        for folder, pixels in (("images", scene.image), ("masks", mask)):
            with atomic_path(out / folder / f"{drawn:04d}.png") as temporary:
                Image.fromarray(pixels).save(temporary)
        drawn += 1
    names = {"0": None} | {str(value): list(WORDS[concept][:2]) for concept, value in values.items()}
    atomic_write_json(out / "names.json", names, indent=None)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m train.data.drawn_world.examples",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=output_folder, required=True, help="output folder")
    parser.add_argument(
        "--scenes", type=non_negative, nargs="+", default=[2, 10, 11], help="scene numbers (default: %(default)s)"
    )
    parser.add_argument("--seed", type=non_negative, default=0, help="random seed (default: %(default)s)")
    parser.add_argument("--size", type=positive, help="image side in pixels (default: 288, or 96 with --masks)")
    parser.add_argument(
        "--masks", type=positive, metavar="N", help="draw N images with masks and a names.json instead"
    )
    options = parser.parse_args(arguments)
    if options.masks is not None:
        draw_annotated(options.out, options.masks, options.seed, options.size or 96)
        print(options.out)
        return
    for path in draw_examples(options.out, options.scenes, options.seed, options.size or 288):
        print(path)


if __name__ == "__main__":
    main()
