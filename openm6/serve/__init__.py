"""A model behind an API: the engine that answers many at once, and what stands in front of it."""
