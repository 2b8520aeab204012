"""Entry point of `python -m train.synonyms`, which builds synonym lists of a vocabulary from WordNet."""

import sys

from .data.wordnet.synonyms import main

if __name__ == "__main__":
    sys.exit(main())
