"""Train by a recipe: `python -m train RECIPE [field=value ...]`; see `--help`."""

import sys

from .engine.main import main

if __name__ == "__main__":
    sys.exit(main())
