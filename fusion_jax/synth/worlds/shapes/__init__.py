"""Makes plain shapes on a grid, the quickstart's world."""
