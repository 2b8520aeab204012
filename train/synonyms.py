"""Build synonym lists for a vocabulary from WordNet: `python -m train.synonyms --help`."""

import sys

from .data.wordnet.synonyms import main

if __name__ == "__main__":
    sys.exit(main())
