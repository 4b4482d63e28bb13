"""Model directories: opened, described, imported from open checkpoints, with experts or with fewer layers."""
