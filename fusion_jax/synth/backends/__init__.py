"""Provides the models of the data engine: for replies, images, verdicts and scores."""
