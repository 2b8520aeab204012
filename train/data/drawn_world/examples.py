"""Draw pictures to try a checkpoint on, or with masks to try training on; those in `examples/` come from here.

python -m train.data.drawn_world.examples --out examples --scenes 2 10 11
python -m train.data.drawn_world.examples --out my-shapes --masks 80
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from modeling_gkc.atomic_files import atomic_path, atomic_write_json

from .words import WORDS
from .world import draw_scene

ANNOTATED_SPLIT = 21
# What masks name: three concepts that the shipped checkpoint never had labels for, and two grounds.
ANNOTATED = ("heart", "arrow", "hexagon", "water", "sand")
EXAMPLES_SPLIT = 20  # with the seed, it names a world of its own: no training or test set holds these pictures


def draw_examples(out: Path, scenes: Sequence[int], seed: int = 0, size: int = 288) -> list[Path]:
    """Write the scenes of these numbers as `scene-1.png`, `scene-2.png`, ... and return their paths.

    Args:
        out: Folder, made if it is not there.
        scenes: Numbers of scenes.
        seed: The world.
        size: Side of the pictures in pixels.
    """
    out.mkdir(parents=True, exist_ok=True)
    paths = [out / f"scene-{position}.png" for position in range(1, len(scenes) + 1)]
    for path, scene in zip(paths, scenes, strict=True):
        with atomic_path(path) as temporary:
            Image.fromarray(draw_scene((seed, EXAMPLES_SPLIT), scene, size).image).save(temporary)
    return paths


def draw_annotated(out: Path, count: int, seed: int = 0, size: int = 96) -> None:
    """Write pictures with masks as people draw them: `images/`, `masks/` and `names.json`, all else being void.

    Args:
        out: Folder, made if it is not there.
        count: Pictures, each with one of `ANNOTATED` at least.
        seed: The world.
        size: Side of the pictures in pixels.
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
    """Command line."""
    parser = argparse.ArgumentParser(
        prog="python -m train.data.drawn_world.examples",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of the pictures")
    parser.add_argument("--scenes", type=int, nargs="+", default=[2, 10, 11], help="their numbers (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="the world (%(default)s)")
    parser.add_argument("--size", type=int, help="side in pixels (288, with --masks 96)")
    parser.add_argument("--masks", type=int, metavar="N", help="draw N pictures with masks and names.json instead")
    options = parser.parse_args(arguments)
    if options.masks is not None:
        draw_annotated(options.out, options.masks, options.seed, options.size or 96)
        print(options.out)
        return
    for path in draw_examples(options.out, options.scenes, options.seed, options.size or 288):
        print(path)


if __name__ == "__main__":
    main()
