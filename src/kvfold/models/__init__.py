"""Weights that ship with the package. See the card in each folder."""
