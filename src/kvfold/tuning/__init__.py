"""The tuned form: bits per channel, in bases measured on a model and a text of the user's own."""
