"""Vectors to codes and scales, and back. One file per codec in NumPy (float64 by equation; canonical float32)."""
