"""What a model's context will cost in bytes, before a byte is allocated: from its config alone, without its weights."""
