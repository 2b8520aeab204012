"""Precompute what training looks up instead of running CLIP in every step: `python -m train.cache --help`."""

import sys

from .teacher.precompute import main

if __name__ == "__main__":
    sys.exit(main())
