"""Run the mini-world experiment: draw synthetic scenes, train a tiny CLIP and segmenters, and report their scores.

    python -m train.miniworld                                    the paper's method, one seed, about half an hour
    python -m train.miniworld --ablations all --seeds 0 1 2      all ablations, 2 to 4 hours on two CPU cores
    python -m train.miniworld --out runs/toy --clip-steps 9 --warmup-steps 9 --steps 9 --train-scenes 60

Repeat the command to resume an interrupted run from its last checkpoint. Several seeds can also run in parallel, each
with its own command and the same --out; the last one to finish writes the complete tables.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from configuration import load_recipe
from modeling_gkc.cli.common import interruptible, non_negative, output_folder, positive

from .settings import ABLATIONS, MAIN_ABLATIONS, VARIANTS, CLIPTraining, Experiment

GROUPS = {"main": tuple(MAIN_ABLATIONS), "all": tuple(ABLATIONS)}


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m train.miniworld", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    clip, recipe, defaults = CLIPTraining(), load_recipe("miniworld"), Experiment(Path("runs/miniworld"))
    parser.add_argument("--out", type=output_folder, default=defaults.out, help="output folder (default: %(default)s)")
    parser.add_argument(
        "--seeds",
        nargs="+",
        type=non_negative,
        default=[0],
        help="random seeds; each runs the whole experiment (default: %(default)s)",
    )
    parser.add_argument(
        "--ablations",
        nargs="+",
        choices=[*GROUPS, *ABLATIONS],
        metavar="ABLATION",
        default=list(defaults.ablations),
        help=f"ablations to run: `main` ({', '.join(MAIN_ABLATIONS)}), `all` (also {', '.join(VARIANTS)}) or single "
        "names (default: both)",
    )
    for option, default, meaning in (
        ("--train-scenes", defaults.train_scenes, "number of training images of the segmenter"),
        ("--test-scenes", defaults.test_scenes, "number of test images"),
        ("--clip-steps", clip.steps, "training steps of the tiny CLIP"),
        ("--clip-scenes", clip.scenes, "number of training images of the tiny CLIP"),
        ("--warmup-steps", defaults.warmup_steps, "mask-only training steps that all ablations start from"),
        ("--steps", recipe.optimizer.steps, "training steps of each ablation"),
        ("--num-proc", 1, "number of processes that draw scenes"),
    ):
        parser.add_argument(
            option, type=positive, default=default, metavar="N", help=f"{meaning} (default: %(default)s)"
        )
    parser.add_argument(
        "--threads",
        type=positive,
        metavar="N",
        help="PyTorch CPU threads (default: PyTorch's); 1 suits a busy machine",
    )
    return parser.parse_args(arguments)


@interruptible("train.miniworld", "Repeat the command to resume.")
def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
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
