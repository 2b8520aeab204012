"""`python -m train.evaluate report`: tables of results beside published ones, and metadata of a model card."""

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..data.benchmarks import all_benchmarks, benchmark_named
from ..data.benchmarks.protocol import PUBLISHED_ROWS
from ..metrics.score import ReportedScore, all_scores, table_score
from .result import per_cent, read_result

PUBLISHED_NOTE = "Published rows were measured by their authors, on other hardware and partly with other prompts."

EPILOG = """\
examples:
  python -m train.evaluate report results/*.json                    Markdown table beside published results
  python -m train.evaluate report results/gkc-r50-*.json --model-index
                                                                    YAML metadata of a model card
exit code: 0 success, 2 a file is not a result file, or two results belong to the same table cell.
"""


def row_name(result: Mapping[str, Any]) -> str:
    """Return the row name of a result: the model, and the options that differ from the defaults."""
    prompts, settings = result["prompts"], result["settings"]
    special = [
        *([prompts["kind"]] if prompts["kind"] != "plain" else []),
        *([prompts["reduction"]] if prompts["reduction"] != "max" else []),
        *(["TTA"] if prompts.get("tta") else []),
        *([settings["dtype"]] if settings.get("dtype", "float32") != "float32" else []),
        *([f"short side {settings['short_side']}"] if settings.get("short_side") else []),
        *([f"first {settings['limit']} images"] if settings.get("limit") else []),
    ]
    model = result["model"]
    return f"{model['name']} ({model['sha256'][:8]}{', ' if special else ''}{', '.join(special)})"


def columns() -> list[tuple[str, str]]:
    """Return heading and benchmark name of each column of the table."""
    known = [benchmark for benchmark in all_benchmarks().values() if benchmark.column is not None]
    known.sort(key=lambda benchmark: (benchmark.column.position, benchmark.column.heading))
    return [(benchmark.column.heading, benchmark.name) for benchmark in known]


def published_rows() -> dict[str, dict[str, float]]:
    """Return the published scores in percent by row name and benchmark."""
    rows: dict[str, dict[str, float]] = {title: {} for title in PUBLISHED_ROWS}
    for _, name in columns():
        for title, value in benchmark_named(name).column.published.items():
            rows.setdefault(title, {})[name] = value
    return rows


def table(results: Sequence[Mapping[str, Any]], published: bool = True) -> str:
    """Format the main score of each result as a Markdown table, one row per model and one column per benchmark.

    Args:
        results: Results that `read_result` returned.
        published: Whether to add published rows that have a score on one of the benchmarks.

    Raises:
        ValueError: Two results belong to the same cell.
    """
    score, shown = table_score()
    scored = [result for result in results if result["scores"].get(score.name, {}).get(shown.name) is not None]
    benchmarks = {result["benchmark"] for result in scored}
    headings = [(heading, name) for heading, name in columns() if name in benchmarks]
    headings += [(name, name) for name in sorted(benchmarks - {name for _, name in headings})]
    cells: dict[str, dict[str, str]] = {}
    for result in scored:
        row = cells.setdefault(row_name(result), {})
        if result["benchmark"] in row:
            raise ValueError(f"Two results are of {row_name(result)} on {result['benchmark']}: give only one of them.")
        mark = "*" if _is_partial(result) else ""
        row[result["benchmark"]] = f"{per_cent(result['scores'][score.name][shown.name], 1):.1f}{mark}"
    rows = {
        title: {name: f"{values[name]:.1f}" for name in benchmarks & values.keys()}
        for title, values in published_rows().items()
        if published and benchmarks & values.keys()
    }
    lines = [
        _table_row(["model", *(heading for heading, _ in headings)]),
        _table_row(["---", *["---:"] * len(headings)]),
    ]
    lines += [
        _table_row([title, *(row.get(name, "") for _, name in headings)])
        for title, row in [*cells.items(), *rows.items()]
    ]
    notes = [f"{shown.table_note} {PUBLISHED_NOTE}" if rows else shown.table_note, *_footnotes(results)]
    return "\n".join([*lines, "", *notes])


def other_scores(results: Sequence[Mapping[str, Any]]) -> str:
    """Format the scores of the other tasks and of class groups as a Markdown table; "" if there are none."""
    rows, (table_of, in_table) = [], table_score()
    for result in results:
        for task, scores in result["scores"].items():
            others = [entry for entry in _reported(task) if not entry.table_note]
            rows += [(result, entry.label, per_cent(scores.get(entry.name), 1)) for entry in others]
        rows += [
            (result, f"{in_table.label}, {group}", per_cent(values[table_of.name][in_table.name], 1))
            for group, values in result["groups"].items()
            if table_of.name in values
        ]
    if not rows:
        return ""
    lines = [_table_row(["model", "benchmark", "score", "percent"]), _table_row(["---", "---", "---", "---:"])]
    lines += [
        _table_row([row_name(result), result["benchmark"], label, "-" if value is None else f"{value:.1f}"])
        for result, label, value in rows
    ]
    return "\n".join(lines)


def _reported(name: str) -> tuple[ReportedScore, ...]:
    """Return the reported numbers of a score, empty for a score that this version does not know."""
    return all_scores()[name].report if name in all_scores() else ()


def _is_partial(result: Mapping[str, Any]) -> bool:
    images = result["images"]
    return bool(images["broken"]) or images["evaluated"] != (images["published"] or images["prepared"])


def _footnotes(results: Sequence[Mapping[str, Any]]) -> list[str]:
    """Describe the results that are incomplete or lack classes, one note each."""
    notes = []
    for result in results:
        images = result["images"]
        if _is_partial(result):
            of = images["published"] or images["prepared"]
            notes.append(
                f"\\* {row_name(result)} on {result['benchmark']}: {images['evaluated']} of {of} images, "
                f"{len(images['broken'])} unreadable."
            )
        missing = result["model"]["notes"].get("classes_without_label")
        if missing:
            notes.append(
                f"{row_name(result)} has no label for {len(missing)} of {len(result['classes'])} classes of "
                f"{result['benchmark']}, which count as never predicted."
            )
    return notes


def _table_row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |"


def model_index(results: Sequence[Mapping[str, Any]]) -> str:
    """Format the results of one model as the `model-index` block of a model card, in YAML.

    Raises:
        ValueError: The results are of several models, or none of them is complete.
    """
    from huggingface_hub import EvalResult, ModelCardData  # slow to import

    names = {result["model"]["name"] for result in results}
    if len({result["model"]["sha256"] for result in results}) > 1:
        raise ValueError(f"--model-index: Give the results of one model, not of several ({', '.join(sorted(names))}).")
    headings = {name: heading for heading, name in columns()}
    entries = [
        EvalResult(
            task_type=all_scores()[task].task_type,
            task_name=f"{task.replace('_', ' ')} segmentation",
            dataset_type=result["benchmark"],
            dataset_name=headings.get(result["benchmark"], result["benchmark"]),
            dataset_split=result["split"],
            metric_type=entry.type,
            metric_name=entry.label,
            metric_value=per_cent(scores[entry.name]),
            metric_args={"prompts": result["prompts"]["kind"], "reduction": result["prompts"]["reduction"]},
        )
        for result in results
        if not _is_partial(result)
        for task, scores in result["scores"].items()
        for entry in _reported(task)
        if scores.get(entry.name) is not None
    ]
    if not entries:
        raise ValueError("--model-index: None of the results covers all images of its benchmark.")
    return ModelCardData(model_name=names.pop(), eval_results=entries).to_yaml()


def main(argv: Sequence[str]) -> int:
    """Run the command and return its exit code: 0 for success, 2 for an error."""
    parser = argparse.ArgumentParser(
        prog="python -m train.evaluate report",
        description="Print results as Markdown tables beside published ones, or as the `model-index` of a model card.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("results", nargs="+", type=Path, metavar="RESULT.json", help="result files of train.evaluate")
    parser.add_argument(
        "--model-index",
        action="store_true",
        help="print YAML metadata for a model card instead; all results must be of one model",
    )
    parser.add_argument("--without-published", action="store_true", help="omit published results")
    options = parser.parse_args(argv)
    try:
        results = [read_result(path) for path in options.results]
        if options.model_index:
            parts = [model_index(results)]
        else:
            parts = [table(results, not options.without_published), other_scores(results)]
    except ValueError as error:
        sys.stderr.write(f"train.evaluate report: error: {error}\n")
        return 2
    sys.stdout.write("\n\n".join(filter(None, parts)).rstrip() + "\n")
    return 0
