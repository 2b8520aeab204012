"""Model cards and the checkpoint that is shipped with the repository."""
