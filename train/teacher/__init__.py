"""Frozen CLIP teacher: its towers, embeddings of region crops and of text, and their precomputation."""
