"""The model: its configuration and all of its layers, in Flax; no other package uses Flax modules."""
