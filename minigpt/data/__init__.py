"""From stories to batches: sources, preparation, windows and the data module."""
