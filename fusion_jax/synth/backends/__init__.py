"""The models behind the data engine: replies, images, verdicts and scores."""
