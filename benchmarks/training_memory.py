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
"""Measure memory growth over training steps and the peak memory of a step. Linux only.

    python benchmarks/training_memory.py                   # 500 steps of a toy model, then one full-size step each
    python benchmarks/training_memory.py --preset toy      # toy sizes only

`GKCTrainer` trains a toy student, and the resident memory of the process is read every few steps. The slope is that
of a least-squares line through the second half of the readings, when all buffers have been allocated, with its
standard error. The peaks are those of the step variants of `training_step.py`, each in a process of its own.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from transformers import TrainerCallback
from transformers.utils.logging import disable_progress_bar

from modeling_gkc.cli.common import positive

ROOT = Path(__file__).resolve().parent.parent
if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))

from benchmarks.harness import memory_mb  # noqa: E402
from benchmarks.training_step import PRESETS, VARIANTS, Workload, machine  # noqa: E402


class MemoryReader(TrainerCallback):
    """Callback that reads the resident memory of the process after every `every` steps."""

    def __init__(self, every: int):
        self.every = every
        self.steps: list[int] = []
        self.held_mb: list[float] = []

    def on_step_end(self, args, state, control, **kwargs):
        """Read the memory after an optimizer step."""
        if state.global_step % self.every == 0:
            self.steps.append(state.global_step)
            self.held_mb.append(memory_mb("VmRSS"))


def memory_over_steps(steps: int, every: int) -> MemoryReader:
    """Train a toy model and read its memory; one and a half batches of images, so that epochs end too."""
    toy, reader = PRESETS["toy"], MemoryReader(every)
    with tempfile.TemporaryDirectory() as folder:
        workload = Workload(toy, Path(folder), images=3 * toy.batch_size, max_steps=steps, logging_steps=50)
        workload.trainer.step_regions = workload.step_regions["cached"]
        workload.trainer.add_callback(reader)
        workload.trainer.train()
    return reader


def slope(steps: list[int], held_mb: list[float]) -> tuple[float, float]:
    """Fit a least-squares line.

    Returns:
        The slope and its standard error in kB per step.
    """
    x, y = np.asarray(steps, dtype=float), 1024 * np.asarray(held_mb)
    x = x - x.mean()
    rise = (x @ y) / (x @ x)
    residuals = y - y.mean() - rise * x
    return float(rise), float(np.sqrt(residuals @ residuals / max(1, len(x) - 2) / (x @ x)))


def peak(preset: str, variant: str, threads: int) -> float:
    """Return the peak memory in MB of a process that runs one step."""
    options = ["--preset", preset, "--variants", variant, "--rounds", "1", "--warm-up", "1", "--threads", str(threads)]
    command = [sys.executable, str(ROOT / "benchmarks" / "training_step.py"), *options]
    finished = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if finished.returncode:
        raise SystemExit(f"{variant}: exit code {finished.returncode}\n{finished.stderr}")
    return json.loads(finished.stdout.splitlines()[0])["peak_mb"]


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=positive, default=500, help="steps of the toy model (default: %(default)s)")
    parser.add_argument(
        "--every", type=positive, default=5, help="steps between memory readings (default: %(default)s)"
    )
    parser.add_argument("--preset", choices=PRESETS, default="coco", help="sizes of the peaks (default: %(default)s)")
    parser.add_argument(
        "--variants",
        nargs="*",
        choices=VARIANTS,
        default=list(VARIANTS),
        help="step variants whose peak is measured (default: all)",
    )
    parser.add_argument("--threads", type=positive, default=2, help="number of CPU threads (default: %(default)s)")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    """Run the measurement and print one line of JSON and the tables."""
    options = parse_arguments(arguments)
    torch.set_num_threads(options.threads)
    disable_progress_bar()
    reader = memory_over_steps(options.steps, options.every)
    half = len(reader.steps) // 2
    rise, error = slope(reader.steps[half:], reader.held_mb[half:])
    peaks = {variant: peak(options.preset, variant, options.threads) for variant in options.variants}
    found = {"steps": reader.steps, "held_mb": reader.held_mb, "slope_kb": rise, "slope_error_kb": error}
    sys.stdout.write(json.dumps({"machine": machine(options.threads), **found, "peak_mb": peaks}) + "\n\n")
    sys.stdout.write(machine(options.threads) + "\n\n| step | resident memory, MB |\n| ---: | ---: |\n")
    for position in np.linspace(0, len(reader.steps) - 1, 6).round().astype(int):
        sys.stdout.write(f"| {reader.steps[position]} | {reader.held_mb[position]:.1f} |\n")
    sys.stdout.write(f"\nslope of the second half: {rise:.2f} kB per step, standard error {error:.2f}\n")
    for variant, peak_mb in peaks.items():
        sys.stdout.write(f"\npeak of the step, {options.preset}, {variant}: {peak_mb:.0f} MB\n")


if __name__ == "__main__":
    main()
