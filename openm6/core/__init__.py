"""Sequences and batches with the mask rule, pictures, the tokenizer, files that are written whole or not at all,
errors, environment variables, energy: the layer that every other package may import."""
