"""The mini-world experiment: draw the world, train a tiny CLIP and its segmenters, print and draw what was learned.

    python -m train.miniworld                                    the paper's method, one seed, about half an hour
    python -m train.miniworld --ablations all --seeds 0 1 2      the whole ablation, 2 to 4 hours on two CPU cores
    python -m train.miniworld --out runs/toy --clip-steps 9 --warmup-steps 9 --steps 9 --train-scenes 60

A killed run continues where it last saved when the same command is given again. Several seeds can also be run side by
side, each by a command of its own with the same --out; the last to finish has the whole table.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from configuration import load_recipe
from modeling_gkc.cli.common import interruptible

from .settings import ABLATIONS, MAIN_ABLATIONS, VARIANTS, CLIPTraining, Experiment

GROUPS = {"main": tuple(MAIN_ABLATIONS), "all": tuple(ABLATIONS)}


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m train.miniworld", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    clip, recipe, defaults = CLIPTraining(), load_recipe("miniworld"), Experiment(Path("runs/miniworld"))
    parser.add_argument("--out", type=Path, default=defaults.out, help="folder of all results (%(default)s)")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], help="of world, CLIP, segmenter (%(default)s)")
    parser.add_argument(
        "--ablations",
        nargs="+",
        choices=[*GROUPS, *ABLATIONS],
        metavar="ABLATION",
        default=list(defaults.ablations),
        help=f"`main`: {', '.join(MAIN_ABLATIONS)}; `all`: also {', '.join(VARIANTS)}; or some of them (both)",
    )
    parser.add_argument("--train-scenes", type=int, default=defaults.train_scenes, help="pictures (%(default)s)")
    parser.add_argument("--test-scenes", type=int, default=defaults.test_scenes, help="pictures (%(default)s)")
    parser.add_argument("--clip-steps", type=int, default=clip.steps, help="steps of the tiny CLIP (%(default)s)")
    parser.add_argument("--clip-scenes", type=int, default=clip.scenes, help="pictures for CLIP (%(default)s)")
    parser.add_argument(
        "--warmup-steps", type=int, default=defaults.warmup_steps, help="steps that all ablations share (%(default)s)"
    )
    parser.add_argument("--steps", type=int, default=recipe.optimizer.steps, help="steps of an ablation (%(default)s)")
    parser.add_argument("--num-proc", type=int, default=1, help="processes that draw scenes (%(default)s)")
    parser.add_argument("--threads", type=int, help="threads of torch; beside other jobs, 1 is often faster than 2")
    return parser.parse_args(arguments)


@interruptible("train.miniworld", "Give the same command again to continue.")
def main(arguments: Sequence[str] | None = None) -> int:
    """Run the experiment of the command line; the exit code."""
    options = parse(arguments)

    import torch
    from tqdm.auto import tqdm

    from .experiment import run
    from .summary import read_seeds, write_summary

    if options.threads:
        torch.set_num_threads(options.threads)
    ablations = [ablation for name in options.ablations for ablation in GROUPS.get(name, (name,))]
    for seed in options.seeds:
        experiment = Experiment(
            out=options.out / f"seed-{seed}",
            seed=seed,
            train_scenes=options.train_scenes,
            test_scenes=options.test_scenes,
            clip=replace(CLIPTraining(), steps=options.clip_steps, scenes=options.clip_scenes),
            recipe=load_recipe("miniworld", steps=options.steps),
            warmup_steps=options.warmup_steps,
            ablations=tuple(dict.fromkeys(ablations)),
            num_proc=options.num_proc,
        )
        run(experiment)
    tqdm.write(write_summary(options.out, read_seeds(options.out)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
