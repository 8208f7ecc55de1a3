"""Data pipeline, from stories to batches: sources, preparation, windows and data module."""
