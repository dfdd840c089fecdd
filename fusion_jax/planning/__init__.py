"""Plans a run without its hardware: its typical step, the compiled program, and what bounds its speed."""
