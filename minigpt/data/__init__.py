"""Stories to batches: sources, preparation, windows and the data module."""
