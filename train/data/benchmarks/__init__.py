"""The benchmarks, each family in a module of its own that defines `BENCHMARKS`.

A benchmark is one such module (its reader, protocol and published results) and a packaged vocabulary; nothing else has
to know it by name.
"""

from functools import cache
from importlib import import_module
from pkgutil import iter_modules

from .base import Benchmark
from .protocol import Protocol


@cache
def all_benchmarks() -> dict[str, Benchmark]:
    """Every benchmark by its name, in the order of the names."""
    found: dict[str, Benchmark] = {}
    for module in sorted(module.name for module in iter_modules(__path__)):
        for benchmark in getattr(import_module(f"{__name__}.{module}"), "BENCHMARKS", ()):
            if benchmark.name in found:
                raise RuntimeError(f"Two benchmarks are called {benchmark.name!r}.")
            found[benchmark.name] = benchmark
    return dict(sorted(found.items()))


def benchmark_named(name: str) -> Benchmark:
    """A benchmark by its name.

    Raises:
        ValueError: there is none of that name; those that there are are listed.
    """
    benchmarks = all_benchmarks()
    if name not in benchmarks:
        raise ValueError(f"There is no benchmark {name!r}; there are {', '.join(benchmarks)}.")
    return benchmarks[name]


def protocol_of(name: str) -> Protocol:
    """The protocol of a benchmark.

    A variant, such as base or novel classes only, is scored as the benchmark whose classes it takes; one's own data,
    which no protocol names, by mIoU at the usual sizes.

    Raises:
        ValueError: there is no such benchmark.
    """
    benchmark = benchmark_named(name)
    original = all_benchmarks().get(benchmark.vocabulary)
    usual = Protocol(note="no published protocol: the usual sizes")
    return benchmark.protocol or (original and original.protocol) or usual
