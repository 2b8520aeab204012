"""Turn a finished mini-world experiment into the shipped checkpoint and its card.

python -m train.miniworld --out runs/miniworld
python -m hub_card.publish_mini runs/miniworld
"""

import argparse
import json
import shutil
from collections.abc import Sequence
from pathlib import Path

TEMPLATE = Path(__file__).parent / "gkc_mini_template.md"
SHIPPED = Path(__file__).parent / "gkc-mini"
MAX_BYTES = 12_000_000
ARM_NAMES = {
    "baseline": "plain names only",
    "synonyms": "+ text diversification",
    "distillation": "+ distillation",
    "both": "+ both",
}
GROUP_NAMES = {
    "seen": "the ten words of training",
    "seen by 5th word": "the same, by a synonym that training never used",
    "seen by 6th word": "the same, by another such synonym",
    "colour": "finer: colour + shape (`red square`)",
    "fill": "finer: fill + shape (`striped star`)",
    "sub": "finer: sub-classes (circle and ring of `round`, brick and wood of `wall`)",
    "void": "objects that were void in training (heart, arrow, water)",
    "never": "objects that training pictures never held (hexagon, drop, sand)",
    "all/seen": "all eighteen concepts at once: those named in training",
    "all/novel": "all eighteen concepts at once: the others",
}


def publish(run: Path, out: Path = SHIPPED, arm: str = "both") -> None:
    """Copy an arm's model into `out` and write its card.

    Args:
        run: Folder of a finished experiment.
        out: Folder of the checkpoint; replaced.
        arm: The arm that is published; the table shows every arm of the run.

    Raises:
        ValueError: the experiment is not finished, or the checkpoint is larger than 12 MB.
    """
    if not (run / "results.json").exists():
        raise ValueError(f"{run} holds no finished experiment: run `python -m train.miniworld --out {run}` first.")
    results = json.loads((run / "results.json").read_text())
    settings = json.loads((run / "settings.json").read_text())
    size = sum(path.stat().st_size for path in (run / arm / "model").rglob("*") if path.is_file())
    if size > MAX_BYTES:
        raise ValueError(f"The checkpoint has {size} bytes, more than {MAX_BYTES}.")
    shutil.rmtree(out, ignore_errors=True)
    shutil.copytree(run / arm / "model", out)
    (out / "results.json").write_text(json.dumps(results | {"settings": settings}, indent=2) + "\n")
    (out / "README.md").write_text(card(results, settings, arm, json.loads((out / "config.json").read_text())))


def card(results: dict, settings: dict, arm: str, config: dict) -> str:
    """The model card as Markdown."""
    values = {
        "arm": ARM_NAMES[arm],
        "arms": " ".join(results["arms"]),
        "gate": _gate_table(results["gate"]),
        "harmonic_mean": _per_cent(results["arms"][arm]["harmonic_mean"]),
        "images": str(results["arms"][arm]["images"]),
        "minutes": ", ".join(f"{name} {minutes}" for name, minutes in results["minutes"].items()),
        "scores": _score_table(results["arms"]),
        "seed": str(settings["seed"]),
        "steps": str(settings["recipe"]["steps"]),
        "clip_steps": str(settings["clip"]["steps"]),
        "train_scenes": str(settings["train_scenes"]),
        "words": "\n".join(f"- {names[0]}: {', '.join(names[1:])}" for names in config["vocabulary"]),
    }
    text = TEMPLATE.read_text()
    for name, value in values.items():
        text = text.replace(f"<<{name}>>", value)
    return text


def _score_table(arms: dict) -> str:
    rows = [["words asked", *(ARM_NAMES[arm] for arm in arms)], ["---", *["---:"] * len(arms)]]
    for group, name in GROUP_NAMES.items():
        rows.append([name, *(_per_cent(scores["scores"][group]["miou"]) for scores in arms.values())])
    rows.append(["harmonic mean of the last two", *(_per_cent(scores["harmonic_mean"]) for scores in arms.values())])
    return _markdown(rows)


def _markdown(rows: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def _per_cent(score: float | None) -> str:
    """`-` for what the test pictures do not hold."""
    return "-" if score is None else f"{100 * score:.1f}"


def _decimals(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _gate_table(gate: dict) -> str:
    rows = [["regions", "zero-shot accuracy", "cos(image, class mean)"], ["---", "---:", "---:"]]
    rows += [[name, _decimals(row["accuracy"]), _decimals(row["collapse"])] for name, row in gate["rows"].items()]
    cosines = ", ".join(f"{kind} {cosine:.2f}" for kind, cosine in gate["synonyms"].items())
    missed = "Every target is reached." if not gate["misses"] else "Missed: " + "; ".join(gate["misses"]) + "."
    return f"{_markdown(rows)}\n\nMean cosine of a name and its synonyms: {cosines}. {missed}"


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        prog="python -m hub_card.publish_mini",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run", type=Path, help="folder of a finished `python -m train.miniworld`")
    parser.add_argument("--out", type=Path, default=SHIPPED, help="folder of the checkpoint (%(default)s)")
    parser.add_argument("--arm", default="both", choices=ARM_NAMES, help="arm to publish (%(default)s)")
    options = parser.parse_args(arguments)
    publish(options.run, options.out, options.arm)


if __name__ == "__main__":
    main()
