"""Faster implementations of parts of the model: training on CPUs, and decoding in C."""
