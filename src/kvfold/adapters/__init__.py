"""One thin, reversible file per host framework. Translate shapes, call the cache, translate back."""
