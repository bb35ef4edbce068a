"""How much a folded cache changes a model: measured through the cache that users run."""
