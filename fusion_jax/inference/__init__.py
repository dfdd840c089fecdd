"""Generates text with a trained model, and measures and draws its attention."""
