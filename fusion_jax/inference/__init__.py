"""Generation with a trained model, and maps of its attention."""
