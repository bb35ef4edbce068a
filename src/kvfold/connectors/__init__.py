"""Contexts that other programs keep, in kvfold's files, and kvfold's pages in theirs."""
