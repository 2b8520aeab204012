# Copyright 2026 The GKC Authors.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""
How fast the segmenter is, beside what people would otherwise use: measured in one run, shown as one table.

  python -m benchmarks                                 # 20 minutes for fp32 on two quiet cores, most of it compiling
  python -m benchmarks --preset quick                  # a few minutes: one size, fewer rounds, without torch.compile
  python -m benchmarks --preset complete               # torch.compile everywhere, more rounds
  python -m benchmarks --only image operator           # some of it
  python -m benchmarks --device cuda                   # on a GPU
  python -m benchmarks --out out/bench --continue      # what a run that was ended has left

What is measured:
  operator    deformable attention alone, each kernel, forward and backward
  image       image tensor -> logits, and image file -> label map, against transformers' Mask2Former of equal weights,
              and over our own backbone alone
  batch       throughput of a batch of 32, on a GPU
  two-stage   against masks first, then CLIP on 100 crops
  clipseg     against CLIPSeg, asked for 20 and for 150 words
  memory      the most that a process holds, each in its own

Each is a process of its own; in it the arms take turns, round by round. What each compares exactly stands at the top
of benchmarks/inference.py, baselines.py and operator_kernels.py. Weights are random: nothing is downloaded.

OUT gets results.json and results.md, written anew after every measurement, so that an ended run keeps what it has.
The table is also printed. Let nothing else run beside it: the load average is noted.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict
from datetime import UTC, datetime
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modeling_gkc.atomic_files import atomic_write

if TYPE_CHECKING:
    from .harness import Options, Result

ROOT = Path(__file__).resolve().parent.parent
# The names of `models.PRESETS` and `harness.DTYPES`, which need torch.
PRESET_NAMES = ("complete", "full", "quick", "toy")
DTYPE_NAMES = ("fp32", "bf16")
GROUPS = ("operator", "image", "batch", "two-stage", "clipseg", "memory")
RECORD, TABLE = "results.json", "results.md"
FAILED, MISUSED = 1, 2  # exit codes; 128 + the signal's number for a run that was ended
FORMAT = 1


class Misuse(ValueError):
    """Something the user can put right."""


class _Terminated(KeyboardInterrupt):
    """SIGTERM, taken as Ctrl-C is."""


def measurements(options: Options) -> dict[str, Callable[[], list[Result]]]:
    """All that can be measured, by name: the group, then what of it."""
    from .baselines import measure_clipseg, measure_rival_memory, measure_two_stage
    from .inference import OURS, THEIRS, measure_batch, measure_images, measure_memory, modes
    from .models import EAGER, OPTIMIZED, PRESETS, mode_name
    from .operator_kernels import measure_operator

    preset = PRESETS[options.preset]
    first, given = preset.sizes[0], (preset, options)
    found: dict[str, Callable[[], list[Result]]] = {}
    for size in preset.operator_sizes:
        found[f"operator {size}"] = partial(measure_operator, *given, size)
    for size in preset.sizes:
        found[f"image {size}"] = partial(measure_images, *given, size)
    if options.device == "cuda":
        found[f"batch {first}"] = partial(measure_batch, *given, first)
    found[f"two-stage {first}"] = partial(measure_two_stage, *given, first)
    found[f"clipseg {first}"] = partial(measure_clipseg, *given, first)
    for mode, dtype in modes(preset, options, first):
        measured = mode in (EAGER, OPTIMIZED) or preset.compiled_memory
        for side in (THEIRS, OURS) if measured else ():
            if (side, mode) == (THEIRS, OPTIMIZED):  # which is ours alone
                continue
            found[f"memory {side}, {mode_name(mode, dtype)}"] = partial(measure_memory, *given, side, mode, dtype)
    for rival in ("two-stage", "clipseg"):
        found[f"memory {rival}"] = partial(measure_rival_memory, *given, rival)
    return found


def measure_here(name: str, options: Options) -> dict[str, Any]:
    """One measurement in this process, as JSON holds it."""
    import torch
    from transformers.utils import logging as transformers_logging

    from .harness import load_average

    torch.set_num_threads(options.threads)
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    start, load = time.perf_counter(), load_average()
    results = [asdict(result) for result in measurements(options)[name]()]
    loads = [] if load is None else [load, load_average()]
    for result in results:
        result["load_average"] = loads
    return {"took": time.perf_counter() - start, "results": results}


def measure_apart(name: str, options: Options) -> dict[str, Any]:
    """One measurement in a process of its own; where that fails, the last line of what it said."""
    command = [sys.executable, "-m", "benchmarks", "--measure", name, *option_arguments(options)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(options.threads), "HF_HUB_OFFLINE": "1"}
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    try:
        said = _pass_on(process)
        output = process.stdout.read()
        process.wait()
    finally:
        with suppress(ProcessLookupError):
            process.kill()
        process.wait()
    if process.returncode:
        return {"failed": f"exit code {process.returncode}: {said}"}
    return json.loads(output.decode().splitlines()[-1])


def _pass_on(process: subprocess.Popen) -> str:
    """Shows what a process says; its last line."""
    last = ""
    for line in process.stderr:
        text = line.decode(errors="replace")
        sys.stderr.write(text)
        last = text.strip() or last
    return last


def option_arguments(options: Options) -> list[str]:
    """The arguments that make these options."""
    arguments = ["--preset", options.preset, "--device", options.device, "--threads", str(options.threads)]
    return [*arguments, "--dtype", *options.dtypes, *([] if options.compile else ["--no-compile"])]


class Record:
    """What has been measured, on disk after every measurement.

    Args:
        folder: Of the files; made with the first measurement.
        content: What JSON holds.
        document: A file that shows the tables between its marks, if any.
    """

    def __init__(self, folder: Path, content: dict[str, Any], document: Path | None = None):
        self.folder, self.content, self.document = folder, content, document

    @classmethod
    def begin(cls, arguments: argparse.Namespace, options: Options, planned: list[str]) -> Record:
        """A new one, or the one to be continued.

        Raises:
            Misuse: the folder holds results that were not to be continued, or those of something else.
        """
        from .harness import machine

        content = {
            "format": FORMAT,
            "command": shlex.join(["python", "-m", "benchmarks", *arguments.typed]),
            "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
            "options": json.loads(json.dumps(asdict(options))),
            "machine": machine(options.threads),
            "planned": planned,
            "measurements": {},
        }
        path = arguments.out / RECORD
        if arguments.resume:
            content = _continued(path, content)
        elif path.exists() or (arguments.out / TABLE).exists():
            raise Misuse(f"{arguments.out} holds results: name another folder with --out, or add --continue")
        return cls(arguments.out, content, arguments.docs)

    def add(self, name: str, found: dict[str, Any]) -> None:
        """Keeps a measurement."""
        self.content["measurements"][name] = found
        self.write()

    def write(self) -> None:
        """Writes the files, each at once."""
        self.folder.mkdir(parents=True, exist_ok=True)
        atomic_write(self.folder / RECORD, json.dumps(self.content, indent=1) + "\n")
        atomic_write(self.folder / TABLE, self.table())

    def table(self) -> str:
        """The tables in Markdown."""
        from .report import markdown

        return markdown(self.content)


def _continued(path: Path, content: dict[str, Any]) -> dict[str, Any]:
    if not path.exists():
        raise Misuse(f"{path} is not there: there is nothing to continue")
    kept = json.loads(path.read_text(encoding="utf-8"))
    names = ("format", "options")
    about = ("processor", "cores", "threads", "accelerator", "torch", "transformers")
    differing = [name for name in names if kept[name] != content[name]]
    differing += [name for name in about if kept["machine"][name] != content["machine"][name]]
    if differing:
        raise Misuse(f"{path} is of another {' and '.join(differing)}: name another folder with --out")
    kept["planned"] = list(dict.fromkeys([*kept["planned"], *content["planned"]]))
    kept["measurements"] = {name: each for name, each in kept["measurements"].items() if "failed" not in each}
    return kept


def parse_arguments(typed: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    folder = Path("out") / datetime.now(UTC).strftime("bench-%Y%m%d-%H%M%S")
    parser.add_argument(
        "--preset", choices=PRESET_NAMES, default="full", help="(default: %(default)s); toy only tests"
    )
    parser.add_argument("--out", type=Path, default=folder, help="new folder of the results (default: out/bench-TIME)")
    parser.add_argument("--only", nargs="+", choices=GROUPS, default=list(GROUPS), metavar="NAME", help="see above")
    parser.add_argument("--threads", type=int, default=2, help="of the processor (default: %(default)s)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="(default: %(default)s)")
    parser.add_argument("--dtype", nargs="+", choices=DTYPE_NAMES, default=list(DTYPE_NAMES), help="(default: all)")
    parser.add_argument("--no-compile", dest="compile", action="store_false", help="leave torch.compile out")
    parser.add_argument("--continue", dest="resume", action="store_true", help="measure what OUT lacks")
    parser.add_argument("--docs", type=Path, help="a document that shows the tables too, between its marks")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    arguments = parser.parse_args(typed)
    arguments.typed = list(typed)
    if arguments.threads < 1:
        parser.error("--threads must be at least 1")
    return arguments


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command.

    Args:
        argv: Arguments without the program's name; None takes those of the process.

    Returns:
        0 all was measured, 1 something failed, 2 an error of the user, 128 + number ended by a signal.
    """
    arguments = parse_arguments(sys.argv[1:] if argv is None else argv)
    from .harness import Options, progress

    dtypes = tuple(dtype for dtype in DTYPE_NAMES if dtype in arguments.dtype)
    options = Options(arguments.preset, arguments.device, dtypes, arguments.threads, arguments.compile)
    if arguments.measure:
        sys.stdout.write(json.dumps(measure_here(arguments.measure, options)) + "\n")
        return 0
    previous = signal.signal(signal.SIGTERM, _terminate)
    try:
        return _run(arguments, options)
    except (Misuse, ValueError) as error:
        progress(f"error: {error}")
        return MISUSED
    except KeyboardInterrupt as stop:
        return 128 + (signal.SIGTERM if isinstance(stop, _Terminated) else signal.SIGINT)
    finally:
        signal.signal(signal.SIGTERM, previous)


def _terminate(number: int, frame: Any) -> None:
    raise _Terminated


def _run(arguments: argparse.Namespace, options: Options) -> int:
    import torch

    from .harness import progress
    from .report import update_document

    if options.device == "cuda" and not torch.cuda.is_available():
        raise Misuse("--device cuda: torch sees no CUDA device here")
    if find_spec("scipy") is None:
        raise Misuse("transformers' Mask2Former needs scipy: pip install scipy")
    planned = [name for name in measurements(options) if name.split()[0] in arguments.only]
    if not planned:
        raise Misuse(f"{', '.join(arguments.only)}: nothing of it is measured on the device {options.device}")
    record = Record.begin(arguments, options, planned)
    missing = [name for name in planned if name not in record.content["measurements"]]
    start = time.perf_counter()
    try:
        for number, name in enumerate(missing):
            progress(f"[{number + 1}/{len(missing)}] {name} ({time.perf_counter() - start:.0f} s so far)")
            record.add(name, measure_apart(name, options))
    except KeyboardInterrupt:
        progress(f"Ended; what was measured is kept. To go on: --out {arguments.out} --continue and the same options")
        raise
    sys.stdout.write(record.table())
    if arguments.docs:
        update_document(arguments.docs, record.table())
    progress(f"Written to {arguments.out / RECORD} and {TABLE} beside it.")
    return FAILED if any("failed" in each for each in record.content["measurements"].values()) else 0


if __name__ == "__main__":
    sys.exit(main())
