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

from modeling_gkc.cli.common import UserError, interruptible
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

DESCRIPTION = "Judge a model on a prepared benchmark, as the field does it, and write one result file."
EPILOG = """\
examples:
  python -m train.data.prepare ade20k_150 --source ADEChallengeData2016 --out data/ade20k_150 --split val
  python -m train.evaluate --model gkc-r50 --benchmark ade20k_150 --data data/ade20k_150
  accelerate launch --num_processes 4 -m train.evaluate --model gkc-r50 --benchmark vspw_124 --data data/vspw
  torchrun --nproc_per_node 4 -m train.evaluate ...            several processes without a GPU
  python -m train.evaluate --model facebook/mask2former-swin-tiny-ade-semantic \\
      --benchmark ade20k_150 --data data/ade20k_150            another model, under the same metrics
  python -m train.evaluate report results/*.json               the field's table, beside the published rows

MODEL is a checkpoint of gkc, a model of transformers with a list of labels (Mask2Former, SegFormer, EoMT, ...), whose
labels are matched with the benchmark's by name, or CLIPSeg.

Killed at any moment, the same command goes on where it stopped, with any number of processes; the numbers do not
depend on them. What was done for another model, other data or other options is never mixed in.

exit code: 0 done, 1 done but some samples could not be read (each is named, in the result too), 2 the command was
wrong or could not be done, 130 stopped by Ctrl-C.
"""


def parser() -> argparse.ArgumentParser:
    """The parser of the command."""
    parser = argparse.ArgumentParser(
        prog="python -m train.evaluate",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--model", required=True, metavar="MODEL", help="folder, or name on the Hub")
    add("--benchmark", required=True, metavar="NAME", help=f"one of {', '.join(all_benchmarks())}")
    add("--data", type=Path, required=True, metavar="DIR", help="folder of train.data.prepare or from_folder")
    add("--out", type=Path, metavar="RESULT.json", help="(results/MODEL-BENCHMARK-SPLIT[-what is special].json)")
    add("--split", default="val", help="of the data (%(default)s)")
    tasks = all_tasks()
    add("--tasks", nargs="+", choices=tasks, default=(), metavar="TASK", help=f"{', '.join(tasks)} (the benchmark's)")
    add(
        "--prompts",
        choices=PROMPTS,
        default="plain",
        help="names, names in 14 sentences, or all synonyms (%(default)s)",
    )
    reduction = "how the logits of several names of a class become one (%(default)s)"
    add("--reduction", choices=REDUCTIONS, default="max", help=reduction)
    add("--tta", action="store_true", help="five sizes, each also mirrored; semantic results only")
    add("--trained-on", metavar="WORDS", help="vocabulary of training: seen and unseen classes are scored apart")
    add("--limit", type=_positive, metavar="N", help="only the first N images: a trial, no benchmark's number")
    add(
        "--batch-size", type=_positive, default=1, metavar="N", help="images that the model sees at once (%(default)s)"
    )
    add("--dtype", choices=DTYPES, default="float32", help="that the model computes in (%(default)s)")
    add("--compile", action="store_true", help="with torch.compile: for images of few sizes")
    add("--short-side", type=_positive, metavar="PIXELS", help="of images that the model sees (the protocol's)")
    add("--long-side", type=_positive, metavar="PIXELS", help="that it may not exceed (the protocol's)")
    chunk = "a killed process loses at most so many (%(default)s)"
    add("--images-per-chunk", type=_positive, default=IMAGES_PER_CHUNK, metavar="N", help=chunk)
    predictions = "write all predictions here, in the benchmark's own ids"
    add("--write-predictions", type=Path, metavar="DIR", help=predictions)
    add("--per-class", action="store_true", help=f"print every class, also of more than {SHORT_TABLE}")
    add("--profile", action="store_true", help="count floating-point operations too")
    add("--cpu", action="store_true", help="use no accelerator")
    return parser


def _positive(text: str) -> int:
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {text}")
    return number


@interruptible("train.evaluate", "The same command goes on from here.")
def main(argv: Sequence[str] | None = None) -> int:
    """
    Run the command.

    Args:
        argv: arguments without the program's name; None takes those of the process.

    Returns:
        The exit code, see `--help`.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    if argv[:1] == ["report"]:
        from .report import main as report

        return report(argv[1:])
    options = parser().parse_args(argv)
    try:
        _check(options)

        from .processes import processes
        from .run import run
        from .session import load_session

        state = processes(options.cpu)
        request = _request(options, f"python -m train.evaluate {shlex.join(argv)}")
        with warnings.catch_warnings():  # words that several classes share: whoever packed the vocabulary knows
            warnings.simplefilter("ignore", UserWarning)
            with lock_output(request.out) if state.is_main_process else nullcontext():
                result = run(load_session(request, state), state)
    except (ValueError, UserError, OSError) as error:
        reason = error_line(error) if isinstance(error, OSError) else error
        sys.stderr.write(f"train.evaluate: error: {reason}\n")
        return MISUSED
    if result is None:  # of a process that is not the first
        return DONE
    sys.stdout.write(f"{describe(result, options.per_class)}\nThe result is in {request.out}\n")
    return _say_what_is_wrong(result)


def _say_what_is_wrong(result: Mapping[str, Any]) -> int:
    """Words that the model does not know, samples that were not scored; the exit code."""
    broken = result["images"]["broken"]
    for line in result["model"]["notes"].get("warnings", []):
        sys.stderr.write(f"train.evaluate: warning: {line}\n")
    for line in flattering(result):
        sys.stderr.write(f"train.evaluate: warning: {line}\n")
    for line in broken:
        sys.stderr.write(f"train.evaluate: not scored: {line}\n")
    return INCOMPLETE if broken else DONE


def flattering(result: Mapping[str, Any]) -> list[str]:
    """Reasons why scores may look better than the predictions are, see `Score.warnings` of each metric."""
    labels, lines = [entry["name"] for entry in result["classes"]], []
    for name, score in all_scores().items():
        if name in result["scores"]:
            rows = [entry["scores"].get(name, {}) for entry in result["classes"]]
            columns = {key: [row.get(key) for row in rows] for key in (rows[0] if rows else ())}
            lines += score.warnings(result["scores"][name], columns, labels)
    return lines


def _check(options: argparse.Namespace) -> None:
    """Refuse what cannot be meant, before anything is loaded."""
    protocol = protocol_of(options.benchmark)
    if options.tta and any(needs_segments(task) for task in options.tasks or protocol.tasks):
        raise ValueError("--tta: segments of several views cannot be merged; give --tasks semantic.")
    if not options.data.is_dir():
        raise ValueError(f"--data: there is not a directory {options.data}; `python -m train.data.prepare` makes it.")


def _request(options: argparse.Namespace, command: str) -> Request:
    from .session import Request

    given = vars(options).copy()
    for name in ("per_class", "cpu"):
        given.pop(name)
    given["tasks"] = tuple(options.tasks)
    given["out"] = options.out or default_out(options)
    return Request(**given, command=command)


def default_out(options: argparse.Namespace) -> Path:
    """A file name that says what is special about the result."""
    from .run import model_name

    special = [
        *([options.prompts] if options.prompts != "plain" else []),
        *(["tta"] if options.tta else []),
        *([f"first-{options.limit}"] if options.limit else []),
    ]
    name = model_name(options.model).replace("/", "--")
    return Path("results") / ("-".join([name, options.benchmark, options.split, *special]) + ".json")


def describe(result: Mapping[str, Any], per_class: bool = False) -> str:
    """A result for people, in per cent."""
    images, times = result["images"], result["times"]
    lines = [f"{result['model']['name']} on {result['benchmark']}, {images['evaluated']} images of {result['split']}"]
    if images["published"] not in (None, images["evaluated"]):
        lines.append(f"published are {images['published']} images: this is not the benchmark's number")
    for task, scores in result["per_cent"].items():
        known = all_scores().get(task)
        hidden = known.details if known else ()
        shown = [f"{name} {_text(value)}" for name, value in scores.items() if not name.startswith(hidden)]
        lines.append(f"  {task:<15}{'  '.join(shown)}")
    for group, values in result["groups"].items():
        shown = [
            f"{name} {_text(None if value is None else 100 * value)}"
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
    """One line per class, in per cent; counts as they are."""
    columns = [(task, name) for task, scores in result["classes"][0]["scores"].items() for name in scores]
    lines = [f"  {'class':<28}" + "".join(f"{name:>16}" for _, name in columns)]
    for entry in result["classes"]:
        cells = [entry["scores"][task][name] for task, name in columns]
        shown = [_text(value if value is None or isinstance(value, int) else 100 * value) for value in cells]
        lines.append(f"  {entry['name'][:27]:<28}" + "".join(f"{cell:>16}" for cell in shown))
    return "\n".join(lines)


def _text(value: float | None) -> str:
    if value is None:
        return "-"
    return str(value) if isinstance(value, int) else f"{value:.2f}"
