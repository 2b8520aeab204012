"""The mini-world experiment: draw the world, train a tiny CLIP and its segmenter, print what was learned.

    python -m train.miniworld                                    the paper's method, about an hour on two CPU cores
    python -m train.miniworld --arms baseline both               and the same without synonyms and distillation
    python -m train.miniworld --out runs/toy --clip-steps 20 --steps 20 --train-scenes 60 --test-scenes 10

A killed run continues where it last saved when the same command is given again.
"""

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from configuration import load_recipe

from .clip import CLIPTraining
from .experiment import ARMS, Experiment, run, show


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m train.miniworld", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    clip, recipe, defaults = CLIPTraining(), load_recipe("miniworld"), Experiment(Path("runs/miniworld"))
    parser.add_argument("--out", type=Path, default=defaults.out, help="folder of all results (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of world, CLIP and segmenter (%(default)s)")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(defaults.arms), help="losses (%(default)s)")
    parser.add_argument("--train-scenes", type=int, default=defaults.train_scenes, help="pictures (%(default)s)")
    parser.add_argument("--test-scenes", type=int, default=defaults.test_scenes, help="pictures (%(default)s)")
    parser.add_argument("--clip-steps", type=int, default=clip.steps, help="steps of the tiny CLIP (%(default)s)")
    parser.add_argument("--clip-scenes", type=int, default=clip.scenes, help="pictures for CLIP (%(default)s)")
    parser.add_argument("--steps", type=int, default=recipe.steps, help="steps of the segmenter (%(default)s)")
    parser.add_argument("--num-proc", type=int, default=1, help="processes that draw scenes (%(default)s)")
    parser.add_argument("--threads", type=int, help="threads of torch; beside other jobs, 1 is often faster than 2")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the experiment of the command line."""
    options = parse(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    experiment = Experiment(
        out=options.out,
        seed=options.seed,
        train_scenes=options.train_scenes,
        test_scenes=options.test_scenes,
        clip=replace(CLIPTraining(), steps=options.clip_steps, scenes=options.clip_scenes),
        recipe=load_recipe("miniworld", steps=options.steps),
        arms=tuple(options.arms),
        num_proc=options.num_proc,
    )
    show(run(experiment))


if __name__ == "__main__":
    main()
