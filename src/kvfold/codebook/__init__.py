"""(codec, bits, head_dim) to levels and thresholds. Knows densities; knows nothing of vectors."""

from kvfold.codebook.lloyd_max import Codebook, Table, solve, table

__all__ = ["Codebook", "Table", "solve", "table"]
