"""WordNet: its database, synonym lists for vocabularies, and nouns of captions."""
