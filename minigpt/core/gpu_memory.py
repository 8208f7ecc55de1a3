"""Errors of a GPU that runs out of memory. This module does not import torch, which is slow."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator


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


@contextlib.contextmanager
def end_if_out_of_memory() -> Iterator[None]:
    """End the `with` block, without an error, if the GPU runs out of memory in it."""
    try:
        yield
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
