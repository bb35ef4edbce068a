"""Codes to bytes and back. Knows bits; knows nothing of vectors."""
