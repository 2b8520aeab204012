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
"""What the benchmarks of inference share: the machine's name, memory, and calls timed in turn.

A result is a dict that JSON holds: `seconds` and `ratios` by name, `megabytes`, `agreement`, `not_measured`, `notes`.
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


class Disagreement(Exception):
    """Two sides that should compute the same do not."""


@dataclass(frozen=True)
class Options:
    """What of the command line a measurement needs.

    Attributes:
        preset: Name of the sizes.
        device: `cpu` or `cuda`.
        dtypes: Of `DTYPES`, those to be measured.
        threads: Of the processor.
        compile: Whether arms under torch.compile are measured.
    """

    preset: str
    device: str = "cpu"
    dtypes: tuple[str, ...] = tuple(DTYPES)
    threads: int = 2
    compile: bool = True


def machine(threads: int) -> dict[str, Any]:
    """Processor, its cores and instructions, accelerator, versions, and the load before anything was run."""
    info = Path("/proc/cpuinfo")
    fields = dict(_field(line) for line in info.read_text().splitlines() if ":" in line) if info.exists() else {}
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


def _field(line: str) -> tuple[str, str]:
    name, _, value = line.partition(":")
    return name.strip(), value.strip()


def load_average() -> float | None:
    """Processes that wanted to run, on average of the last minute; None where the system does not count them."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else None


def memory_mb(name: str) -> float:
    """A field of this process's status: `VmRSS`, memory held, or `VmHWM`, the most that was held.

    Raises:
        RuntimeError: the system has no such file, as only Linux has.
    """
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    for line in lines:
        if line.startswith(name + ":"):
            return int(line.split()[1]) / 1024
    raise RuntimeError(f"the memory of a process ({name}) is read from Linux's /proc, which is not here")


def forget_peak() -> None:
    """From here on `VmHWM` counts anew."""
    Path("/proc/self/clear_refs").write_text("5")


def no_compiler() -> str | None:
    """Why torch.compile cannot be measured here, None if it can."""
    if os.environ.get("CXX") or any(shutil.which(name) for name in ("g++", "clang++", "cl")):
        return None
    return "no C++ compiler: install g++"


def progress(message: str) -> None:
    """Says what is being done, apart from what is printed as the result."""
    sys.stderr.write(message + "\n")
    sys.stderr.flush()


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, least and most."""
    return {"median": statistics.median(values), "least": min(values), "most": max(values)}


def synchronise(device: str) -> None:
    """Waits for what was given to the accelerator."""
    if device == "cuda":
        torch.cuda.synchronize()


@dataclass
class Rounds:
    """Times of calls that took turns.

    Attributes:
        samples: For each arm and round, (clock, processor) seconds of a call.
        order: The arms in the order in which they were called.
        device: Where they computed.
    """

    samples: dict[str, list[tuple[float, float]]]
    order: list[str]
    device: str = "cpu"

    def seconds(self, scale: float = 1.0) -> dict[str, dict]:
        """Of each arm, by both clocks; `scale` turns the time of a call into that of a part or a multiple of it."""
        return {
            arm: {clock: spread([scale * sample[index] for sample in taken]) for index, clock in enumerate(CLOCKS)}
            for arm, taken in self.samples.items()
        }

    def ratio(self, name: str, over: str, under: str, scale: float = 1.0, **goal: float) -> dict[str, Any] | None:
        """How much longer `over` takes than `under`: of each round, then the median; None if either is missing.

        Args:
            name: What the ratio tells.
            over, under: Arms.
            scale: Factor of the ratio, where a call of `over` is a share of what is compared.
            goal: `at_least` or `at_most`.
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


def take_turns(
    arms: Mapping[str, Callable[[], Any]], rounds: int, warm_up: int = 1, limit: float = 60.0, device: str = "cpu"
) -> Rounds:
    """Times each arm once a round; every other round goes backwards, so that none is always the first.

    Args:
        arms: Calls by name.
        rounds: That count.
        warm_up: Rounds before them.
        limit: Seconds after which no round is begun, once there are two.
        device: What is waited for before the clock is read.
    """
    taken = Rounds({arm: [] for arm in arms}, [], device)
    start = time.perf_counter()
    for number in range(warm_up + rounds):
        if number >= warm_up + 2 and time.perf_counter() - start > limit:
            progress(f"    {number - warm_up} rounds instead of {rounds}: {limit:.0f} s are over")
            break
        for arm in list(arms) if number % 2 == 0 else reversed(list(arms)):
            seconds = timed(arms[arm], device)
            taken.order.append(arm)
            if number >= warm_up:
                taken.samples[arm].append(seconds)
    return taken


def timed(call: Callable[[], Any], device: str = "cpu") -> tuple[float, float]:
    """Seconds of one call, by the clock and of all processor cores together."""
    synchronise(device)
    clock, processor = time.perf_counter(), time.process_time()
    call()
    synchronise(device)
    return time.perf_counter() - clock, time.process_time() - processor


def compare(
    name: str, actual: Tensor, expected: Tensor, bound: float | None = None, by: str = "largest"
) -> dict[str, Any]:
    """How far two tensors lie apart, in units of the standard deviation of `expected`.

    Args:
        name: What is compared.
        actual, expected: Of one shape.
        bound: Most that is allowed; None only tells.
        by: What is bounded, the `largest` difference or the `rms`.

    Raises:
        Disagreement: the bound is passed.
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
        raise Disagreement(
            f"{name}: the {by} difference is {found[by]:.3g} standard deviations, more than {bound:.3g}. The two do "
            "not compute the same, so their times cannot be compared."
        )
    return found


@dataclass
class Result:
    """What a measurement found.

    Attributes:
        title: Of its table.
        seconds: Times by arm and clock.
        ratios: See `Rounds.ratio`.
        megabytes: Memory by arm.
        agreement: See `compare`.
        not_measured: Reasons by arm.
        notes: Sentences below the table.
        rounds: Numbers of rounds that counted.
        order: Arms as they were called.
        samples: Seconds of every call by arm, (clock, processor).
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

    def add(self, taken: Rounds, *ratios: dict | None) -> None:
        """Times of more arms, and ratios of which those that could not be formed are left out."""
        self.seconds |= taken.seconds()
        self.samples |= {arm: [list(sample) for sample in found] for arm, found in taken.samples.items()}
        self.order += taken.order
        self.rounds += [len(found) for found in list(taken.samples.values())[:1]]
        for ratio in ratios:
            self.add_ratio(ratio)

    def add_ratio(self, ratio: dict | None) -> None:
        """One that could be formed."""
        if ratio is not None:
            self.ratios.append(ratio)
