"""Run a fuzzer, for example: python -m tests.fuzz labels -n 10000."""

import argparse
import sys

from tests.fuzz import SURFACES, run


def main() -> int:
    """Run one surface and print its outcomes; the exit code is 1 if any input was wrong or crashed."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("surface", choices=SURFACES, help="part of the library to test")
    parser.add_argument("-n", "--count", type=int, default=1000, help="number of inputs (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the run (default: %(default)s)")
    parser.add_argument("--first", type=int, default=0, help="index of the first input (default: %(default)s)")
    arguments = parser.parse_args()
    sys.stdout.reconfigure(errors="backslashreplace")  # mutated inputs may not be valid Unicode
    report = run(arguments.surface, arguments.count, arguments.seed, arguments.first)
    for index, text in report.failures:
        print(f"--- input {index} of seed {arguments.seed}\n{text}")
    counts = ", ".join(f"{report.outcomes[name]} {name}" for name in ("accepted", "refused", "wrong", "crashed"))
    print(f"{arguments.surface}: {arguments.count} inputs: {counts}")
    return 1 if report.failures else 0


if __name__ == "__main__":
    sys.exit(main())
