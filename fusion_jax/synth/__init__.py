"""Synthesis of training data: captions in; images, conversations and mixtures out."""
