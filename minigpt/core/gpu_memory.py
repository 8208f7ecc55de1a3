"""Errors of a GPU that runs out of memory. This module does not import torch, which is slow."""

from __future__ import annotations


def is_out_of_memory(error: BaseException | None) -> bool:
    """Return whether an error is PyTorch's OutOfMemoryError, or follows from one.

    Within the recording of a CUDA graph, the end of the recording raises another error, and CUDA
    itself reports a lack of memory as a RuntimeError.
    """
    while error is not None:
        if type(error).__name__ == "OutOfMemoryError" or "CUDA error: out of memory" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False
