"""Faster computations of parts of the model than plain PyTorch has."""
