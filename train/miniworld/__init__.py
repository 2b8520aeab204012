"""A procedural world with its own tiny CLIP, on which GKC is trained and measured in minutes on a CPU."""
