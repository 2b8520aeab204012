"""Model cards and the shipped checkpoint."""
