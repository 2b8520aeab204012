"""The benchmarks, each family in a module of its own that defines `BENCHMARKS`."""

from functools import cache
from importlib import import_module
from pkgutil import iter_modules

from .base import Benchmark


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
