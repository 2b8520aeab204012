"""Benchmark registry: every module of this package that defines `BENCHMARKS` adds a family of benchmarks.

A new benchmark needs one module with its reader, protocol and published results, and a packaged vocabulary.
"""

from functools import cache
from importlib import import_module
from pkgutil import iter_modules

from .base import Benchmark
from .protocol import Protocol


@cache
def all_benchmarks() -> dict[str, Benchmark]:
    """Return all benchmarks by name, in alphabetical order."""
    found: dict[str, Benchmark] = {}
    for module in sorted(module.name for module in iter_modules(__path__)):
        for benchmark in getattr(import_module(f"{__name__}.{module}"), "BENCHMARKS", ()):
            if benchmark.name in found:
                raise RuntimeError(f"Two benchmarks have the name {benchmark.name!r}.")
            found[benchmark.name] = benchmark
    return dict(sorted(found.items()))


def benchmark_named(name: str) -> Benchmark:
    """Return the benchmark with the given name.

    Raises:
        ValueError: If there is no such benchmark. The message lists all names.
    """
    benchmarks = all_benchmarks()
    if name not in benchmarks:
        raise ValueError(f"Unknown benchmark {name!r}; choose from {', '.join(benchmarks)}.")
    return benchmarks[name]


def protocol_of(name: str) -> Protocol:
    """Return the evaluation protocol of a benchmark.

    A variant, such as base or novel classes only, has the protocol of the benchmark that defines its classes. Custom
    data has no published protocol: mIoU at the input size of the checkpoint.

    Raises:
        ValueError: If there is no such benchmark.
    """
    benchmark = benchmark_named(name)
    original = all_benchmarks().get(benchmark.vocabulary)
    own = Protocol(short_side=None, long_side=None, note="no published protocol: the input size of the checkpoint")
    return benchmark.protocol or (original and original.protocol) or own
