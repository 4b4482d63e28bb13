"""Batch generation of pictures and product copy: candidates, rules, a review page, human labels as training data."""
