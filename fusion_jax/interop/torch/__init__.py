"""Holds the exported model's own PyTorch code, which is only imported for exports."""
