"""Draw pictures to try a checkpoint on; those in `examples/` come from here.

python -m train.miniworld.examples --out examples --scenes 2 10 11
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from .world import draw_scene

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
        Image.fromarray(draw_scene((seed, EXAMPLES_SPLIT), scene, size).image).save(path)
    return paths


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        prog="python -m train.miniworld.examples",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of the pictures")
    parser.add_argument("--scenes", type=int, nargs="+", default=[2, 10, 11], help="their numbers (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="the world (%(default)s)")
    parser.add_argument("--size", type=int, default=288, help="side in pixels (%(default)s)")
    options = parser.parse_args(arguments)
    for path in draw_examples(options.out, options.scenes, options.seed, options.size):
        print(path)


if __name__ == "__main__":
    main()
