"""Seeded fuzzers for everything that reads user input, one module per surface.

A surface is a module `tests.fuzz.<surface>` with two functions:

* `setup(folder: Path) -> context` builds the valid inputs that are mutated, once;
* `check(context, rng: random.Random) -> str` mutates one input and passes it to the library. It returns `"accepted"`
  if the input was accepted and the result is right, `"refused"` if it was rejected by a documented error that names
  the fault, and raises `AssertionError` for a silently wrong result. Any other exception is a crash.

`python -m tests.fuzz SURFACE -n 10000` runs any number of inputs; `tests/test_fuzz.py` runs a few hundred.
"""

import importlib
import random
import tempfile
import traceback
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

SURFACES = ("annotations", "configs", "images", "labels", "post_processing", "stores")


@dataclass
class Report:
    """Outcomes of a run of one surface.

    Args:
        outcomes: Number of inputs by outcome: accepted, refused, wrong (a silently wrong result), crashed.
        failures: Index and traceback of each input that was wrong or crashed.
    """

    outcomes: Counter = field(default_factory=Counter)
    failures: list[tuple[int, str]] = field(default_factory=list)


def run(surface: str, count: int, seed: int = 0, first: int = 0) -> Report:
    """Run the inputs `first` to `first + count - 1` of a seed; each input depends on the seed and its index only.

    Args:
        surface: One of SURFACES.
        count: Number of inputs.
        seed: Seed of the run.
        first: Index of the first input, to repeat a single one.
    """
    module = importlib.import_module(f"tests.fuzz.{surface}")
    report = Report()
    with tempfile.TemporaryDirectory() as folder:
        context = module.setup(Path(folder))
        for index in range(first, first + count):
            try:
                outcome = module.check(context, random.Random(f"{seed}-{index}"))
                assert outcome in ("accepted", "refused"), f"{surface}: unknown outcome {outcome!r}"
            except Exception as error:
                outcome = "wrong" if isinstance(error, AssertionError) else "crashed"
                report.failures.append((index, traceback.format_exc()))
            report.outcomes[outcome] += 1
    return report
