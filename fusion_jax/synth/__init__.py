"""Synthesises training data: turns captions into images, conversations and mixtures."""
