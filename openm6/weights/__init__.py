"""Model directories: opened, described, imported from Qwen3, with experts or with fewer layers."""
