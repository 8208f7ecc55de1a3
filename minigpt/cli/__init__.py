"""The command line: `minigpt`, train and evaluate."""
