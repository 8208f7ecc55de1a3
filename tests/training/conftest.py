"""Fixtures of the tests of training."""

from collections.abc import Callable
from pathlib import Path

import pytest


@pytest.fixture
def parent(tiny: list[str], trained_once: Callable[..., Path]) -> Path:
    return trained_once([*tiny, "name=parent"])
