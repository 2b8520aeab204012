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
"""Measure the speed and memory of GKC compared with other models and write the result as one table.

  python -m benchmarks                                 # about 20 minutes for fp32 on two idle cores, mostly compiling
  python -m benchmarks --preset quick                  # a few minutes: one size, fewer rounds, without torch.compile
  python -m benchmarks --preset complete               # torch.compile at all sizes, more rounds
  python -m benchmarks --only image operator           # selected groups of measurements
  python -m benchmarks --device cuda                   # on a GPU
  python -m benchmarks --out out/bench --continue      # continue an interrupted run

Groups of measurements:
  operator    deformable attention alone, all kernels, forward and backward
  image       image tensor to logits, and image file to label map, against transformers' Mask2Former with the same
              weights, and against GKC's backbone alone
  batch       throughput of a batch of 32 images, on a GPU only
  two-stage   against predicting masks first and then running CLIP on 100 crops
  clipseg     against CLIPSeg with 20 and 150 classes
  memory      peak memory of each candidate in a process of its own

Each measurement runs in its own process, in which the candidates are timed in interleaved rounds. The docstrings of
benchmarks/inference.py, baselines.py and operator_kernels.py say what exactly is compared. All weights are random:
nothing is downloaded.

OUT receives results.json and results.md after every measurement, so that an interrupted run keeps its results.
The tables are also printed. Run nothing else on the machine meanwhile: the load average is recorded.
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
from modeling_gkc.cli.common import output_folder, positive

if TYPE_CHECKING:
    from .harness import Options, Result

ROOT = Path(__file__).resolve().parent.parent
# The keys of `models.PRESETS` and `harness.DTYPES`, which are not imported here because they need torch.
PRESET_NAMES = ("complete", "full", "quick", "toy")
DTYPE_NAMES = ("fp32", "bf16")
GROUPS = ("operator", "image", "batch", "two-stage", "clipseg", "memory")
RECORD, TABLE = "results.json", "results.md"
FAILED, USAGE_ERROR = 1, 2  # exit codes; 128 + the signal's number for an interrupted run
FORMAT = 2


class UsageError(ValueError):
    """Error that the user can fix by changing the command line."""


class _Terminated(KeyboardInterrupt):
    """SIGTERM, handled like Ctrl-C."""


def measurements(options: Options) -> dict[str, Callable[[], list[Result]]]:
    """Return all measurements by name, which starts with its group."""
    from .baselines import measure_baseline_memory, measure_clipseg, measure_two_stage
    from .inference import GKC, MASK2FORMER, measure_batch, measure_images, measure_memory, modes
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
        for library in (MASK2FORMER, GKC) if measured else ():
            if (library, mode) == (MASK2FORMER, OPTIMIZED):  # a mode that only GKC has
                continue
            found[f"memory {library}, {mode_name(mode, dtype)}"] = partial(
                measure_memory, *given, library, mode, dtype
            )
    for baseline in ("two-stage", "clipseg"):
        found[f"memory {baseline}"] = partial(measure_baseline_memory, *given, baseline)
    return found


def measure_in_process(name: str, options: Options) -> dict[str, Any]:
    """Run one measurement in this process and return its results in a form that JSON can store."""
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


def measure_in_subprocess(name: str, options: Options) -> dict[str, Any]:
    """Run one measurement in a process of its own; if it fails, return the exit code and its last line of output."""
    command = [sys.executable, "-m", "benchmarks", "--measure", name, *option_arguments(options)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(options.threads), "HF_HUB_OFFLINE": "1"}
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    try:
        last_line = ""
        for line in process.stderr:
            text = line.decode(errors="replace")
            sys.stderr.write(text)
            last_line = text.strip() or last_line
        output = process.stdout.read()
        process.wait()
    finally:
        with suppress(ProcessLookupError):
            process.kill()
        process.wait()
    if process.returncode:
        return {"failed": f"exit code {process.returncode}: {last_line}"}
    return json.loads(output.decode().splitlines()[-1])


def option_arguments(options: Options) -> list[str]:
    """Return the command-line arguments that produce these options."""
    arguments = ["--preset", options.preset, "--device", options.device, "--threads", str(options.threads)]
    return [*arguments, "--dtype", *options.dtypes, *([] if options.compile else ["--no-compile"])]


class Record:
    """Results of a run, written to disk after every measurement.

    Args:
        folder: Folder of the result files, created with the first measurement.
        content: Content of results.json.
    """

    def __init__(self, folder: Path, content: dict[str, Any]):
        self.folder, self.content = folder, content

    @classmethod
    def begin(cls, arguments: argparse.Namespace, options: Options, planned: list[str]) -> Record:
        """Create a new record, or load the one to continue.

        Raises:
            UsageError: The folder already holds results and --continue is missing, or they belong to another run.
        """
        from .harness import machine

        content = {
            "format": FORMAT,
            "command": shlex.join(["python", "-m", "benchmarks", *arguments.command_line]),
            "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
            "options": json.loads(json.dumps(asdict(options))),
            "machine": machine(options.threads),
            "planned": planned,
            "measurements": {},
        }
        path = arguments.out / RECORD
        if arguments.resume:
            content = _load_previous(path, content)
        elif path.exists() or (arguments.out / TABLE).exists():
            raise UsageError(
                f"{arguments.out} already holds results: name another folder with --out, or add --continue"
            )
        return cls(arguments.out, content)

    def add(self, name: str, found: dict[str, Any]) -> None:
        """Add the result of a measurement and write the files."""
        self.content["measurements"][name] = found
        self.write()

    def write(self) -> None:
        """Write results.json and results.md, each atomically."""
        self.folder.mkdir(parents=True, exist_ok=True)
        atomic_write(self.folder / RECORD, json.dumps(self.content, indent=1) + "\n")
        atomic_write(self.folder / TABLE, self.table())

    def table(self) -> str:
        """Return the tables in Markdown."""
        from .report import markdown

        return markdown(self.content)


def _load_previous(path: Path, content: dict[str, Any]) -> dict[str, Any]:
    if not path.exists():
        raise UsageError(f"{path} does not exist: there is no run to continue")
    kept = json.loads(path.read_text(encoding="utf-8"))
    keys = ("format", "options")
    machine_keys = ("processor", "cores", "threads", "accelerator", "torch", "transformers")
    differing = [key for key in keys if kept[key] != content[key]]
    differing += [key for key in machine_keys if kept["machine"][key] != content["machine"][key]]
    if differing:
        raise UsageError(
            f"{path} belongs to a run that differs in {', '.join(differing)}: name another folder with --out"
        )
    kept["planned"] = list(dict.fromkeys([*kept["planned"], *content["planned"]]))
    kept["measurements"] = {name: each for name, each in kept["measurements"].items() if "failed" not in each}
    return kept


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    folder = Path("out") / datetime.now(UTC).strftime("bench-%Y%m%d-%H%M%S")
    parser.add_argument(
        "--preset",
        choices=PRESET_NAMES,
        default="full",
        help="sizes and number of rounds (default: %(default)s); toy is for tests of this command",
    )
    parser.add_argument(
        "--out", type=output_folder, default=folder, help="new folder for the results (default: out/bench-TIME)"
    )
    parser.add_argument(
        "--only",
        nargs="+",
        choices=GROUPS,
        default=list(GROUPS),
        metavar="GROUP",
        help="groups of measurements to run, see the list above (default: all)",
    )
    parser.add_argument("--threads", type=positive, default=2, help="number of CPU threads (default: %(default)s)")
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), default="cpu", help="device to measure on (default: %(default)s)"
    )
    parser.add_argument(
        "--dtype",
        nargs="+",
        choices=DTYPE_NAMES,
        default=list(DTYPE_NAMES),
        help="data types to measure (default: all)",
    )
    parser.add_argument(
        "--no-compile", dest="compile", action="store_false", help="skip measurements that use torch.compile"
    )
    parser.add_argument(
        "--continue", dest="resume", action="store_true", help="run only the measurements that are missing in OUT"
    )
    parser.add_argument("--docs", type=Path, help="Markdown document whose tables, between its markers, are replaced")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    arguments.command_line = list(argv)
    if arguments.threads < 1:
        parser.error("--threads must be at least 1")
    return arguments


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        argv: Arguments without the program's name; None uses `sys.argv`.

    Returns:
        0 if everything was measured, 1 if a measurement failed, 2 for a usage error, 128 + the number of the signal
        that interrupted the run.
    """
    arguments = parse_arguments(sys.argv[1:] if argv is None else argv)
    from .harness import Options, print_progress

    dtypes = tuple(dtype for dtype in DTYPE_NAMES if dtype in arguments.dtype)
    options = Options(arguments.preset, arguments.device, dtypes, arguments.threads, arguments.compile)
    if arguments.measure:
        sys.stdout.write(json.dumps(measure_in_process(arguments.measure, options)) + "\n")
        return 0
    previous = signal.signal(signal.SIGTERM, _terminate)
    try:
        return _run(arguments, options)
    except (UsageError, ValueError) as error:
        print_progress(f"Error: {error}")
        return USAGE_ERROR
    except KeyboardInterrupt as stop:
        return 128 + (signal.SIGTERM if isinstance(stop, _Terminated) else signal.SIGINT)
    finally:
        signal.signal(signal.SIGTERM, previous)


def _terminate(number: int, frame: Any) -> None:
    raise _Terminated


def _run(arguments: argparse.Namespace, options: Options) -> int:
    import torch

    from .harness import print_progress
    from .report import update_document

    if options.device == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device cuda: torch finds no CUDA device on this machine, use --device cpu")
    if find_spec("scipy") is None:
        raise UsageError("transformers' Mask2Former needs scipy: run pip install scipy")
    planned = [name for name in measurements(options) if name.split()[0] in arguments.only]
    if not planned:
        raise UsageError(f"--only {' '.join(arguments.only)}: nothing to measure with --device {options.device}")
    record = Record.begin(arguments, options, planned)
    missing = [name for name in planned if name not in record.content["measurements"]]
    start = time.perf_counter()
    try:
        for number, name in enumerate(missing):
            print_progress(f"[{number + 1}/{len(missing)}] {name} ({time.perf_counter() - start:.0f} s so far)")
            record.add(name, measure_in_subprocess(name, options))
    except KeyboardInterrupt:
        print_progress(f"Interrupted. To continue, use the same options and --out {arguments.out} --continue")
        raise
    sys.stdout.write(record.table())
    if arguments.docs:
        update_document(arguments.docs, record.table())
    print_progress(f"Results are in {arguments.out / RECORD} and {arguments.out / TABLE}.")
    return FAILED if any("failed" in each for each in record.content["measurements"].values()) else 0


if __name__ == "__main__":
    sys.exit(main())
