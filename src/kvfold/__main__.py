"""`python -m kvfold`: the kvfold command."""

from kvfold.cli import main

main()
