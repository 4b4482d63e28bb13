"""Training: one recipe, one loop, on one process or many."""
