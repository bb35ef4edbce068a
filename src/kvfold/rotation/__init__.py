"""Vectors to rotated vectors and back. Knows seeds; knows nothing of bits."""
