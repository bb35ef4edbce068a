"""llama.cpp: saved states of one sequence, and llama-server's slot files, folded into files of a fifth of their size and back.

llama.cpp has no place for another cache, so nothing runs inside it: what it saved is parsed byte for byte (`state`), its keys and
values are folded (`folding`), and what comes back is a state that it restores as one of its own.
"""
