"""Batches of pictures and of texts for a catalogue of goods: candidates, rules, a review page, people's verdicts as
data."""
