"""The ablation over several seeds: tables in Markdown and a plot."""

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
    "seen": "the ten words of training",
    "seen by 5th word": "the same, by a synonym that training never used",
    "seen by 6th word": "the same, by another such synonym",
    "colour": "finer: colour + shape (`red square`)",
    "fill": "finer: fill + shape (`striped star`)",
    "sub": "finer: sub-classes (circle and ring of `round`, brick and wood of `wall`)",
    "void": "objects that were void in training (heart, arrow, water)",
    "never": "objects that training pictures never held (hexagon, drop, sand)",
    "all/seen": "all eighteen concepts at once: those named in training",
    "all/novel": "- the others",
    "all/sub": "- of these, the sub-classes",
    "all/void": "- those void in training",
    "all/never": "- those never seen",
    HARMONIC_MEAN: "- harmonic mean of named and others",
    TEACHER_COSINE: "cos(student, teacher) over regions, x 100",
}
TABLE_TITLES = {
    "scores": "mIoU in per cent, mean and standard deviation over seeds",
    "scores_by_seed": "The same, seed by seed",
    "regions": "Regions named rightly, in per cent",
    "variants": "Variants, mIoU in per cent, seed by seed",
    "gate": "The gate, seed by seed",
    "minutes": "Minutes",
}
Seeds = Mapping[int, Mapping]  # seed -> the results of `experiment.run`


def read_seeds(folder: str | Path) -> dict[int, dict]:
    """Results of all finished seeds below a folder.

    Raises:
        ValueError: there is none.
    """
    paths = {int(path.parent.name.removeprefix("seed-")): path for path in Path(folder).glob("seed-*/results.json")}
    if not paths:
        raise ValueError(f"{folder} holds no finished seed: run `python -m train.miniworld --out {folder}` first.")
    return {seed: json.loads(paths[seed].read_text()) for seed in sorted(paths)}


def write_summary(folder: str | Path, seeds: Seeds) -> str:
    """Write `summary.json` (`{"tables", "seeds"}`) and `summary.png` into a folder; the tables as one text."""
    found = tables(seeds)
    atomic_write_json(Path(folder) / SUMMARY_NAME, {"tables": found, "seeds": seeds})
    plot(seeds, Path(folder) / PLOT_NAME)
    return "\n\n".join(f"{TABLE_TITLES[name]}\n\n{table}" for name, table in found.items() if table)


def tables(seeds: Seeds) -> dict[str, str]:
    """Every table of `TABLE_TITLES` in Markdown; empty where no seed has what it shows."""
    return {
        "scores": score_table(seeds, MAIN_ABLATIONS),
        "scores_by_seed": score_table(seeds, MAIN_ABLATIONS, by_seed),
        "regions": score_table(seeds, MAIN_ABLATIONS, measure="region_accuracy"),
        "variants": score_table(seeds, VARIANTS, by_seed),
        "gate": gate_table(seeds),
        "minutes": _minutes(seeds),
    }


def score_table(seeds: Seeds, ablations: Sequence[str], show=None, measure: str = "miou") -> str:
    """Words asked (rows) by ablation (columns); ablations that no seed has are left out; empty without any ablation.

    Args:
        seeds: the results.
        ablations: names of ablations, in order.
        show: a cell's values over the seeds -> text; `mean_and_spread` by default.
        measure: `miou` or `region_accuracy`.
    """
    present = [ablation for ablation in ablations if any(ablation in results["arms"] for results in seeds.values())]
    if not present:
        return ""
    rows = [["words asked", *(ABLATIONS[ablation].title for ablation in present)], ["---", *["---:"] * len(present)]]
    for row in _rows(seeds, measure):
        cells = ((show or mean_and_spread)(values(seeds, ablation, row, measure)) for ablation in present)
        rows.append([ROW_TITLES.get(row, row), *cells])
    return markdown(rows)


def _rows(seeds: Seeds, measure: str) -> list[str]:
    first = next(iter(next(iter(seeds.values()))["arms"].values()))
    return [*first["scores"], *([HARMONIC_MEAN, TEACHER_COSINE] if measure == "miou" else [])]


def values(seeds: Seeds, ablation: str, row: str, measure: str = "miou") -> list[float | None]:
    """A row's value of each seed that has the ablation, 0..1, None where there is no ground truth."""
    found = [results["arms"][ablation] for results in seeds.values() if ablation in results["arms"]]
    if row == HARMONIC_MEAN:
        return [scores["harmonic_mean"] for scores in found]
    if row == TEACHER_COSINE:
        return [scores["teacher_cosine"] for scores in found]
    return [scores["scores"][row][measure] for scores in found]


def mean_and_spread(cell: Sequence[float | None]) -> str:
    """`47.3 ± 1.2`: mean and sample standard deviation in per cent, the latter from two seeds on."""
    measured = [value for value in cell if value is not None]
    if len(measured) < 2:
        return per_cent(measured[0] if measured else None)
    return f"{per_cent(mean(measured))} ± {per_cent(stdev(measured))}"


def by_seed(cell: Sequence[float | None]) -> str:
    """`47.3 / 46.1`: every seed in order."""
    return " / ".join(map(per_cent, cell))


def gate_table(seeds: Seeds) -> str:
    """Accuracy and collapse of the teachers, seed by seed."""
    gates = [results["gate"] for results in seeds.values()]
    rows = [["regions", "zero-shot accuracy", "cos(image, class mean)"], ["---", "---:", "---:"]]
    for name in gates[0]["rows"]:
        measured = [gate["rows"][name] for gate in gates]
        rows.append([name, *(_decimals(row[key] for row in measured) for key in ("accuracy", "collapse"))])
    for kind in gates[0]["synonyms"]:
        rows.append([f"cos(name, synonym), {kind}", "", _decimals(gate["synonyms"][kind] for gate in gates)])
    missed = [f"seed {seed}: {miss}" for seed, gate in zip(seeds, gates, strict=True) for miss in gate["misses"]]
    return f"{markdown(rows)}\n\n" + ("Missed: " + "; ".join(missed) if missed else "Every target is reached.")


def _decimals(numbers) -> str:
    return " / ".join("-" if number is None else f"{number:.3f}" for number in numbers)


def _minutes(seeds: Seeds) -> str:
    return "\n".join(
        f"- seed {seed}: " + ", ".join(f"{name} {minutes}" for name, minutes in results["minutes"].items())
        for seed, results in seeds.items()
    )


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """A table; the second row says how the columns are aligned."""
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def plot(seeds: Seeds, path: str | Path) -> None:
    """Bars of the mean mIoU of every ablation by words asked, with every seed as a dot."""
    from matplotlib.figure import Figure  # only drawing needs it

    ablations = [
        ablation for ablation in MAIN_ABLATIONS if any(ablation in results["arms"] for results in seeds.values())
    ]
    rows = [row for row in _rows(seeds, "miou") if row != TEACHER_COSINE]
    figure = Figure(figsize=(11, 4.6), layout="constrained")
    axes = figure.subplots()
    width = 0.8 / max(1, len(ablations))
    for number, ablation in enumerate(ablations):
        cells = [[100 * value for value in values(seeds, ablation, row) if value is not None] for row in rows]
        centres = [position + (number - (len(ablations) - 1) / 2) * width for position in range(len(rows))]
        axes.bar(
            centres,
            [mean(cell) if cell else 0 for cell in cells],
            width,
            label=ABLATIONS[ablation].title,
            color=f"C{number}",
        )
        dots = [(centre, value) for centre, cell in zip(centres, cells, strict=True) for value in cell]
        axes.plot(*zip(*dots, strict=True), ".", color="black", markersize=3)
    axes.set_xticks(range(len(rows)), rows, rotation=30, ha="right")
    axes.set_ylabel("mIoU, per cent")
    axes.set_title(f"Mini-world: what each loss teaches ({len(seeds)} seeds; dots are seeds)")
    axes.legend()
    axes.grid(axis="y", alpha=0.3)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=130)
