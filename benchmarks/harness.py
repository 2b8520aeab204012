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
"""Shared code of the inference benchmarks: machine description, memory readings, interleaved timing and results.

All results can be written as JSON.
"""

import os
import platform
import shutil
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

CLOCKS = ("clock", "processor")
CPU_FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_tile", "amx_bf16")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class OutputMismatch(Exception):
    """Error raised when two candidates that should compute the same output do not."""


@dataclass(frozen=True)
class Options:
    """Command-line options that affect a measurement.

    Attributes:
        preset: Name of the preset that defines all sizes.
        device: `cpu` or `cuda`.
        dtypes: Names from `DTYPES` of the data types to measure.
        threads: Number of CPU threads.
        compile: Whether models are also measured under torch.compile.
    """

    preset: str
    device: str = "cpu"
    dtypes: tuple[str, ...] = tuple(DTYPES)
    threads: int = 2
    compile: bool = True


def machine(threads: int) -> dict[str, Any]:
    """Return processor, cores, instruction sets, accelerator, library versions and the current load average."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    fields = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    flags = fields.get("flags", "").split()
    return {
        "processor": fields.get("model name") or platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "instructions": [flag for flag in CPU_FLAGS if flag in flags],
        "has_amx": "amx_bf16" in flags,
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "threads": threads,
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "load_average": load_average(),
    }


def load_average() -> float | None:
    """Return the system's load average over the last minute, None where the system does not provide it."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else None


def memory_mb(name: str) -> float:
    """Return a memory field of this process's status in MB.

    Args:
        name: `VmRSS`, the resident memory, or `VmHWM`, the peak resident memory.

    Raises:
        RuntimeError: The system has no /proc/self/status, which only Linux has.
    """
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    for line in lines:
        if line.startswith(name + ":"):
            return int(line.split()[1]) / 1024
    raise RuntimeError(f"Cannot read {name} from /proc/self/status: memory is measured on Linux only")


def reset_peak_memory() -> None:
    """Reset the peak resident memory (`VmHWM`) of this process to the current value."""
    Path("/proc/self/clear_refs").write_text("5")


def missing_compiler() -> str | None:
    """Return the reason why torch.compile cannot be measured on this machine, None if it can."""
    if os.environ.get("CXX") or any(shutil.which(name) for name in ("g++", "clang++", "cl")):
        return None
    return "no C++ compiler: install g++"


def print_progress(message: str) -> None:
    """Print a progress message to stderr; stdout is kept for the result."""
    sys.stderr.write(message + "\n")
    sys.stderr.flush()


def spread(values: Sequence[float]) -> dict[str, float]:
    """Return the median, minimum and maximum of the values."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def synchronize(device: str) -> None:
    """Wait until the accelerator has finished its queued work."""
    if device == "cuda":
        torch.cuda.synchronize()


@dataclass
class Rounds:
    """Times of calls that were measured in interleaved rounds.

    Attributes:
        samples: Seconds of each call, (wall clock, processor time), one pair per round, by candidate.
        order: Candidates in the order in which they were called.
        device: Device on which the calls were computed.
    """

    samples: dict[str, list[tuple[float, float]]]
    order: list[str]
    device: str = "cpu"

    def seconds(self) -> dict[str, dict]:
        """Return the spread of the seconds of a call by candidate and clock."""
        return {
            candidate: {clock: spread([sample[index] for sample in samples]) for index, clock in enumerate(CLOCKS)}
            for candidate, samples in self.samples.items()
        }

    def ratio(self, name: str, over: str, under: str, scale: float = 1.0, **goal: float) -> dict[str, Any] | None:
        """Compute the ratio of the times of two candidates within each round, and its spread over the rounds.

        Args:
            name: Label of the ratio.
            over: Candidate whose time is the numerator.
            under: Candidate whose time is the denominator.
            scale: Factor applied to the ratio, for a call of `over` that does only a part of the compared work.
            goal: `at_least` or `at_most`, the goal for the median.

        Returns:
            Label, candidates, scale, goal and the spread by clock; None if one of the candidates was not measured.
        """
        if over not in self.samples or under not in self.samples:
            return None
        pairs = list(zip(self.samples[over], self.samples[under], strict=True))
        clocks = {
            clock: spread([scale * one[index] / other[index] for one, other in pairs])
            for index, clock in enumerate(CLOCKS)
            if all(other[index] > 0 for _, other in pairs)
        }
        return {"name": name, "over": over, "under": under, "scale": scale, "goal": goal, **clocks}


def time_interleaved(
    candidates: Mapping[str, Callable[[], Any]],
    rounds: int,
    warm_up: int = 1,
    limit: float = 60.0,
    device: str = "cpu",
) -> Rounds:
    """Time all candidates in interleaved rounds.

    Every other round runs in reverse order, so that no candidate always comes first.

    Args:
        candidates: Calls by name.
        rounds: Number of rounds that are kept.
        warm_up: Number of rounds before them that are discarded.
        limit: Seconds after which no further round is started, once two rounds are kept.
        device: Device to synchronize with before each clock reading.
    """
    timings = Rounds({candidate: [] for candidate in candidates}, [], device)
    start = time.perf_counter()
    for number in range(warm_up + rounds):
        if number >= warm_up + 2 and time.perf_counter() - start > limit:
            print_progress(
                f"    stopped at the time limit ({limit:.0f} s) after {number - warm_up} of {rounds} rounds"
            )
            break
        for candidate in list(candidates) if number % 2 == 0 else reversed(list(candidates)):
            seconds = timed(candidates[candidate], device)
            timings.order.append(candidate)
            if number >= warm_up:
                timings.samples[candidate].append(seconds)
    return timings


def timed(call: Callable[[], Any], device: str = "cpu") -> tuple[float, float]:
    """Return the wall-clock seconds of a call and its processor seconds summed over all cores."""
    synchronize(device)
    clock, processor = time.perf_counter(), time.process_time()
    call()
    synchronize(device)
    return time.perf_counter() - clock, time.process_time() - processor


def compare(
    name: str, actual: Tensor, expected: Tensor, bound: float | None = None, by: str = "largest"
) -> dict[str, Any]:
    """Measure the difference of two tensors in units of the standard deviation of `expected`.

    Args:
        name: Label of the comparison.
        actual: Tensor to check.
        expected: Reference tensor of the same shape.
        bound: Largest allowed difference; None checks nothing.
        by: Difference that is checked, the `largest` or the `rms`.

    Raises:
        OutputMismatch: The difference exceeds the bound.
    """
    actual, expected = actual.detach().float(), expected.detach().float()
    deviation = expected.std()
    difference = (actual - expected).abs()
    found = {
        "name": name,
        "largest": float(difference.max() / deviation),
        "rms": float(difference.square().mean().sqrt() / deviation),
        "max_abs": float(difference.max()),
        "differing_signs": float(((actual > 0) != (expected > 0)).float().mean()),
        "by": by,
        "bound": bound,
    }
    if bound is not None and not found[by] <= bound:
        raise OutputMismatch(
            f"{name}: the {by} difference is {found[by]:.3g} standard deviations, above the bound of {bound:.3g}. "
            "The outputs differ, so the times cannot be compared."
        )
    return found


@dataclass
class Result:
    """Result of one measurement.

    Attributes:
        title: Heading of its tables.
        seconds: Times by candidate and clock, see `Rounds.seconds`.
        ratios: Time ratios, see `Rounds.ratio`.
        megabytes: Memory in MB by candidate.
        agreement: Differences between outputs, see `compare`.
        not_measured: Reasons by candidate that could not be measured.
        notes: Sentences shown below the tables.
        rounds: Numbers of rounds that were kept.
        order: Candidates in the order in which they were called.
        samples: Seconds of every call by candidate, (wall clock, processor time).
    """

    title: str
    seconds: dict[str, dict] = field(default_factory=dict)
    ratios: list[dict] = field(default_factory=list)
    megabytes: dict[str, dict] = field(default_factory=dict)
    agreement: list[dict] = field(default_factory=list)
    not_measured: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    rounds: list[int] = field(default_factory=list)
    order: list[str] = field(default_factory=list)
    samples: dict[str, list] = field(default_factory=dict)

    def add(self, timings: Rounds, *ratios: dict | None) -> None:
        """Add times, and those of the ratios that could be computed."""
        self.seconds |= timings.seconds()
        self.samples |= {candidate: [list(sample) for sample in found] for candidate, found in timings.samples.items()}
        self.order += timings.order
        self.rounds += [len(found) for found in list(timings.samples.values())[:1]]
        for ratio in ratios:
            self.add_ratio(ratio)

    def add_ratio(self, ratio: dict | None) -> None:
        """Add a ratio unless it is None."""
        if ratio is not None:
            self.ratios.append(ratio)
