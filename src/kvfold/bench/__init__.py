"""Timing of the engines against other ways to do the same, interleaved in one process."""
