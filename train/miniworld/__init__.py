"""Mini-world experiment: synthetic images and a tiny CLIP for training and evaluating GKC on a CPU in minutes."""
