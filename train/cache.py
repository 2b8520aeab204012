"""Entry point of `python -m train.cache`, which precomputes CLIP's outputs for a dataset."""

import sys

from .teacher.precompute import main

if __name__ == "__main__":
    sys.exit(main())
