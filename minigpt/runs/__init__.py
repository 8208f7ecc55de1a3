"""Run folders: their files, checkpoints, records and provenance."""
