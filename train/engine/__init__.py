"""Training engine: trainer, builders of a recipe's objects, optimization, checkpoints, FSDP, logging and command."""
