"""Bytes over time: pages, sequences and layers of a cache. Knows tokens; knows no framework but torch."""
