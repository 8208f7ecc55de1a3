"""A training run: config, module, optimizer, loop, checkpoints, report."""
