"""Plans a run without its hardware: the typical step, the program compiled for it, and what bounds its speed."""
