"""The command `python -m train.evaluate`."""

from __future__ import annotations

import argparse
import shlex
import sys
import warnings
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modeling_gkc.cli.common import UserError, interruptible, positive
from modeling_gkc.label_text import error_line

from ..data.benchmarks import all_benchmarks, protocol_of
from ..metrics.score import all_scores, all_tasks, needs_segments
from ..storage.locks import lock_output
from .chunks import IMAGES_PER_CHUNK
from .vocabulary import PROMPTS, REDUCTIONS

if TYPE_CHECKING:
    from .session import Request

DTYPES = ("float32", "bfloat16", "float16")

DONE, INCOMPLETE, MISUSED = 0, 1, 2
SHORT_TABLE = 40

DESCRIPTION = "Evaluate a model on a prepared benchmark and write the scores to a result file."
EPILOG = """\
examples:
  python -m train.data.prepare ade20k_150 --source ADEChallengeData2016 --out data/ade20k_150 --split val
  python -m train.evaluate --model gkc-r50 --benchmark ade20k_150 --data data/ade20k_150
  accelerate launch --num_processes 4 -m train.evaluate --model gkc-r50 --benchmark vspw_124 --data data/vspw
  torchrun --nproc_per_node 4 -m train.evaluate ...            several processes without a GPU
  python -m train.evaluate --model facebook/mask2former-swin-tiny-ade-semantic \\
      --benchmark ade20k_150 --data data/ade20k_150            another model with the same metrics
  python -m train.evaluate report results/*.json               table of results beside published ones

MODEL is a GKC checkpoint, a CLIPSeg checkpoint, or a transformers segmentation model with a fixed label list
(Mask2Former, SegFormer, EoMT, ...), whose labels are matched with the class names of the benchmark.

An interrupted evaluation resumes when the same command is run again, with any number of processes; the scores do not
depend on that number. Partial results of another model, other data or other options are never reused.

exit code: 0 success, 1 some samples could not be read (stderr and the result file name them), 2 invalid arguments or
failure, 130 interrupted by Ctrl-C.
"""


def parser() -> argparse.ArgumentParser:
    """Build the argument parser of the command."""
    parser = argparse.ArgumentParser(
        prog="python -m train.evaluate",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--model", required=True, metavar="MODEL", help="checkpoint folder or Hub repository")
    add("--benchmark", required=True, metavar="NAME", help=f"benchmark: {', '.join(all_benchmarks())}")
    add(
        "--data",
        type=Path,
        required=True,
        metavar="DIR",
        help="prepared dataset folder, as train.data.prepare and train.data.from_folder write it",
    )
    out = "result file (default: results/MODEL-BENCHMARK-SPLIT.json, with prompts, TTA and limit if not default)"
    add("--out", type=Path, metavar="RESULT.json", help=out)
    add("--split", default="val", help="dataset split to evaluate (default: %(default)s)")
    tasks = all_tasks()
    listed = f"tasks to score: {', '.join(tasks)} (default: from the protocol)"
    add("--tasks", nargs="+", choices=tasks, default=(), metavar="TASK", help=listed)
    add(
        "--prompts",
        choices=PROMPTS,
        default="plain",
        help="prompt each class with its first name, with that name in 14 template sentences, or with all synonyms "
        "(default: %(default)s)",
    )
    reduction = "how the logits of several names of a class are combined (default: %(default)s)"
    add("--reduction", choices=REDUCTIONS, default="max", help=reduction)
    add("--tta", action="store_true", help="average five image sizes, each also flipped; semantic task only")
    add(
        "--trained-on", metavar="VOCABULARY", help="training vocabulary; also report scores of seen and unseen classes"
    )
    add("--limit", type=positive, metavar="N", help="evaluate only the first N images (default: all)")
    add("--batch-size", type=positive, default=1, metavar="N", help="images per forward pass (default: %(default)s)")
    add("--dtype", choices=DTYPES, default="float32", help="data type of the computation (default: %(default)s)")
    add("--compile", action="store_true", help="use torch.compile, which pays off if images have few sizes")
    default = "(default: from the protocol, or from the checkpoint for custom data)"
    short = f"shorter side of the resized image in pixels {default}"
    add("--short-side", type=positive, metavar="PIXELS", help=short)
    long = f"maximum longer side in pixels {default}"
    add("--long-side", type=positive, metavar="PIXELS", help=long)
    chunk = "images between two saves of the partial results (default: %(default)s)"
    add("--images-per-chunk", type=positive, default=IMAGES_PER_CHUNK, metavar="N", help=chunk)
    predictions = "also write all predictions to this folder, with the class ids of the benchmark's annotations"
    add("--write-predictions", type=Path, metavar="DIR", help=predictions)
    add(
        "--per-class",
        action="store_true",
        help=f"print the scores of all classes, even if there are more than {SHORT_TABLE}",
    )
    add("--profile", action="store_true", help="also count the floating-point operations of one image")
    add("--cpu", action="store_true", help="run on the CPU even if an accelerator is available")
    return parser


@interruptible("train.evaluate", "Run the same command again to resume.")
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        argv: Arguments without the program name; None takes those of the process.

    Returns:
        The exit code that `--help` documents.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    if argv[:1] == ["report"]:
        from .report import main as report

        return report(argv[1:])
    options = parser().parse_args(argv)
    try:
        _check_options(options)

        from ..storage.processes import processes
        from .run import run
        from .session import load_session

        state = processes(options.cpu)
        request = _make_request(options, f"python -m train.evaluate {shlex.join(argv)}")
        with warnings.catch_warnings():  # names shared by several classes are part of the published vocabulary
            warnings.simplefilter("ignore", UserWarning)
            with lock_output(request.out) if state.is_main_process else nullcontext():
                result = run(load_session(request, state), state)
    except (ValueError, UserError, OSError) as error:
        reason = error_line(error) if isinstance(error, OSError) else error
        sys.stderr.write(f"train.evaluate: error: {reason}\n")
        return MISUSED
    if result is None:  # not the main process
        return DONE
    sys.stdout.write(f"{format_result(result, options.per_class)}\nResult written to {request.out}\n")
    return _print_warnings(result)


def _print_warnings(result: Mapping[str, Any]) -> int:
    """Print warnings and unreadable samples to stderr, and return the exit code."""
    broken = result["images"]["broken"]
    for line in result["model"]["notes"].get("warnings", []):
        sys.stderr.write(f"train.evaluate: warning: {line}\n")
    for line in score_warnings(result):
        sys.stderr.write(f"train.evaluate: warning: {line}\n")
    for line in broken:
        sys.stderr.write(f"train.evaluate: not scored: {line}\n")
    return INCOMPLETE if broken else DONE


def score_warnings(result: Mapping[str, Any]) -> list[str]:
    """Collect the warnings of each metric about scores that may overstate the quality of the predictions."""
    labels, lines = [entry["name"] for entry in result["classes"]], []
    for name, score in all_scores().items():
        if name in result["scores"]:
            rows = [entry["scores"].get(name, {}) for entry in result["classes"]]
            columns = {key: [row.get(key) for row in rows] for key in (rows[0] if rows else ())}
            lines += score.warnings(result["scores"][name], columns, labels)
    return lines


def _check_options(options: argparse.Namespace) -> None:
    """Check the combination of options before anything is loaded."""
    protocol = protocol_of(options.benchmark)
    if options.tta and any(needs_segments(task) for task in options.tasks or protocol.tasks):
        raise ValueError("--tta: Segments of several views cannot be merged; add --tasks semantic.")
    if not options.data.is_dir():
        raise ValueError(f"--data: {options.data} is not a directory; create it with `python -m train.data.prepare`.")


def _make_request(options: argparse.Namespace, command: str) -> Request:
    from .session import Request

    given = vars(options).copy()
    for name in ("per_class", "cpu"):
        given.pop(name)
    given["tasks"] = tuple(options.tasks)
    given["out"] = options.out or default_output_path(options)
    return Request(**given, command=command)


def default_output_path(options: argparse.Namespace) -> Path:
    """Return the default result path, which names the model, benchmark, split and options that are not default."""
    from .run import model_name

    special = [
        *([options.prompts] if options.prompts != "plain" else []),
        *(["tta"] if options.tta else []),
        *([f"first-{options.limit}"] if options.limit else []),
    ]
    name = model_name(options.model).replace("/", "--")
    return Path("results") / ("-".join([name, options.benchmark, options.split, *special]) + ".json")


def format_result(result: Mapping[str, Any], per_class: bool = False) -> str:
    """Format a result as text with scores in percent."""
    images, times = result["images"], result["times"]
    lines = [f"{result['model']['name']} on {result['benchmark']}, {images['evaluated']} images of {result['split']}"]
    if images["published"] not in (None, images["evaluated"]):
        lines.append(f"the published split has {images['published']} images: these scores are not comparable")
    if "image_size" in result["model"]["notes"]:
        lines.append(f"  image size: {result['model']['notes']['image_size']}")
    for task, scores in result["per_cent"].items():
        known = all_scores().get(task)
        hidden = known.details if known else ()
        shown = [f"{name} {_format_score(value)}" for name, value in scores.items() if not name.startswith(hidden)]
        lines.append(f"  {task:<15}{'  '.join(shown)}")
    for group, values in result["groups"].items():
        shown = [
            f"{name} {_format_score(None if value is None else 100 * value)}"
            for task, scores in values.items()
            if task != "classes"
            for name, value in scores.items()
        ]
        count = f" ({values['classes']} classes)" if "classes" in values else ""
        lines.append(f"  {group}{count}: {'  '.join(shown)}")
    if per_class or len(result["classes"]) <= SHORT_TABLE:
        lines.append(class_table(result))
    each = times["milliseconds_per_image"]
    speed = "  ".join(f"{phase.replace('_', ' ')} {value:.1f}" for phase, value in each.items())
    rate = times["images_per_second"]
    lines.append(f"  {rate or 0:.2f} images/s with {times['processes']} process(es); ms per image: {speed}")
    if result["profile"]:
        lines.append(
            f"  {result['profile']['gigaflops']:.1f} GFLOPs for the first image, "
            f"{result['model']['parameters'] / 1e6:.1f} M parameters"
        )
    return "\n".join(lines)


def class_table(result: Mapping[str, Any]) -> str:
    """Format the scores of all classes, one line per class: scores in percent, counts as integers."""
    columns = [(task, name) for task, scores in result["classes"][0]["scores"].items() for name in scores]
    lines = [f"  {'class':<28}" + "".join(f"{name:>16}" for _, name in columns)]
    for entry in result["classes"]:
        cells = [entry["scores"][task][name] for task, name in columns]
        shown = [_format_score(value if value is None or isinstance(value, int) else 100 * value) for value in cells]
        lines.append(f"  {entry['name'][:27]:<28}" + "".join(f"{cell:>16}" for cell in shown))
    return "\n".join(lines)


def _format_score(value: float | None) -> str:
    if value is None:
        return "-"
    return str(value) if isinstance(value, int) else f"{value:.2f}"
