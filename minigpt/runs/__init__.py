"""Run folders, with their checkpoints, records and provenance."""
