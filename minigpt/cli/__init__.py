"""Command line: the `minigpt` program, train.py and evaluate.py."""
