"""`python -m train.evaluate report`: results as the field's table, beside the published rows, and for a model card."""

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from .result import per_cent, read_result

# Heading of a column, and the benchmark whose mIoU stands in it.
COLUMNS = (
    ("COCO", "coco_panoptic_133"),
    ("PAS-20", "pascal_voc_20"),
    ("Cityscapes", "cityscapes_19"),
    ("A-150", "ade20k_150"),
    ("A-847", "ade20k_847"),
    ("PC-59", "pascal_context_59"),
    ("PC-459", "pascal_context_459"),
    ("VSPW", "vspw_124"),
    ("VIPSeg", "vipseg_124"),
)
# mIoU in per cent, in the order of the columns; what was not published is None.
PUBLISHED = (
    ("GKC, CLIP R-50 (Han et al., ICCV 2023, table 1)", (49.8, 78.7, 34.3, 17.5, 3.2, 41.9, 6.5, None, None)),
    ("GKC, R-101 (the same)", (51.2, 83.2, 34.8, 18.8, 3.5, 45.2, 7.1, None, None)),
    ("GKC, R-50, re-run by OpenTrans (CVPR 2024)", (46.0, 71.2, 33.9, 16.6, 2.5, 39.0, 7.1, None, None)),
    ("FC-CLIP, R-50 (Yu et al., NeurIPS 2023)", (None, 89.5, None, 23.3, 7.1, 50.5, 12.9, None, None)),
)
NOTE = (
    "mIoU in per cent: one confusion matrix over the split, classes without ground truth left out. Published rows are "
    "as their authors measured them: on other hardware, partly with other words."
)
METRICS = {  # task -> metrics of a model card: name in the result, type, name
    "semantic": (("miou", "mean_iou", "mIoU"), ("pixel_accuracy", "accuracy", "pixel accuracy")),
    "panoptic": (("pq", "panoptic_quality", "PQ"),),
    "instance": (("ap", "mask_ap", "mask AP"), ("ap50", "mask_ap50", "mask AP50")),
    "boundary": (("boundary_iou", "boundary_iou", "boundary IoU"),),
    "video": (("mVC8", "mvc8", "mVC8"), ("mVC16", "mvc16", "mVC16")),
    "video_panoptic": (("vpq", "vpq", "VPQ"),),
    "tracking": (("stq", "stq", "STQ"),),
}
TASK_TYPES = {"semantic": "image-segmentation", "video": "video-segmentation"}

EPILOG = """\
examples:
  python -m train.evaluate report results/*.json                    Markdown, beside the published rows
  python -m train.evaluate report results/gkc-r50-*.json --model-index
                                                                    YAML for the head of a model card
exit code: 0 done, 2 a file is no result, or two results are of one cell.
"""


def row_name(result: Mapping[str, Any]) -> str:
    """What distinguishes the rows of the table: the model, how it was asked, and what else makes numbers differ."""
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


def table(results: Sequence[Mapping[str, Any]], published: bool = True) -> str:
    """
    The field's table as Markdown, with the benchmarks that some result is of and the published rows that share one.

    Args:
        results: as `read_result` gives them.
        published: show the published rows.

    Raises:
        ValueError: two results fall into one cell.
    """
    scored = [result for result in results if result["scores"].get("semantic", {}).get("miou") is not None]
    known = {benchmark for _, benchmark in COLUMNS}
    extra = sorted({result["benchmark"] for result in scored} - known)
    asked = {result["benchmark"] for result in scored}
    shared = [index for index, (_, benchmark) in enumerate(COLUMNS) if benchmark in asked]
    columns = [*(COLUMNS[index] for index in shared), *((benchmark, benchmark) for benchmark in extra)]
    cells: dict[str, dict[str, str]] = {}
    for result in scored:
        row = cells.setdefault(row_name(result), {})
        if result["benchmark"] in row:
            raise ValueError(f"two results are of {row_name(result)} on {result['benchmark']}: name one of them.")
        mark = "*" if _is_partial(result) else ""
        row[result["benchmark"]] = f"{per_cent(result['scores']['semantic']['miou'], 1):.1f}{mark}"
    lines = [_line(["model", *(heading for heading, _ in columns)]), _line(["---", *["---:"] * len(columns)])]
    lines += [_line([name, *(row.get(benchmark, "") for _, benchmark in columns)]) for name, row in cells.items()]
    rows = [(name, [values[index] for index in shared]) for name, values in PUBLISHED if published]
    rows = [(name, values) for name, values in rows if any(value is not None for value in values)]
    lines += [
        _line([name, *("" if value is None else f"{value:.1f}" for value in values), *[""] * len(extra)])
        for name, values in rows
    ]
    notes = [NOTE if rows else NOTE.partition(" Published")[0], *_footnotes(results)]
    return "\n".join([*lines, "", *notes])


def other_scores(results: Sequence[Mapping[str, Any]]) -> str:
    """The scores of the other tasks and of groups of classes as a Markdown table; empty if there are none."""
    rows = []
    for result in results:
        for task, scores in result["scores"].items():
            names = [entry for entry in METRICS.get(task, ()) if task != "semantic" or entry[0] != "miou"]
            rows += [(result, label, per_cent(scores.get(name), 1)) for name, _, label in names]
        rows += [
            (result, f"mIoU, {group}", per_cent(values["semantic"]["miou"], 1))
            for group, values in result["groups"].items()
            if "semantic" in values
        ]
    if not rows:
        return ""
    lines = [_line(["model", "benchmark", "score", "per cent"]), _line(["---", "---", "---", "---:"])]
    lines += [
        _line([row_name(result), result["benchmark"], label, "-" if value is None else f"{value:.1f}"])
        for result, label, value in rows
    ]
    return "\n".join(lines)


def _is_partial(result: Mapping[str, Any]) -> bool:
    images = result["images"]
    return bool(images["broken"]) or images["evaluated"] != (images["published"] or images["prepared"])


def _footnotes(results: Sequence[Mapping[str, Any]]) -> list[str]:
    """What a reader must know of single cells."""
    notes = []
    for result in results:
        images = result["images"]
        if _is_partial(result):
            of = images["published"] or images["prepared"]
            notes.append(
                f"\\* {row_name(result)} on {result['benchmark']}: {images['evaluated']} of {of} images, "
                f"{len(images['broken'])} broken."
            )
        missing = result["model"]["notes"].get("classes_without_label")
        if missing:
            notes.append(
                f"{row_name(result)} has no label for {len(missing)} of {len(result['classes'])} classes of "
                f"{result['benchmark']}, which count as never found."
            )
    return notes


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |"


def model_index(results: Sequence[Mapping[str, Any]]) -> str:
    """
    The `model-index` block of a model card, YAML, of one model's results.

    Raises:
        ValueError: the results are of several models, or have no score.
    """
    names = {result["model"]["name"] for result in results}
    if len({result["model"]["sha256"] for result in results}) > 1:
        raise ValueError(f"--model-index is of one model, the results are of {', '.join(sorted(names))}.")
    entries = [
        EvalResult(
            task_type=TASK_TYPES.get(task, "image-segmentation"),
            task_name=f"{task.replace('_', ' ')} segmentation",
            dataset_type=result["benchmark"],
            dataset_name=dict(map(reversed, COLUMNS)).get(result["benchmark"], result["benchmark"]),
            dataset_split=result["split"],
            metric_type=kind,
            metric_name=label,
            metric_value=per_cent(scores[name]),
            metric_args={"prompts": result["prompts"]["kind"], "reduction": result["prompts"]["reduction"]},
        )
        for result in results
        if not _is_partial(result)
        for task, scores in result["scores"].items()
        for name, kind, label in METRICS.get(task, ())
        if scores.get(name) is not None
    ]
    if not entries:
        raise ValueError("there is no complete score: partial results and trials do not belong on a card.")
    return ModelCardData(model_name=names.pop(), eval_results=entries).to_yaml()


def main(argv: Sequence[str]) -> int:
    """Run the command; the exit code is 0, or 2 for files that are no results."""
    parser = argparse.ArgumentParser(
        prog="python -m train.evaluate report",
        description="Results beside the published rows, as Markdown or as the `model-index` of a model card.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("results", nargs="+", type=Path, metavar="RESULT.json", help="files of `train.evaluate`")
    parser.add_argument("--model-index", action="store_true", help="YAML for a model card, of one model's results")
    parser.add_argument("--without-published", action="store_true", help="leave the published rows out")
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
