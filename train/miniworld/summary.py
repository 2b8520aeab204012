"""Summary of the ablations over several seeds: Markdown tables and a plot."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev

from modeling_gkc.atomic_files import atomic_path, atomic_write_json

from .evaluate import per_cent
from .settings import ABLATIONS, MAIN_ABLATIONS, VARIANTS

SUMMARY_NAME, PLOT_NAME = "summary.json", "summary.png"
HARMONIC_MEAN, TEACHER_COSINE = "harmonic mean", "teacher cosine"
ROW_TITLES = {
    "seen": "the ten training labels",
    "seen by 5th word": "training labels, prompted with a held-out synonym",
    "seen by 6th word": "training labels, prompted with another held-out synonym",
    "colour": "color + shape (`red square`)",
    "fill": "fill + shape (`striped star`)",
    "sub": "sub-classes (circle and ring of `round`, brick and wood of `wall`)",
    "void": "concepts that are void in training (heart, arrow, water)",
    "never": "concepts that never occur in training images (hexagon, drop, sand)",
    "all/seen": "all eighteen concepts: seen in training",
    "all/novel": "- novel",
    "all/sub": "- novel: sub-classes",
    "all/void": "- novel: void in training",
    "all/never": "- novel: never in training images",
    HARMONIC_MEAN: "- harmonic mean of seen and novel",
    TEACHER_COSINE: "cos(student, teacher) over regions, x 100",
}
TABLE_TITLES = {
    "scores": "mIoU in percent, mean and standard deviation over seeds",
    "scores_by_seed": "mIoU in percent of each seed",
    "regions": "Region accuracy in percent",
    "variants": "mIoU in percent of the variants for each seed",
    "gate": "Quality gate of the tiny CLIP for each seed",
    "minutes": "Run time in minutes",
}
Seeds = Mapping[int, Mapping]  # seed -> the results of `experiment.run`


def read_seeds(folder: str | Path) -> dict[int, dict]:
    """Read the results of all finished seeds in a folder.

    Raises:
        ValueError: If no seed is finished.
    """
    paths = {int(path.parent.name.removeprefix("seed-")): path for path in Path(folder).glob("seed-*/results.json")}
    if not paths:
        raise ValueError(f"{folder} has no finished seed: run `python -m train.miniworld --out {folder}` first.")
    return {seed: json.loads(paths[seed].read_text()) for seed in sorted(paths)}


def write_summary(folder: str | Path, seeds: Seeds) -> str:
    """Write `summary.json` (tables and results of all seeds) and `summary.png`, and return the tables as text."""
    found = tables(seeds)
    atomic_write_json(Path(folder) / SUMMARY_NAME, {"tables": found, "seeds": seeds})
    plot(seeds, Path(folder) / PLOT_NAME)
    return "\n\n".join(f"{TABLE_TITLES[name]}\n\n{table}" for name, table in found.items() if table)


def tables(seeds: Seeds) -> dict[str, str]:
    """Return every table of `TABLE_TITLES` in Markdown; a table without results is empty."""
    return {
        "scores": score_table(seeds, MAIN_ABLATIONS),
        "scores_by_seed": score_table(seeds, MAIN_ABLATIONS, by_seed),
        "regions": score_table(seeds, MAIN_ABLATIONS, measure="region_accuracy"),
        "variants": score_table(seeds, VARIANTS, by_seed),
        "gate": gate_table(seeds),
        "minutes": _minutes(seeds),
    }


def score_table(seeds: Seeds, ablations: Sequence[str], show=None, measure: str = "miou") -> str:
    """Return a Markdown table of scores by vocabulary (rows) and ablation (columns).

    Args:
        seeds: Results of each seed.
        ablations: Names of the ablations, in order. Ablations without results are omitted.
        show: Function that formats the values of a cell over the seeds. None takes `mean_and_spread`.
        measure: `miou` or `region_accuracy`.

    Returns:
        The table, or an empty string if no ablation has results.
    """
    present = [ablation for ablation in ablations if any(ablation in results["arms"] for results in seeds.values())]
    if not present:
        return ""
    rows = [["vocabulary", *(ABLATIONS[ablation].title for ablation in present)], ["---", *["---:"] * len(present)]]
    for row in _rows(seeds, measure):
        cells = ((show or mean_and_spread)(values(seeds, ablation, row, measure)) for ablation in present)
        rows.append([ROW_TITLES.get(row, row), *cells])
    return markdown(rows)


def _rows(seeds: Seeds, measure: str) -> list[str]:
    first = next(iter(next(iter(seeds.values()))["arms"].values()))
    return [*first["scores"], *([HARMONIC_MEAN, TEACHER_COSINE] if measure == "miou" else [])]


def values(seeds: Seeds, ablation: str, row: str, measure: str = "miou") -> list[float | None]:
    """Return a row's value in 0..1 for each seed with the ablation, or None where there is no ground truth."""
    found = [results["arms"][ablation] for results in seeds.values() if ablation in results["arms"]]
    if row == HARMONIC_MEAN:
        return [scores["harmonic_mean"] for scores in found]
    if row == TEACHER_COSINE:
        return [scores["teacher_cosine"] for scores in found]
    return [scores["scores"][row][measure] for scores in found]


def mean_and_spread(cell: Sequence[float | None]) -> str:
    """Format mean and sample standard deviation in percent (`47.3 ± 1.2`); one seed has no deviation."""
    measured = [value for value in cell if value is not None]
    if len(measured) < 2:
        return per_cent(measured[0] if measured else None)
    return f"{per_cent(mean(measured))} ± {per_cent(stdev(measured))}"


def by_seed(cell: Sequence[float | None]) -> str:
    """Format the value of every seed in percent (`47.3 / 46.1`)."""
    return " / ".join(map(per_cent, cell))


def gate_table(seeds: Seeds) -> str:
    """Return a Markdown table of the tiny CLIP's accuracy and collapse for each seed."""
    gates = [results["gate"] for results in seeds.values()]
    rows = [["regions", "zero-shot accuracy", "cos(image, class mean)"], ["---", "---:", "---:"]]
    for name in gates[0]["rows"]:
        measured = [gate["rows"][name] for gate in gates]
        rows.append([name, *(_decimals(row[key] for row in measured) for key in ("accuracy", "collapse"))])
    for kind in gates[0]["synonyms"]:
        rows.append([f"cos(name, synonym), {kind}", "", _decimals(gate["synonyms"][kind] for gate in gates)])
    missed = [f"seed {seed}: {miss}" for seed, gate in zip(seeds, gates, strict=True) for miss in gate["misses"]]
    return f"{markdown(rows)}\n\n" + ("Missed: " + "; ".join(missed) if missed else "All targets are met.")


def _decimals(numbers) -> str:
    return " / ".join("-" if number is None else f"{number:.3f}" for number in numbers)


def _minutes(seeds: Seeds) -> str:
    return "\n".join(
        f"- seed {seed}: " + ", ".join(f"{name} {minutes}" for name, minutes in results["minutes"].items())
        for seed, results in seeds.items()
    )


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """Format rows as a Markdown table; the second row sets the alignment of the columns."""
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def plot(seeds: Seeds, path: str | Path) -> None:
    """Plot the mean mIoU of every ablation by vocabulary as bars, with a dot for each seed."""
    from matplotlib.figure import Figure  # needed for plots only

    ablations = [
        ablation for ablation in MAIN_ABLATIONS if any(ablation in results["arms"] for results in seeds.values())
    ]
    rows = [row for row in _rows(seeds, "miou") if row != TEACHER_COSINE]
    figure = Figure(figsize=(11, 4.6), layout="constrained")
    axes = figure.subplots()
    width = 0.8 / max(1, len(ablations))
    for number, ablation in enumerate(ablations):
        cells = [[100 * value for value in values(seeds, ablation, row) if value is not None] for row in rows]
        centers = [position + (number - (len(ablations) - 1) / 2) * width for position in range(len(rows))]
        axes.bar(
            centers,
            [mean(cell) if cell else 0 for cell in cells],
            width,
            label=ABLATIONS[ablation].title,
            color=f"C{number}",
        )
        dots = [(center, value) for center, cell in zip(centers, cells, strict=True) for value in cell]
        axes.plot(*zip(*dots, strict=True), ".", color="black", markersize=3)
    axes.set_xticks(range(len(rows)), rows, rotation=30, ha="right")
    axes.set_ylabel("mIoU (%)")
    axes.set_title(f"Mini-world ablations ({len(seeds)} seeds, one dot per seed)")
    axes.legend()
    axes.grid(axis="y", alpha=0.3)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=130)
