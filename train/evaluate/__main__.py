"""Evaluate a model on a prepared benchmark: `python -m train.evaluate --help`, `... report --help`."""

import sys

from .command import main

if __name__ == "__main__":
    sys.exit(main())
