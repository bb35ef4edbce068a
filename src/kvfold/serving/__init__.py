"""Requests to tokens: one thread runs the model, many conversations share its decode steps."""
