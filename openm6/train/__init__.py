"""Training: one recipe, one loop, on one process or many; objectives, optimizers, parallelism, checkpoints."""
