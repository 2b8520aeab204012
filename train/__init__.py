"""The workshop: data, losses, trainer and evaluation of GKC, run from a clone (`python -m train ...`)."""
