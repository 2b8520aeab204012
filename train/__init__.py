"""Training and evaluation code of GKC, run from a clone of the repository (`python -m train ...`)."""
