"""Progress of `huggingface_hub` downloads, as log lines if there is no terminal."""

from __future__ import annotations

import contextlib
from typing import Any

from huggingface_hub.utils import tqdm

from minigpt.data.progress import byte_progress


class HubLines(tqdm):
    """Replacement for the progress bar of `huggingface_hub`, which shows nothing in a log."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._stack = contextlib.ExitStack()
        super().__init__(*args, **kwargs | {"disable": True})
        total, done = kwargs.get("total"), kwargs.get("initial") or 0
        self._show = self._stack.enter_context(byte_progress(kwargs["desc"], total, done))

    def update(self, n: float | None = 1) -> None:  # type: ignore[override]
        """Add `n` bytes to the progress."""
        self._show(int(n or 0))

    def close(self) -> None:
        """Stop logging."""
        self._stack.close()
        super().close()
