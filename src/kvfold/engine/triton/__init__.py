"""The Triton engine: canonical pages on GPUs of any maker."""
