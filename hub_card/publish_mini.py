"""Publish a model of the mini-world experiment as the shipped checkpoint and write the experiment's tables.

    python -m hub_card.publish_mini runs/miniworld

The checkpoint folder contains the model, the recorded results and a model card; all figures of the card come
from the recorded results. The same tables and the plot go into docs/miniworld.md.
"""

import argparse
import json
import re
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from modeling_gkc.atomic_files import atomic_folder, atomic_write, atomic_write_json
from modeling_gkc.cli.common import interruptible, non_negative, output_folder
from modeling_gkc.label_text import error_line

TEMPLATE = Path(__file__).parent / "gkc_mini_template.md"
SHIPPED = Path(__file__).parent / "gkc-mini"
PAGE = Path(__file__).parent.parent / "docs" / "miniworld.md"
MAX_BYTES = 12_000_000
ABLATION_NAMES = {
    "baseline": "plain names only",
    "synonyms": "+ text diversification",
    "distillation": "+ distillation",
    "both": "+ both",
    "both-long": "both, three times the steps",
}
STEPS = {"both-long": 1200}  # training steps of ablations that do not use the run's number


def publish(run: Path, out: Path = SHIPPED, ablation: str = "both", seed: int | None = None) -> None:
    """Copy the model of an ablation into `out` and write its model card.

    Args:
        run: Folder of a finished experiment.
        out: Folder of the checkpoint, which is replaced.
        ablation: Ablation to publish; the tables of the card show all ablations and seeds of the run.
        seed: Seed to publish (default: the first).

    Raises:
        ValueError: The experiment is not finished, or the checkpoint is larger than 12 MB.
    """
    from modeling_gkc.remote_code import add_library_entry  # needs torch, which --help does not

    results = _read_summary(run)
    seed = min(map(int, results["seeds"])) if seed is None else seed
    model = run / f"seed-{seed}" / ablation / "model"
    if not model.exists():
        raise ValueError(
            f"{model} does not exist: run `python -m train.miniworld --out {run}` with this ablation and seed"
        )
    size = sum(path.stat().st_size for path in model.rglob("*") if path.is_file())
    if size > MAX_BYTES:
        raise ValueError(f"The checkpoint in {model} has {size} bytes, more than the limit of {MAX_BYTES}")
    results |= {"published": {"arm": ablation, "seed": seed}}
    with atomic_folder(out, overwrite=True) as unfinished:
        shutil.copytree(model, unfinished, dirs_exist_ok=True)
        add_library_entry(unfinished)
        atomic_write_json(unfinished / "results.json", results)
        atomic_write(unfinished / "README.md", card(results, json.loads((unfinished / "config.json").read_text())))


def _read_summary(run: Path) -> dict:
    path = run / "summary.json"
    if not path.exists():
        raise ValueError(f"{run} contains no finished experiment: run `python -m train.miniworld --out {run}` first")
    return json.loads(path.read_text())


def card(results: dict, config: dict) -> str:
    """Return the model card as Markdown."""
    ablation, seed = results["published"]["arm"], str(results["published"]["seed"])
    published = results["seeds"][seed]
    settings, scores = published["settings"], published["arms"][ablation]
    recipe = settings["recipe"]
    steps = recipe.get("optimizer", recipe)["steps"]  # recipes were flat before they had sections
    values = {
        "ablation": ABLATION_NAMES[ablation],
        "seed": seed,
        "seeds": " ".join(results["seeds"]),
        "gate": results["tables"]["gate"],
        "scores": results["tables"]["scores"],
        "scores_by_seed": results["tables"]["scores_by_seed"],
        "own_scores": _own_scores(scores),
        "shipped_ablation": ablation,
        "images": str(scores["images"]),
        "minutes": ", ".join(f"{name} {minutes}" for name, minutes in published["minutes"].items()),
        "steps": str(STEPS.get(ablation, steps)),
        "table_steps": str(steps),
        "warmup_steps": str(settings["warmup_steps"]),
        "clip_steps": str(settings["clip"]["steps"]),
        "train_scenes": str(settings["train_scenes"]),
        "words": "\n".join(f"- {names[0]}: {', '.join(names[1:])}" for names in config["vocabulary"]),
    }
    text = TEMPLATE.read_text()
    for name, value in values.items():
        text = text.replace(f"<<{name}>>", value)
    return text


def _own_scores(scores: dict) -> str:
    """List the mIoU of every vocabulary in one sentence; `-` stands for classes without ground truth."""
    measured = {name: values["miou"] for name, values in scores["scores"].items()}
    measured["harmonic mean of all/seen and all/novel"] = scores["harmonic_mean"]
    return ", ".join(f"{name} {'-' if miou is None else f'{100 * miou:.1f}'}" for name, miou in measured.items())


def update_page(run: Path, page: Path = PAGE) -> None:
    """Replace the tables between the page's markers and the plot next to the page.

    A table is enclosed by `<!-- table NAME -->` and `<!-- end -->`.
    """
    tables = _read_summary(run)["tables"]
    text = page.read_text()
    for name, table in tables.items():
        pattern = rf"(<!-- table {name} -->).*?(<!-- end -->)"
        text = re.sub(pattern, lambda found, table=table: f"{found[1]}\n{table}\n{found[2]}", text, flags=re.DOTALL)
    atomic_write(page, text)
    atomic_write(page.with_suffix(".png"), (run / "summary.png").read_bytes())


@interruptible("hub_card.publish_mini")
def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(
        prog="python -m hub_card.publish_mini",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run", type=Path, help="output folder of a finished `python -m train.miniworld`")
    parser.add_argument(
        "--out", type=output_folder, default=SHIPPED, help="folder of the checkpoint (default: %(default)s)"
    )
    parser.add_argument(
        "--ablation", default="both", choices=ABLATION_NAMES, help="ablation to publish (default: %(default)s)"
    )
    parser.add_argument("--seed", type=non_negative, help="seed to publish (default: the first)")
    parser.add_argument(
        "--page", type=Path, default=PAGE, help="document whose tables and plot are replaced (default: %(default)s)"
    )
    options = parser.parse_args(arguments)
    try:
        publish(options.run, options.out, options.ablation, options.seed)
        update_page(options.run, options.page)
    except (OSError, ValueError) as error:
        sys.stderr.write(f"hub_card.publish_mini: error: {error_line(error)}\n")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
