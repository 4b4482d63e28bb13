"""Smaller models made from larger ones: pruned, distilled, quantized, exported; what an edge device learns from a
server."""
