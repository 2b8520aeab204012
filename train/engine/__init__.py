"""Training engine: the Trainer, what a recipe builds, optimization, checkpoints, sharding, logging and the command."""
