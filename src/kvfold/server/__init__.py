"""HTTP: the endpoints OpenAI's clients know, health and metrics, in front of one model."""
