"""Conversations that outlive the process: tokens, folded pages and running states, in memory and on disk."""
