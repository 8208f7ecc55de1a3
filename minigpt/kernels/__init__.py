"""Faster implementations of attention, loss and decoding, for CPUs and GPUs."""
