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
"""Measure the peak memory of post-processing one image and print it as a Markdown table. Linux only.

    python benchmarks/post_processing_memory.py                      # about a minute
    python benchmarks/post_processing_memory.py --with-transformers  # needs 8 GB of free memory

Each row is measured in a process of its own. "Above the inputs" is the peak of its resident memory during the call,
including the result, minus the resident memory before it with the logits in memory; a first call on a few pixels has
loaded the libraries by then.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F

from modeling_gkc.cli.common import positive

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.harness import memory_mb, reset_peak_memory  # noqa: E402

TASKS = {
    "semantic": ("semantic", {}),
    "panoptic": ("panoptic", {}),
    "instance, map": ("instance", {}),
    "instance, run lengths": ("instance", {"return_coco_annotation": True}),
    "instance, whole masks": ("instance", {"return_binary_maps": True}),
}


def random_outputs(classes: int, queries: int, height: int, width: int) -> SimpleNamespace:
    """Return model outputs for an input of this size: confident classes and smooth masks."""
    generator = torch.Generator().manual_seed(0)
    coarse = 6 * torch.randn(1, queries, 8, 16, generator=generator)
    labels = torch.randint(classes, (1, queries), generator=generator)
    return SimpleNamespace(
        class_queries_logits=12.0 * F.one_hot(labels, classes + 1),
        masks_queries_logits=F.interpolate(coarse, size=(height // 4, width // 4), mode="bilinear"),
        content_sizes=None,
    )


def method_of(library: str, task: str) -> Callable:
    """Return the method `post_process_<task>_segmentation` of GKC's or transformers' Mask2Former's image processor."""
    if library == "transformers":
        from transformers.models.mask2former.image_processing_pil_mask2former import Mask2FormerImageProcessorPil

        processor = Mask2FormerImageProcessorPil()
    else:
        from modeling_gkc import GKCImageProcessor

        processor = GKCImageProcessor()
    return getattr(processor, f"post_process_{task}_segmentation")


def measure(arguments: argparse.Namespace) -> dict[str, float]:
    """Measure the peak memory above the inputs and the seconds of one row in this process."""
    torch.set_num_threads(arguments.threads)
    task, settings = TASKS[arguments.row]
    method = method_of(arguments.library, task)
    input_size = arguments.input_size or (arguments.height, arguments.width)
    outputs = random_outputs(arguments.classes, arguments.queries, *input_size)
    method(random_outputs(3, 2, 32, 32), target_sizes=[(8, 8)], **settings)
    held = memory_mb("VmRSS")
    reset_peak_memory()
    start = time.perf_counter()
    result = method(outputs, target_sizes=[(arguments.height, arguments.width)], **settings)
    seconds = time.perf_counter() - start
    assert len(result) == 1
    return {"above_mb": memory_mb("VmHWM") - held, "seconds": seconds}


def run_row(library: str, row: str, arguments: argparse.Namespace) -> dict[str, float]:
    """Run `measure` for one row in a process of its own."""
    numbers = ("classes", "queries", "height", "width", "threads")
    options = [part for name in numbers for part in (f"--{name}", str(getattr(arguments, name)))]
    if arguments.input_size:
        options += ["--input-size", *map(str, arguments.input_size)]
    command = [sys.executable, __file__, *options, "--library", library, "--row", row]
    finished = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if finished.returncode:
        raise SystemExit(f"{library}, {row}: exit code {finished.returncode}\n{finished.stderr}")
    return json.loads(finished.stdout)


def parse_arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--classes", type=positive, default=847, help="number of classes (default: %(default)s)")
    parser.add_argument("--queries", type=positive, default=100, help="number of queries (default: %(default)s)")
    parser.add_argument(
        "--height", type=positive, default=1024, help="height of the result in pixels (default: %(default)s)"
    )
    parser.add_argument(
        "--width", type=positive, default=2048, help="width of the result in pixels (default: %(default)s)"
    )
    parser.add_argument(
        "--input-size",
        type=positive,
        nargs=2,
        metavar=("HEIGHT", "WIDTH"),
        help="size of the model's input in pixels (default: the size of the result)",
    )
    parser.add_argument("--threads", type=positive, default=1, help="number of CPU threads (default: %(default)s)")
    parser.add_argument(
        "--rows", nargs="+", choices=TASKS, default=list(TASKS), help="tasks to measure (default: all)"
    )
    parser.add_argument(
        "--with-transformers", action="store_true", help="also measure transformers' Mask2Former for comparison"
    )
    parser.add_argument("--library", choices=("gkc", "transformers"), help=argparse.SUPPRESS)
    parser.add_argument("--row", choices=TASKS, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    """Print the table, or the figures of one row if the command was started for it."""
    arguments = parse_arguments()
    if arguments.row:
        sys.path.insert(0, str(ROOT))
        sys.stdout.write(json.dumps(measure(arguments)))
        return
    libraries = ["gkc", "transformers"] if arguments.with_transformers else ["gkc"]
    size = f"{arguments.classes} classes, {arguments.queries} queries, {arguments.height} x {arguments.width}"
    sys.stdout.write(f"{size}, {arguments.threads} thread(s), fp32\n\n")
    sys.stdout.write("| task | library | peak above the inputs, MB | seconds |\n| --- | --- | ---: | ---: |\n")
    for row in arguments.rows:
        for library in libraries:
            found = run_row(library, row, arguments)
            sys.stdout.write(f"| {row} | {library} | {found['above_mb']:.0f} | {found['seconds']:.1f} |\n")
            sys.stdout.flush()


if __name__ == "__main__":
    main()
