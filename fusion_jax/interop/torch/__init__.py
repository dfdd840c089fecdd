"""The exported model's own PyTorch code; nothing else of the package imports it."""
