"""The `kvfold` command: one file per group of verbs, over the functions users can call themselves."""

from kvfold.cli.main import main

__all__ = ["main"]
