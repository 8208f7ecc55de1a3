"""Training: config, Lightning module, optimizer, loop, checkpoints and report of a run."""
